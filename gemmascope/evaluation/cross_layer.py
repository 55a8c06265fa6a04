"""How well crosscoders and cross-layer transcoders do on held-out activations, site by site."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..activations.moments import check_activations
from ..checks import check_type
from ..kernels import SparseCode
from ..saes import Crosscoder, CrossLayerTranscoder
from .variance import Fidelity, fidelity

# Tokens that are encoded at a time.
TOKENS = 1024


@dataclass(frozen=True, eq=False)
class CLTMetrics:
    """What `evaluate_clt` found. Lists are by layer."""

    tokens: int
    l0: list[float]
    """Latents of the layer that fire on a token, on average."""
    fvu: list[float]
    """Fraction of variance unexplained of the layer's output; NaN where that does not vary."""
    median_fvu: list[float]
    """Of the median token."""
    dead_fraction: list[float]
    """Share of the layer's latents that never fired here."""


@dataclass(frozen=True, eq=False)
class CrosscoderMetrics:
    """What `evaluate_crosscoder` found."""

    tokens: int
    l0: float
    fvu: dict[str, float]
    """Fraction of variance unexplained at each site; NaN where it does not vary."""
    median_fvu: dict[str, float]
    """Of the median token."""
    dead_fraction: float


@torch.no_grad()
def evaluate_clt(clt: CrossLayerTranscoder, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> CLTMetrics:
    """Sparsity and fidelity of a CLT: inputs [n, d_in] and targets [n, d_out] of each layer, row i of all the same
    token, floats of any precision on any device. The outputs of all layers are kept, on the device of the weights.

    Raises TypeError or ValueError for what is no CLT, no list of float matrices, another width or number of tokens, no
    rows, NaN and Inf.
    """
    check_type("clt", clt, CrossLayerTranscoder)
    widths = {"inputs": [source.d_in for source in clt.sources], "targets": clt.d_out}
    for name, given in (("inputs", inputs), ("targets", targets)):
        if isinstance(given, Tensor) or not isinstance(given, Sequence):
            raise TypeError(f"{name}: expected a list of activations, one for each layer, got {type(given).__name__}")
        if len(given) != clt.n_layers:
            raise ValueError(f"{name}: expected activations of {clt.n_layers} layers, got {len(given)}")
        for number, (x, width) in enumerate(zip(given, widths[name], strict=True)):
            check_activations(f"{name}[{number}]", x, width)
            if len(x) != len(inputs[0]):
                raise ValueError(f"{name}[{number}]: expected the {len(inputs[0])} tokens of layer 0, got {len(x)}")
    n, like = len(inputs[0]), clt.sources[0].W_dec
    fired = [torch.zeros(source.d_sae, dtype=torch.int64, device=like.device) for source in clt.sources]
    outputs: list[list[Tensor]] = []
    for start in range(0, n, TOKENS):
        xs = [x[start : start + TOKENS].to(like) for x in inputs]
        codes = clt.encode_sparse(xs)
        for count, code in zip(fired, codes, strict=True):
            count += code.firing_count()
        outputs.append(clt.decode(codes, xs))
    y_hat = [torch.cat(of_layer) for of_layer in zip(*outputs, strict=True)]
    found = [_fidelity(f"targets[{number}]", y, y_hat[number]) for number, y in enumerate(targets)]
    return CLTMetrics(
        tokens=n,
        l0=[count.sum().item() / n for count in fired],
        fvu=[each.fvu for each in found],
        median_fvu=[each.median_fvu for each in found],
        dead_fraction=[(count == 0).double().mean().item() for count in fired],
    )


@torch.no_grad()
def evaluate_crosscoder(crosscoder: Crosscoder, activations: Mapping[Any, Tensor]) -> CrosscoderMetrics:
    """Sparsity and fidelity of a crosscoder on {site: [n, width]}, row i of all the same token, floats of any
    precision. The reconstructions of all sites are kept, on the device of the weights.

    Raises TypeError or ValueError for what is no crosscoder, no float matrices by site, a site that is missing, no
    rows, NaN and Inf.
    """
    check_type("crosscoder", crosscoder, Crosscoder)
    joined = crosscoder.of.join(activations)
    check_activations("activations", joined, crosscoder.of.width)
    n, device = len(joined), crosscoder.sae.W_dec.device
    fired = torch.zeros(crosscoder.d_sae, dtype=torch.int64, device=device)
    reconstructions: list[dict[str, Tensor]] = []
    for rows in joined.split(TOKENS):
        code: SparseCode = crosscoder.sae.encode_sparse(rows.to(crosscoder.sae.W_dec))
        fired += code.firing_count()
        reconstructions.append(crosscoder.decode(code))
    found = {}
    for site, x in crosscoder.of.split(joined).items():
        x_hat = torch.cat([each[site] for each in reconstructions])
        found[site] = _fidelity(f"activations[{site!r}]", x, x_hat)
    return CrosscoderMetrics(
        tokens=n,
        l0=fired.sum().item() / n,
        fvu={site: each.fvu for site, each in found.items()},
        median_fvu={site: each.median_fvu for site, each in found.items()},
        dead_fraction=(fired == 0).double().mean().item(),
    )


def _fidelity(name: str, x: Tensor, x_hat: Tensor) -> Fidelity:
    return fidelity(name, x, lambda rows, start: x_hat[start : start + len(rows)].to(rows.device))
