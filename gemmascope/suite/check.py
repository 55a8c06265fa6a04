"""`gemmascope check`: does this SAE fit this model here? The model runs on some text, and the SAE is judged on it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..activations import Activations, harvest, read_documents
from ..activations.packing import as_encoder
from ..activations.python_docs import python_documentation
from ..checks import check_int, check_type
from ..evaluation.diagnosis import Diagnosis, Finding, diagnose
from ..evaluation.fit import (
    SURVEY_TOKENS,
    Beginnings,
    Rounding,
    Survey,
    compare_beginnings,
    measure_rounding,
    survey,
)
from ..formats.files import as_path, shown
from ..saes import JumpReLUSAE, SparseAutoencoder, TopKSAE
from ..saes.load import load_named
from ..sites import Site, special_token_ids
from ..sites.decoder import find_decoder
from ..sites.site import as_site
from ..training.memory import available_memory
from .config import ModelSection
from .excerpts import Excerpts
from .machine import host_memory
from .model import Loaded, as_device, load_model
from .prepare import say
from .selection import listing
from .stated import Stated, stated_of

TOKENS, LARGEST_TOKENS = 4096, 1 << 20
CONTEXT = 256
# Texts whose beginnings are compared with and without BOS, and tokens of each.
BEGINNINGS, BEGINNING_TOKENS = 256, 8
# Of one forward.
FORWARD_TOKENS = 4096


@dataclass(frozen=True)
class CheckConfig:
    """sae: a file or folder, or OWNER/NAME/PATH on the hub. text: patterns of UTF-8 files, by default Python's own
    documentation. site: where the SAE is to be used, by default the one that it states. bos: whether the model is given
    texts with a BOS before them. tokens: of text. context: tokens of a row, fewer where the model takes no more.

    Raises ValueError and TypeError naming the setting that is wrong.
    """

    sae: str | os.PathLike
    model: ModelSection
    text: Sequence[str | os.PathLike] = ()
    site: Site | str | None = None
    bos: bool = True
    tokens: int = TOKENS
    context: int = CONTEXT
    device: str = "auto"

    def __post_init__(self):
        as_path("sae", self.sae)
        check_type("model", self.model, ModelSection)
        if isinstance(self.text, (str, bytes)) or not isinstance(self.text, Sequence):
            raise TypeError(f"text: expected a list of paths or globs, got {type(self.text).__name__}")
        if self.site is not None:
            as_site(self.site)
        check_type("bos", self.bos, bool)
        check_int("tokens", self.tokens, SURVEY_TOKENS, LARGEST_TOKENS)
        check_int("context", self.context, 2 * BEGINNING_TOKENS)
        check_type("device", self.device, str)


def check_sae(config: CheckConfig) -> Diagnosis:
    """Load the SAE, the model and the text of ``config``, run the model on the text, and say whether the SAE fits.

    Raises what `load_sae`, `load_model` and `read_documents` do; ValueError for a site that the model does not
    have, too little text and a BOS that the model does not know as one.
    """
    check_type("config", config, CheckConfig)
    device = as_device(config.device)
    sae, path = load(config.sae)
    loaded = load_model(config.model, device)
    excerpts = read_excerpts(config, loaded)
    return check_loaded(sae.to(device), stated_of(path, sae.metadata), loaded, excerpts, config)


def load(sae: str | os.PathLike) -> tuple[JumpReLUSAE | TopKSAE, str]:
    """The SAE, and the path by whose names it may state its site."""
    return load_named(sae), os.path.abspath(sae) if os.path.lexists(sae) else os.fspath(sae)


def read_excerpts(config: CheckConfig, loaded: Loaded) -> Excerpts:
    encoder, skipped = as_encoder(loaded.tokenizer), special_token_ids(loaded.model)
    if encoder.bos not in skipped:
        raise ValueError(
            f"model: expected a config whose bos_token_id is that of the tokenizer, {encoder.bos}, got {list(skipped)}"
        )
    documents = read_documents(list(config.text)) if config.text else python_documentation()
    return Excerpts.of(documents, encoder, skipped, config.tokens)


def check_loaded(
    sae: SparseAutoencoder, stated: Stated, loaded: Loaded, excerpts: Excerpts, config: CheckConfig
) -> Diagnosis:
    """The same of what is loaded already; ``stated`` is what the SAE says of itself."""
    site = stated.site if config.site is None else as_site(config.site)
    facts = {"d_model": sae.d_model, "d_sae": sae.d_sae, "model": loaded.name, "bos": config.bos}
    candidates = [each for each in loaded.sites if loaded.width(each) == sae.d_model]
    if config.site is not None and site is not None:
        loaded.width(site)  # refuses one that the model does not have
    findings = [_model(stated, loaded), width_finding(sae.d_model, loaded, site, candidates)]
    if findings[-1].status == "wrong":
        return Diagnosis(tuple(findings), facts)

    run = _Run(loaded.model, excerpts, config)
    first, rest = run.rows.split_with_sizes([run.rows_of_survey, len(run.rows) - run.rows_of_survey])
    say(f"{loaded.name}: {first.numel():,} tokens at {len(candidates)} sites, {run.rows.numel():,} at one")
    activations = run.activations(first, candidates)
    found = survey(sae, activations, site, stated.average_l0)
    here = activations[found.site]
    del activations
    diagnosis = diagnose(
        sae,
        found,
        torch.cat([here, run.activations(rest, [found.site])[found.site]]) if len(rest) else here,
        average_l0=stated.average_l0,
        bos=config.bos,
        beginnings=run.beginnings(sae, found),
        rounding=run.rounding(sae, found.site, first, here),
        dtype=run.dtype,
    )
    findings += _tokenizer(loaded, excerpts, config)
    return Diagnosis((*findings, *diagnosis.findings), {**facts, **diagnosis.figures})


class _Run:
    """The model on the text."""

    def __init__(self, model: nn.Module, excerpts: Excerpts, config: CheckConfig):
        self.model, self.excerpts = model, excerpts
        most = getattr(find_decoder(model).config, "max_position_embeddings", None)
        context = config.context if most is None else min(config.context, most)
        self.rows = excerpts.rows(context, config.tokens, bos=config.bos)
        self.rows_of_survey = min(len(self.rows), -(-SURVEY_TOKENS // (context - 1)))
        self.dtype = next(model.parameters()).dtype

    def activations(self, rows: Tensor, sites: Sequence[Site]) -> Activations:
        return harvest(self.model, rows, sites, batch_size=max(1, FORWARD_TOKENS // rows.shape[1]))

    def beginnings(self, sae: SparseAutoencoder, found: Survey) -> Beginnings | None:
        """None where no two documents are long enough."""
        rows = self.excerpts.beginnings(BEGINNINGS, BEGINNING_TOKENS)
        if len(rows) < 2:
            return None
        site, factor = found.best
        bos = torch.full_like(rows[:, :1], self.excerpts.bos)
        given = (torch.cat([bos, rows], 1), rows)
        with_bos, without = (self.activations(each, [site])[site].view(*rows.shape, -1) for each in given)
        return compare_beginnings(sae, with_bos, without, factor)

    def rounding(self, sae: SparseAutoencoder, site: Site, rows: Tensor, activations: Tensor) -> Rounding | None:
        """None for a model in float32, and where there is no memory for one."""
        if self.dtype.itemsize >= 4 or not _has_room(self.model):
            return None
        with _in_float32(self.model):
            exact = self.activations(rows, [site])[site]
        return measure_rounding(sae, activations, exact)


def _has_room(model: nn.Module) -> bool:
    """Whether the weights fit a second time, in float32."""
    parameters = list(model.parameters())
    device = parameters[0].device
    free = host_memory() if device.type == "cpu" else available_memory(device)
    return free is not None and 4 * sum(p.numel() for p in parameters) < free


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """The same weights in float32; afterwards those that were there."""
    weights = {parameter: parameter.data for parameter in model.parameters()}
    try:
        for parameter, data in weights.items():
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in weights.items():
            parameter.data = data


# ---- findings about the model


def _model(stated: Stated, loaded: Loaded) -> Finding:
    if stated.model is None:
        return Finding("model", "ok", f"{loaded.name}; the SAE does not say which it is of")
    if stated.model.rpartition("/")[2] == loaded.name.rpartition("/")[2]:
        return Finding("model", "ok", f"{loaded.name}, as the SAE says")
    return Finding("model", "note", f"{loaded.name}; the SAE says that it is of {shown(stated.model)}")


def width_finding(d_model: int, loaded: Loaded, site: Site | None, candidates: Sequence[Site]) -> Finding:
    """Whether an SAE of that width has a place in the model: ``site``, or any of ``candidates``, the sites of it."""
    if site is not None and site not in loaded.sites:
        return Finding("width", "wrong", f"the SAE says that it is of {site}, the model has {listing(loaded.sites)}")
    at_site = None if site is None else loaded.width(site)
    if at_site is not None and at_site != d_model:
        fitting = f"; {listing(candidates)} would fit" if candidates else ""
        return Finding("width", "wrong", f"d_model of the SAE is {d_model}, {site} is {at_site} wide{fitting}")
    if not candidates:
        widths = sorted({loaded.width(each) for each in loaded.sites})
        found = " or ".join(map(str, widths))
        return Finding("width", "wrong", f"d_model of the SAE is {d_model}, every site of the model is {found} wide")
    return Finding("width", "ok", f"{d_model}, that of {len(candidates)} of {len(loaded.sites)} sites of the model")


def _tokenizer(loaded: Loaded, excerpts: Excerpts, config: CheckConfig) -> list[Finding]:
    """A note where the tokenizer, called as usual, does not give what the check gave the model."""
    puts_bos = loaded.tokenizer("a")["input_ids"][:1] == [excerpts.bos]
    if puts_bos == config.bos:
        return []
    what = "does not put a BOS before a text by itself" if config.bos else "puts a BOS before every text by itself"
    return [Finding("tokenizer", "note", f"{what}, which the check {'did' if config.bos else 'left out'}")]
