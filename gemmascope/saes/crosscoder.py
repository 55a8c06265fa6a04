"""`Crosscoder`: one set of latents for several sites, an SAE on their activations side by side."""

import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_device, check_floating, check_int, check_number, check_type
from ..errors import BadFileError
from ..formats import hook_names, release
from ..formats.files import shown
from ..kernels import SparseCode
from .base import BaseSAE
from .load import load_sae

SCALES = ("mean_square", "variance")
KEY = "crosscoder"


@dataclass(frozen=True)
class SideBySide:
    """Activations of several sites as one: each divided by its scale, one behind the other.

    sites: their names, in order. Where they are hook points that have a layer, layers do not descend. widths: of their
    activations, which may differ. scales: what each is divided by. Raises ValueError or TypeError on bad values.
    """

    sites: tuple[str, ...]
    widths: tuple[int, ...]
    scales: tuple[float, ...]

    def __post_init__(self):
        for name in ("sites", "widths", "scales"):
            check_type(name, getattr(self, name), tuple)
        if not self.sites:
            raise ValueError("sites: expected at least one, got none")
        for name in ("widths", "scales"):
            if len(getattr(self, name)) != len(self.sites):
                raise ValueError(f"{name}: expected one for each of {len(self.sites)} sites, got {getattr(self, name)}")
        for index, (site, width, scale) in enumerate(zip(self.sites, self.widths, self.scales, strict=True)):
            check_type(f"sites[{index}]", site, str)
            check_int(f"widths[{index}]", width, 1)
            check_number(f"scales[{index}]", scale, 0, open_low=True)
        if len(set(self.sites)) != len(self.sites):
            raise ValueError(f"sites: expected each once, got {', '.join(self.sites)}")
        layers = [found[0] for found in map(hook_names.split, self.sites) if found]
        for before, after in itertools.pairwise(layers):
            if before > after:
                raise ValueError(f"sites: expected layers that ascend, got layer {after} behind layer {before}")

    @classmethod
    def of(cls, samples: Mapping[Any, Tensor], scale_by: str = "mean_square") -> Self:
        """That of ``samples``, {site: [n ≥ 1, width]}, in their order. A site is its name, or has one as ``name``.

        scale_by: after division by its scale the mean squared norm of a site is 1, or its variance, as the C of an SAE
        is set. So every site counts the same in the loss. Raises ValueError or TypeError for samples that set no scale.
        """
        check_choice("scale_by", scale_by, SCALES)
        named, scales = _named("samples", samples), []
        for site, x in named.items():
            where = f"samples[{site!r}]"
            if x.ndim != 2 or 0 in x.shape:
                raise ValueError(f"{where}: expected shape [n ≥ 1, width ≥ 1], got {list(x.shape)}")
            mean = x.mean(0, dtype=torch.float64) if scale_by == "variance" else 0
            square = sum((chunk.double() - mean).square().sum().item() for chunk in x.split(4096)) / len(x)
            if not (math.isfinite(square) and square > 0):
                raise ValueError(
                    f"{where}: expected finite activations that are not all alike or 0, got a {scale_by} of {square}"
                )
            scales.append(math.sqrt(square))
        return cls(tuple(named), tuple(x.shape[1] for x in named.values()), tuple(scales))

    @property
    def width(self) -> int:
        return sum(self.widths)

    def join(self, activations: Mapping[Any, Tensor]) -> Tensor:
        """[..., Σ width] of {site: [..., width]}, fp32, or fp64 where one of them is. Other sites are left out.

        Raises ValueError for a site that is missing, another width and another number of tokens; TypeError for what are
        no floats.
        """
        named, parts = _named("activations", activations), []
        for site, width, scale in zip(self.sites, self.widths, self.scales, strict=True):
            x = named.get(site)
            if x is None:
                raise ValueError(f"activations: expected the sites {', '.join(self.sites)}, found none of {site}")
            where = f"activations[{site!r}]"
            if x.ndim == 0 or x.shape[-1] != width:
                raise ValueError(f"{where}: expected shape [..., {width}], got {list(x.shape)}")
            if parts and x.shape[:-1] != parts[0].shape[:-1]:
                tokens, got = list(parts[0].shape[:-1]), list(x.shape[:-1])
                raise ValueError(f"{where}: expected the tokens of {self.sites[0]}, {tokens}, got {got}")
            parts.append(x.to(torch.promote_types(x.dtype, torch.float32)) / scale)
        return torch.cat(parts, -1)

    def split(self, joined: Tensor) -> dict[str, Tensor]:
        """What `join` takes, of what it gives."""
        check_floating("joined", joined)
        if joined.ndim == 0 or joined.shape[-1] != self.width:
            raise ValueError(f"joined: expected shape [..., {self.width}], got {list(joined.shape)}")
        parts = zip(joined.split(self.widths, -1), self.scales, strict=True)
        return {site: part * scale for site, (part, scale) in zip(self.sites, parts, strict=True)}

    def columns(self, site: Any) -> slice:
        """Where a site lies. Raises ValueError for one that is not among them."""
        name = _name("site", site)
        if name not in self.sites:
            raise ValueError(f"site: expected one of {', '.join(self.sites)}, got {name}")
        index = self.sites.index(name)
        start = sum(self.widths[:index])
        return slice(start, start + self.widths[index])

    def facts(self) -> dict[str, list]:
        """For JSON; `from_facts` gives it back to the same bits."""
        return {"sites": list(self.sites), "widths": list(self.widths), "scales": list(self.scales)}

    @classmethod
    def from_facts(cls, facts: Any) -> Self:
        """Raises ValueError or TypeError for others."""
        check_type("facts", facts, Mapping)
        if facts.keys() != {"sites", "widths", "scales"}:
            raise ValueError(f"facts: expected sites, widths and scales, got {', '.join(map(str, facts)) or 'nothing'}")
        for name, value in facts.items():
            check_type(name, value, list)
        return cls(*(tuple(facts[name]) for name in ("sites", "widths", "scales")))


