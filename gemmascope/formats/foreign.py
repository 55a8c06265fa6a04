"""What other projects' files look like, so that a refusal says what was found and how to go on."""

import os
import re
from pathlib import Path, PurePath

EXPORT = (
    "if it is a JumpReLU SAE that does not subtract b_dec from its input, numpy.savez its W_enc, W_dec, b_enc, b_dec"
    " and threshold as fp32 into a .npz"
)
LAYOUTS = {
    "sae_weights.safetensors": f"an SAE of SAELens: open it with sae_lens.SAE.load_from_disk and, {EXPORT}",
    "sae.safetensors": "an SAE of sparsify: open it with sparsify.SparseCoder.load_from_disk; TopK is no JumpReLU SAE",
    "ae.pt": f"an SAE of dictionary_learning: open it with torch.load(…, weights_only=True) and, {EXPORT}",
}
# A name of its own in a name: gemma-scope-2b-pt-transcoders, transcoder_all, clt.
OTHER_KINDS = re.compile(r"(?<![a-z])(transcoder|crosscoder|clt)s?(?![a-z])", re.IGNORECASE)
SAES = re.compile(r"(?<![a-z])saes?(?![a-z])|gemma-scope-.*-(res|att|mlp)$", re.IGNORECASE)


def found_in(folder: Path) -> str | None:
    """What other project's files lie in the folder, and the way out; None when they are none of `LAYOUTS`."""
    return next((f"{name}, {what}" for name, what in LAYOUTS.items() if os.path.lexists(folder / name)), None)


def named_for_another_kind(path: str) -> str | None:
    """The part of ``path`` that says transcoder, crosscoder or CLT, unless a later one says SAE."""
    for part in reversed(PurePath(path).parts):
        if OTHER_KINDS.search(part):
            return part
        if SAES.search(part):
            break
    return None
