"""`LogitLens`: the tokens whose logits a direction raises and lowers, as if nothing came between it and the logits."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..autocast import without_autocast
from ..checks import check_int
from ..errors import EnvironmentProblemError
from ..sites import INPUT_KINDS, Site
from ..sites.decoder import find_decoder
from .largest import LargestOf

LATENTS, TOKENS = 1024, 16384  # of a block of logits


class Logits(NamedTuple):
    """As in `table.LatentTable`."""

    promoted: Tensor
    promoted_logit: Tensor
    suppressed: Tensor
    suppressed_logit: Tensor


class LogitLens:
    """Logits of directions d [n, width] at a site: (d ⊙ g)·W_Uᵀ in fp32, with the gain g = 1 + w of the final norm and
    the unembedding W_U [tokens, hidden_size] (nostalgebraist's logit lens, of a direction).

    At ``att`` d goes through W_O and the gain of the norm behind it first. What is left out is one positive factor a
    token, the norms' divisors, and the final soft-cap, which keeps the order. tokens: how many of the vocabulary count,
    by default all. Raises TypeError or ValueError for a model without logits.
    """

    def __init__(self, model: nn.Module, tokens: int | None = None):
        decoder = find_decoder(model)
        head = getattr(cast(Any, model).get_output_embeddings(), "weight", None)
        if not isinstance(head, Tensor):
            raise ValueError(f"model: expected one with logits, got {type(model).__name__}")
        if tokens is not None:
            check_int("tokens", tokens, 1, len(head))
        self._head = head.detach()[:tokens]
        self._layers = decoder.layers
        self._gain = 1 + cast(Any, decoder.text_model).norm.weight.detach().float()

    @property
    def tokens(self) -> int:
        """How many count."""
        return len(self._head)

    def residual(self, site: Site, directions: Tensor) -> Tensor | None:
        """What ``directions`` [n, width] of a site add to the residual stream, fp32 [n, hidden_size], up to a factor;
        None at a site from which they only get there through the MLP."""
        if site.kind in INPUT_KINDS:
            return None
        directions = directions.float()
        if site.kind != "att":
            return directions
        layer = cast(Any, self._layers[site.layer])
        weight = layer.self_attn.o_proj.weight.detach().float()
        gain = 1 + layer.post_attention_layernorm.weight.detach().float()
        return (directions.to(weight.device) @ weight.T) * gain

    @without_autocast
    @torch.no_grad()
    def extremes(
        self, site: Site, directions: Tensor, k: int, check: Callable[[int], None] = lambda done: None
    ) -> Logits:
        """The ``k`` tokens with the largest and the smallest logits, of equals the smaller token first. check: called
        with the number of directions done.

        Raises EnvironmentProblemError for logits that are not finite.
        """
        parts: list[Logits] = []
        for start in range(0, len(directions), LATENTS):
            parts.append(self._extremes(site, directions[start : start + LATENTS], k))
            check(min(start + LATENTS, len(directions)))
        return Logits(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _extremes(self, site: Site, directions: Tensor, k: int) -> Logits:
        stream, device = self.residual(site, directions), self._head.device
        largest, smallest = LargestOf(len(directions), k, device), LargestOf(len(directions), k, device)
        if stream is not None:
            scaled = stream.to(device) * self._gain.to(device)
            for first in range(0, self.tokens, TOKENS):
                logits = scaled @ self._head[first : first + TOKENS].float().T
                if not bool(logits.isfinite().all()):
                    raise EnvironmentProblemError(f"site {site}: expected finite logits, found NaN or Inf")
                largest.add(logits, first)
                smallest.add(logits.neg_(), first)
        raised, promoted = largest.found()
        lowered, suppressed = smallest.found()
        return Logits(promoted, raised, suppressed, -lowered)
