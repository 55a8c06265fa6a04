"""Other projects' files: who reads them, and what their names say."""

import io
import re
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import NamedTuple, TypeVar

from . import dictionary_learning, saelens, sparsify
from .fields import Fields
from .stored import StoredSAE

P = TypeVar("P", bound=PurePath)


class Format(NamedTuple):
    """The files of a project. config: the name of what lies beside the weights. read: the SAE in both, open."""

    project: str
    config: str
    read: Callable[[Path, io.BufferedReader, Fields], StoredSAE]


# By the name of the weights.
FORMATS = {
    "sae_weights.safetensors": Format("SAELens", "cfg.json", saelens.read),
    "sae.safetensors": Format("sparsify", "cfg.json", sparsify.read),
    "ae.pt": Format("dictionary_learning", "config.json", dictionary_learning.read),
}
NAMES = ", ".join(f"{name} ({format.project})" for name, format in FORMATS.items())
# A name of its own in a name: gemma-scope-2b-pt-transcoders, transcoder_all, clt.
OTHER_KINDS = re.compile(r"(?<![a-z])(transcoder|crosscoder|clt)s?(?![a-z])", re.IGNORECASE)
SAES = re.compile(r"(?<![a-z])saes?(?![a-z])|gemma-scope-.*-(res|att|mlp)$", re.IGNORECASE)


def config_for(weights: P) -> P:
    """Where the config of these weights, named as in `FORMATS`, is."""
    return weights.with_name(FORMATS[weights.name].config)


def named_for_another_kind(path: str) -> str | None:
    """The part of ``path`` that says transcoder, crosscoder or CLT, unless a later one says SAE."""
    for part in reversed(PurePath(path).parts):
        if OTHER_KINDS.search(part):
            return part
        if SAES.search(part):
            break
    return None
