"""`gemmascope export` and `gemmascope import`: SAEs out to the formats of others, and in from them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checks import check_choice
from ..errors import EnvironmentProblemError
from ..formats import export, hook_names
from ..formats.export import FORMATS
from ..formats.files import as_path, flush_folder, shown, staging
from ..formats.manifest import SAEConfig
from ..formats.release import WIDTH_NAMES
from ..formats.writers import l0_of, text_of
from ..reporting.card import Entry, card
from ..saes import JumpReLUSAE, TopKSAE, Transcoder
from ..saes.base import BaseSAE
from .sources import Source, expand, load

CARD = "README.md"
# Folders of Gemma Scope 2 by our kinds of sites.
OF_GEMMA_SCOPE_2 = {"resid": "resid_post", "mlp": "mlp_out", "att": "attn_out"}


class Exported(NamedTuple):
    """What `export_saes` wrote: ``folder``, and an `Entry` for each SAE in it."""

    folder: Path
    entries: list[Entry]


def export_saes(
    sources: Sequence[str | os.PathLike], format: str, out: str | os.PathLike, *, dtype: torch.dtype | None = None
) -> Exported:
    """Write SAEs and transcoders to the new folder ``out`` in a format of `formats.export.FORMATS`, with a README.md.

    sources: each a file or folder of an SAE or a transcoder that is read here, OWNER/NAME/PATH of an SAE on the hub, a
    folder of circuit-tracer (all of its layers), or that of a finished run (all of its SAEs, with their figures). One
    SAE is written into ``out`` itself, several into a folder each, named by site, layer, width and L0 as far as these
    are known; transcoders for circuit-tracer into one folder. dtype: the weights are cast to it first. See
    `formats.export.write` for what the formats hold.

    ``out`` is there whole or not at all. Raises ValueError or TypeError for what the format cannot hold and for an
    ``out`` that is not new or empty; BadFileError for sources that cannot be read; EnvironmentProblemError when the
    files cannot be written.
    """
    check_choice("format", format, FORMATS)
    if isinstance(sources, (str, os.PathLike)) or not isinstance(sources, Sequence):
        raise TypeError(f"sources: expected a list of paths, got {type(sources).__name__}")
    out = as_path("out", out)
    runs: list[Mapping[str, Any]] = []
    found: list[Source] = []
    for path in sources:
        of_path: dict[Path, Mapping[str, Any]] = {}
        found += expand(path, of_path)
        runs += of_path.values()
    if not found:
        raise ValueError("sources: expected at least one SAE, got none")
    make_way(out)
    with staging(out) as stage:
        root = stage / "exported"
        root.mkdir()
        entries, model = _write_all(found, format, root, dtype)
        results = runs[0] if len(runs) == 1 else None
        if results is not None and isinstance(results["model"].get("name"), str):
            model = model or results["model"]["name"]
        (root / CARD).write_text(card(format, entries, model, results), encoding="utf-8")
        os.rename(root, out)
        flush_folder(out.parent)
    return Exported(out, entries)


def import_sae(
    source: str | os.PathLike, out: str | os.PathLike, *, dtype: torch.dtype | None = None
) -> JumpReLUSAE | TopKSAE | Transcoder:
    """Read an SAE or a transcoder of any format that is read here and save it to the new folder ``out``; returns it.

    source: a file or folder, or OWNER/NAME/PATH of an SAE on the hub. An SAE becomes a folder of ours, a transcoder one
    of Gemma Scope 2's layout. dtype: None keeps that of the file. Raises as `export_saes`.
    """
    as_path("source", source)
    out = as_path("out", out)
    if out.suffix in (".npz", ".safetensors"):
        raise ValueError(f"out: expected the name of a folder, got {shown(out)}")
    sae = load(source, dtype)
    make_way(out)
    sae.save(out)
    return sae


def make_way(out: Path) -> None:
    """Raise ValueError unless ``out`` is new, or an empty folder, which is removed."""
    try:
        if not os.path.lexists(out):
            return
        problem = "a file" if not out.is_dir() or out.is_symlink() else "one with files" if any(out.iterdir()) else None
        if problem is None:
            out.rmdir()
    except OSError as error:
        raise EnvironmentProblemError(f"{shown(out)}: cannot be made: {error.strerror}") from error
    if problem is not None:
        raise ValueError(f"out: expected a new or empty folder, got {problem}: {shown(out)}")


# ---- writing


def _write_all(
    sources: Sequence[Source], format: str, root: Path, dtype: torch.dtype | None
) -> tuple[list[Entry], str | None]:
    """Write each into its folder under ``root``, one in memory at a time; and the model that the first names."""
    entries, models, taken, layers = [], [], set(), {}
    for source in sources:
        sae = source.load()
        tensors, config = sae.stored()
        metadata = config.metadata or {}
        if format == "circuit-tracer" or len(sources) == 1:
            folder = ""
        else:
            as_kind = sae.kind if isinstance(sae, BaseSAE) else "jumprelu"
            folder = _free(_name_of(format, config, as_kind, tensors["W_enc"].shape[1], len(entries) + 1), taken)
        if format == "circuit-tracer":
            _check_layer(layers, metadata.get("layer"), tensors, source.path)
        changes = export.write(format, tensors, config, root / folder, dtype=dtype)
        site = text_of(metadata, "site")
        d_in, d_sae = tensors["W_enc"].shape
        names = (site, hook_names.transformer_lens(site))
        entries.append(Entry(folder, type(sae).__name__, *names, d_in, d_sae, changes, source.row))
        models.append(text_of(metadata, "model"))
    if layers and sorted(layers) != list(range(len(layers))):
        found = ", ".join(map(str, sorted(layers)))
        raise ValueError(f"sources: expected transcoders of all layers from 0 for circuit-tracer, got {found}")
    return entries, next(filter(None, models), None)


def _check_layer(layers: dict[Any, tuple], layer: Any, tensors: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Add a layer of a set of circuit-tracer to ``layers``, or raise ValueError for one that does not fit in."""
    if type(layer) is not int:  # which `export.write` refuses
        return
    shape = (*tensors["W_enc"].shape, export.SKIP in tensors)
    if layer in layers:
        raise ValueError(f"sources: expected one transcoder a layer, got two of layer {layer}: {shown(path)}")
    if layers and shape != next(iter(layers.values())):
        raise ValueError(
            f"sources: expected transcoders of one shape, with or without skip, got another: {shown(path)}"
        )
    layers[layer] = shape