class Crosscoder(nn.Module):
    r"""Acausal crosscoder ("Sparse Crosscoders", transformer-circuits.pub 2024): latents that read all of several sites
    and write to all of them.

        z = Σ_s (x_s/C_s)·W_enc^s + b_enc;   f by the kind of the SAE;   x̂_s = C_s·(f·W_dec^s + b_dec^s)
        L = mean Σ_s ‖x_s/C_s − x̂_s/C_s‖² + S

    It is the SAE ``sae`` on the sites side by side, `SideBySide.join`, of any kind, folded or in training: `SAETrainer`
    trains it on joined batches as any other. Rows of W_dec have unit norm over all sites together, so that an L1
    penalty weighs a latent by √(Σ_s ‖W_dec^s‖²), 1, and not by Σ_s ‖W_dec^s‖ as the source does.

    sae: an SAE with d_model = Σ width of ``of``. Raises TypeError or ValueError for others.
    """

    def __init__(self, sae: BaseSAE, of: SideBySide):
        super().__init__()
        check_type("sae", sae, BaseSAE)
        check_type("of", of, SideBySide)
        if sae.d_model != of.width:
            sizes = " + ".join(map(str, of.widths))
            raise ValueError(f"sae: expected one on activations {sizes} = {of.width} wide, got {sae.d_model}")
        self.sae, self.of = sae, of

    @property
    def sites(self) -> tuple[str, ...]:
        return self.of.sites

    @property
    def d_sae(self) -> int:
        return self.sae.d_sae

    def extra_repr(self) -> str:
        return ", ".join(f"{site} [{width}]" for site, width in zip(self.of.sites, self.of.widths, strict=True))

    def _joined(self, activations: Mapping[Any, Tensor]) -> Tensor:
        return self.of.join(activations).to(self.sae.W_dec)

    def encode(self, activations: Mapping[Any, Tensor]) -> Tensor:
        """Dense activations f [..., d_sae] of {site: [..., width]}. Differentiable."""
        return self.sae.encode(self._joined(activations))

    def encode_sparse(self, activations: Mapping[Any, Tensor]) -> SparseCode:
        """Active latents of the tokens, flattened to N rows. Not differentiable."""
        return self.sae.encode_sparse(self._joined(activations))

    def decode(self, f: Tensor | SparseCode) -> dict[str, Tensor]:
        """{site: x̂ [..., width]} of dense activations [..., d_sae], or [N, width] of a `SparseCode`."""
        return self.of.split(self.sae.decode(f))

    def forward(self, activations: Mapping[Any, Tensor]) -> dict[str, Tensor]:
        """The reconstruction {site: x̂ [..., width]} of {site: [..., width]}, in their dtypes. Differentiable."""
        found, named = self.of.split(self.sae(self._joined(activations))), _named("activations", activations)
        return {site: x_hat.to(named[site].dtype) for site, x_hat in found.items()}

    def encoder(self, site: Any) -> Tensor:
        """W_enc^s, a view [width, d_sae] of the part that reads x_s/C_s."""
        return self.sae.W_enc[self.of.columns(site)]

    def decoder(self, site: Any) -> Tensor:
        """W_dec^s, a view [d_sae, width] of the part that writes x̂_s/C_s."""
        return self.sae.W_dec[:, self.of.columns(site)]

    @torch.no_grad()
    def decoder_norms(self) -> Tensor:
        """‖W_dec^s‖ of each site and latent, [sites, d_sae]: in which sites a latent is."""
        return torch.stack([part.norm(dim=1) for part in self.sae.W_dec.split(self.of.widths, 1)])

    def save(self, path: str | os.PathLike) -> None:
        """Write a folder of ``params.safetensors``, those of the SAE, and ``config.json``, whose metadata hold sites,
        widths and scales under ``crosscoder``. `load` reads it to the same bits. See `formats.release.write`."""
        tensors, config = self.sae.stored()
        metadata = {**(config.metadata or {}), KEY: self.of.facts()}
        if os.fspath(path).endswith(".npz"):
            raise ValueError(f"path: expected a folder, got {shown(path)}")
        release.write(path, tensors, config._replace(metadata=metadata))

    @classmethod
    def load(
        cls, path: str | os.PathLike, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Read what `save` wrote. device, dtype: as for `JumpReLUSAE.load`. Raises BadFileError for all that this
        refuses and for an SAE that is no crosscoder."""
        sae = load_sae(path, device=check_device("device", "cpu" if device is None else device), dtype=dtype)
        facts = sae.metadata.pop(KEY, None)
        if facts is None:
            raise BadFileError(f"{shown(path)}: expected a crosscoder, found an SAE of one site")
        try:
            return cls(sae, SideBySide.from_facts(facts))
        except (TypeError, ValueError) as error:
            raise BadFileError(f"{shown(path)}: metadata: {KEY}: {error}") from error


def _name(where: str, site: Any) -> str:
    name = site if isinstance(site, str) else getattr(site, "name", None)
    if not isinstance(name, str):
        raise TypeError(f"{where}: expected a name or a Site, got {type(site).__name__}")
    return hook_names.hugging_face(name) or name


def _named(where: str, values: Any) -> dict[str, Tensor]:
    if not isinstance(values, Mapping):
        raise TypeError(f"{where}: expected a dict by site, got {type(values).__name__}")
    found: dict[str, Tensor] = {}
    for site, x in values.items():
        name = _name(f"{where}: key", site)
        if name in found:
            raise ValueError(f"{where}: expected each site once, got {name} under several names")
        check_floating(f"{where}[{name!r}]", x)
        found[name] = x
    return found
