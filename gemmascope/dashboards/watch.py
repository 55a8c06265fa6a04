"""`watch`: one pass of the model over rows of text, whose codes every `Collector` is given."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..autocast import without_autocast
from ..errors import EnvironmentProblemError
from ..evaluation.protocol import Subject
from ..evaluation.token_sets import MarkedText
from ..kernels import SparseCode
from ..sites import Site, Tap, evaluating
from ..sites.collect import encoded
from ..sites.decoder import eagerly, input_device
from ..sites.tokens import forward_arguments

# Of a forward; the text decides the rest, so that results do not hang on what else the memory holds.
TOKENS = 2048
# A code on the CPU, which tokens of the rows [rows, context] it is of, and the number of the first row.
Take = Callable[[SparseCode, Tensor, int], Any]


@without_autocast
@torch.no_grad()
def watch(
    model: nn.Module, text: MarkedText, subjects: Sequence[Subject], takers: Sequence[Sequence[Take]], start: int
) -> int:
    """One forward from row ``start`` of ``text`` on, of as many rows as a forward has whatever the SAEs: each code goes
    to the ``takers`` of its SAE. Returns the row that is next.

    The text model alone runs, no further than the deepest site; no activation is kept. What is no text, special tokens
    and padding, is not encoded. Raises EnvironmentProblemError for activations that are not finite, and as `Tap`.
    """
    rows = slice(start, min(start + max(1, TOKENS // text.tokens.shape[1]), len(text.tokens)))
    counted = text.is_text[rows].cpu()
    flat = counted.flatten()
    of_site: dict[Site, list[int]] = {}
    for number, subject in enumerate(subjects):
        of_site.setdefault(subject.reads, []).append(number)

    def take(site: Site, x: Tensor) -> None:
        kept = x.flatten(0, 1)[flat.to(x.device)]
        for number in of_site[site]:
            sae: Any = subjects[number].sae
            code = encoded(sae, kept.to(sae.W_dec)).to("cpu")
            if not bool(code.values.isfinite().all()):
                raise EnvironmentProblemError(
                    f"{subjects[number].name}: expected finite activations, found NaN or Inf in rows {rows.start} to "
                    f"{rows.stop - 1}"
                )
            for each in takers[number]:
                each(code, counted, rows.start)

    with evaluating(model), eagerly(model), Tap(model, of_site, take) as tap:
        tap.text_model(**forward_arguments(text.tokens[rows], None, input_device(model)))
    return rows.stop