def _name_of(format: str, config: SAEConfig, as_kind: str, d_sae: int, number: int) -> str:
    """The folder of one of several, by what its metadata says; numbered where they do not say site and layer. as_kind:
    that of the SAE, which is named where it is none of Gemma Scope's."""
    metadata = config.metadata or {}
    found = hook_names.split(metadata.get("site"))
    if found is None:
        return f"sae_{number}"
    layer, kind = found[0], hook_names.KINDS[found[1]]
    l0 = l0_of(metadata)
    rounded = round(l0) if isinstance(l0, (int, float)) else None
    width = f"width_{WIDTH_NAMES.get(d_sae, d_sae)}"
    if as_kind != "jumprelu":
        width += f"/{as_kind}" if format == "gemma-scope" else f"_{as_kind}"
    if format == "gemma-scope":
        return f"{kind}/layer_{layer}/{width}" + ("" if rounded is None else f"/average_l0_{rounded}")
    kind = OF_GEMMA_SCOPE_2.get(kind, kind) if format == "gemma-scope-2" else kind
    return f"{kind}/layer_{layer}_{width}" + ("" if rounded is None else f"_l0_{rounded}")


def _free(name: str, taken: set[str]) -> str:
    """``name``, or the first of those numbered after it that is not ``taken``, where it is put."""
    free, number = name, 2
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    taken.add(free)
    return free
