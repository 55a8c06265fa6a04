"""What `gemmascope evaluate` works with: the model, the text in two parts, and the SAEs in their places."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..activations import OUTLIER_RATIO, TokenRows, read_documents, sample_rows, tokenise
from ..activations.packing import as_encoder, tokenizer_hash
from ..activations.python_docs import python_documentation
from ..checks import check_choice, check_int, check_number, check_type
from ..errors import BadFileError
from ..evaluation.bootstrap import DRAWS
from ..evaluation.protocol import Subject
from ..evaluation.suite import recipe_of
from ..evaluation.token_sets import MarkedText
from ..formats.differences import differences
from ..formats.files import as_path, read_json, shown
from ..kernels import dispatch
from ..reporting.progress import StageProgress
from ..reporting.results import MAX_SAES, RESULTS
from ..runs import key_of
from ..saes import JumpReLUSAE, TopKSAE, Transcoder
from ..saes.base import BaseSAE
from ..sites import INPUT_KINDS, Site, special_token_ids
from ..sites.decoder import find_decoder
from ..sites.reading import check_reads, stated_site
from ..sites.site import as_site
from .check import width_finding
from .config import LARGEST_CONTEXT, ModelSection
from .model import Loaded, load_model
from .prepare import TOKENS, say
from .run import IDENTITY
from .sources import Source, expand
from .stated import stated_of

SEQUENCES, CONTEXT = 2048, 1024
CONTROL_TOKENS = 1 << 16
# Bytes of weights that are on the device at once, beside the model's.
MAX_SAE_BYTES = 8 << 30
# Of given text, one document of so many is judged on; the controls are fitted on the others.
JUDGED_EVERY = 2


@dataclass(frozen=True)
class JudgedConfig:
    """Which SAEs, on which model and text: what commands that judge SAEs have alike.

    saes: each a file or folder of an SAE or a transcoder, a folder of such folders, OWNER/NAME/PATH of an SAE on the
    hub, or the folder of a run. model: by default that of the run. text: patterns of UTF-8 files, by default the
    held-out text of the run, without one Python's own documentation. site: where every SAE is to be judged, by default
    the one that each states. sequences, context: rows of the text, and tokens of a row, of which the text may have
    fewer; the rows of a run have the length that they have. seed: of what is drawn. out: the folder of the
    results, by default one in that of the run, else in ``runs``. device, impl: where all runs, and who computes the
    SAEs, see `gemmascope.kernels`.

    Raises ValueError and TypeError naming the setting that is wrong.
    """

    FOLDER: ClassVar[str]
    """The name of the folder of the results."""

    saes: Sequence[str | os.PathLike]
    model: ModelSection | None = None
    text: Sequence[str | os.PathLike] = ()
    site: Site | str | None = None
    sequences: int = SEQUENCES
    context: int | None = None
    seed: int = 0
    out: str | os.PathLike | None = None
    device: str = "auto"
    impl: str = "auto"

    def __post_init__(self):
        for name in ("saes", "text"):
            value = getattr(self, name)
            if isinstance(value, (str, bytes, os.PathLike)) or not isinstance(value, Sequence):
                raise TypeError(f"{name}: expected a list of paths, got {type(value).__name__}")
        if not self.saes:
            raise ValueError("saes: expected at least one, got none")
        if self.model is not None:
            check_type("model", self.model, ModelSection)
        if self.site is not None:
            as_site(self.site)
        check_int("sequences", self.sequences, 1)
        if self.context is not None:
            check_int("context", self.context, 2, LARGEST_CONTEXT)
        check_int("seed", self.seed, 0, 2**63 - 1)
        if self.out is not None:
            as_path("out", self.out)
        check_type("device", self.device, str)
        check_choice("impl", self.impl, dispatch.IMPLS)

    @property
    def folder(self) -> Path:
        """Of the results."""
        return self.beside(self.FOLDER) if self.out is None else Path(self.out)

    def beside(self, name: str) -> Path:
        """The folder of that name in the run that is judged, else in runs/."""
        only = Path(self.saes[0])
        of_run = len(self.saes) == 1 and os.path.lexists(only / RESULTS)
        return (only if of_run else Path("runs")) / name


@dataclass(frozen=True)
class EvaluateConfig(JudgedConfig):
    """What to judge, and on what, as of `JudgedConfig`; the results are in ``evaluation``.

    outliers: a token is one whose norm is above so many times the median, by default as many as the run leaves them out
    above, else `OUTLIER_RATIO`. control_tokens: that the controls are fitted on, and that they are judged on, at most.
    draws: of the bootstrap. max_sae_bytes: of weights of SAEs that are on the device at once.
    """

    FOLDER: ClassVar[str] = "evaluation"

    outliers: float | None = None
    control_tokens: int = CONTROL_TOKENS
    draws: int = DRAWS
    max_sae_bytes: int = MAX_SAE_BYTES

    def __post_init__(self):
        super().__post_init__()
        if self.outliers is not None:
            check_number("outliers", self.outliers, 1)
        check_int("control_tokens", self.control_tokens, 1)
        check_int("draws", self.draws, 2)
        check_int("max_sae_bytes", self.max_sae_bytes, 1)


class Chosen(Protocol):
    """What is chosen of model and site, as `EvaluateConfig` has it."""

    @property
    def model(self) -> ModelSection | None: ...

    @property
    def site(self) -> Site | str | None: ...


@dataclass(frozen=True)
class Place:
    """An SAE, not loaded: where it comes from, where it reads and writes, and what a row of results says of it."""

    name: str
    source: Source
    reads: Site
    writes: Site
    facts: Mapping[str, Any]
    bytes: int
    content: str
    """A key of its tensors."""
    model: str | None
    """Which it says that it is of."""
    site: Site | None
    """Which it says that it reads."""

    def subject(self, device: torch.device, impl: str, dtype: torch.dtype | None = None) -> Subject:
        """The SAE on the device. dtype: of its weights, by default that of the file."""
        sae = self.source.load(dtype).to(device)
        sae.impl = impl
        return Subject(self.name, self.reads, self.writes, sae)


@dataclass(frozen=True)
class Sources:
    """The SAEs named, and the runs that they are of."""

    saes: tuple[Source, ...]
    runs: Mapping[Path, Mapping[str, Any]]
    """Folder → results."""

    @classmethod
    def of(cls, names: Sequence[str | os.PathLike]) -> "Sources":
        """Raises ValueError for more SAEs than results can hold, and as `expand`."""
        saes: list[Source] = []
        runs: dict[Path, Mapping[str, Any]] = {}
        for name in names:
            found = list(expand(name, runs, below=True))
            several = len(names) > 1 and len(found) > 1
            saes += [each._replace(name=f"{os.fspath(name)}: {each.name}") for each in found] if several else found
        if len(saes) > MAX_SAES:
            raise ValueError(f"saes: expected at most {MAX_SAES} together, got {len(saes)}")
        return cls(tuple(saes), runs)

    def outlier_ratio(self, config: EvaluateConfig) -> float:
        """That of the settings, else the one that all runs share."""
        if config.outliers is not None:
            return float(config.outliers)
        found = set()
        for results in self.runs.values():
            training = results.get("training")
            section = training.get("activations") if isinstance(training, dict) else None
            found.add(section.get("drop_norm") if isinstance(section, dict) else None)
        ratio = found.pop() if len(found) == 1 else None
        return float(ratio) if isinstance(ratio, (int, float)) and ratio >= 1 else OUTLIER_RATIO

    def model(self, config: Chosen, device: torch.device, dtype: str | None = None) -> Loaded:
        """The model of the settings, else that of the run, in the dtype that they say or in another one.

        Raises ValueError where nothing says which, for runs of different models, and for a model of a run that is
        another one now.
        """
        if config.model is not None:
            return load_named(config.model, device, dtype)
        sections = {_model_section(folder, results) for folder, results in self.runs.items()}
        if None in sections or len(sections) != 1:
            what = "none" if sections <= {None} else "several"
            raise ValueError(f"model: expected --model, or runs of one model, got {what}")
        section = sections.pop()
        assert section is not None
        loaded = load_named(section, device, dtype)
        for folder in self.runs:
            begun = read_json(folder / IDENTITY) if (folder / IDENTITY).is_file() else {}
            was = begun.get("model", {}).get("files") if isinstance(begun, dict) else None
            if was is not None and was != loaded.identity["files"]:
                raise ValueError(f"model: expected that of the run {shown(folder)}, found other weights; pass --model")
        return loaded


def load_named(section: ModelSection, device: torch.device, dtype: str | None = None) -> Loaded:
    """The model of a section, or it in another dtype, with a bar while its files are read."""
    if dtype is not None:
        section = replace(section, dtype=dtype)
    with StageProgress("Model", 0, "B") as bar:

        def hashed(done: int, of: int) -> None:
            bar.meter.total = of
            bar.update(done, "checksum of its files")

        return load_model(section, device, hashed)


def _model_section(folder: Path, results: Mapping[str, Any]) -> ModelSection | None:
    """The model that a run was trained on: where its config says, or, if that is gone, in the folder of the run."""
    training = results.get("training")
    table = training.get("model") if isinstance(training, dict) else None
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        return None
    known = ("name", "revision", "dtype", "attention")
    section = ModelSection(**{key: table[key] for key in known if key in table})
    inside = folder / Path(section.name).name
    if not os.path.isdir(section.name) and inside.is_dir():
        return ModelSection(str(inside), section.revision, section.dtype, section.attention)
    return section


# ---- text


@dataclass(frozen=True, eq=False)
class Texts:
    """train: ids [rows, context] that the controls are fitted on. judged: the text that SAEs are judged on. facts: what
    results say of them. rows: what both are of."""

    train: Tensor
    judged: MarkedText
    facts: Mapping[str, Any]
    rows: TokenRows

    @property
    def content(self) -> str:
        """A key of all that results depend on."""
        return key_of(self.train, self.judged.tokens, self.judged.documents, self.judged.is_text)


def read_texts(config: JudgedConfig, sources: Sources, loaded: Loaded, folder: Path, control_tokens: int = 1) -> Texts:
    """The rows of the text of the settings, tokenised into ``folder``, else of those that the run holds out, and rows
    with so many other tokens, at most, for controls.

    Raises ValueError for text that is too short, runs of different texts, a run whose text was made by another
    tokenizer than the model's, and a context where the rows are a run's; what `read_documents` and `tokenise` raise.
    """
    rows, what = read_rows(config, sources, loaded, folder)
    if not rows.n_train or not rows.n_held_out:
        raise ValueError("text: expected some to fit controls on and some to judge on, got too little")
    judged = spread_rows(rows.n_held_out, config.sequences)
    fitted = spread_rows(rows.n_train, -(-control_tokens // rows.context))
    text = MarkedText.of(loaded.model, rows.held_out(judged), rows.documents_of("held_out", judged))
    if not text.is_scored.any():
        raise ValueError("text: expected at least two tokens after one another, got none")
    facts = {
        "text": what,
        "sequences": len(text.tokens),
        "sequences_there": rows.n_held_out,
        "context": rows.context,
        "documents": len(text.documents[text.documents >= 0].unique()),
        "control_sequences": len(fitted),
    }
    return Texts(rows.train(fitted), text, facts, rows)


def read_rows(config: JudgedConfig, sources: Sources, loaded: Loaded, folder: Path) -> tuple[TokenRows, str]:
    """The rows of that text and of which it is, in words. Raises as `read_texts`, but for too few rows."""
    check_tokenizer(loaded)
    if config.text or not sources.runs:
        return _tokenised(config, loaded, folder), ", ".join(map(str, config.text)) or "Python's own docs"
    return _of_run(config, sources, loaded), "held-out rows of the run"


def check_tokenizer(loaded: Loaded) -> None:
    """Raise ValueError unless the BOS that rows begin with is one that the model's config knows."""
    encoder, skipped = as_encoder(loaded.tokenizer), special_token_ids(loaded.model)
    if encoder.bos not in skipped:
        raise ValueError(
            f"model: expected a config whose bos_token_id is that of the tokenizer, {encoder.bos}, got {list(skipped)}"
        )


def spread_rows(n: int, rows: int) -> Tensor:
    """The numbers of at most ``rows`` of n rows, spread over all."""
    return sample_rows(torch.arange(n, dtype=torch.int64, device="cpu"), rows)


def _tokenised(config: JudgedConfig, loaded: Loaded, folder: Path) -> TokenRows:
    documents = read_documents(list(config.text)) if config.text else python_documentation()
    context = CONTEXT if config.context is None else config.context
    most = getattr(find_decoder(loaded.model).config, "max_position_embeddings", None)
    if most is not None and context > most:
        if config.context is not None:
            raise ValueError(f"context: expected at most the {most} tokens that the model takes, got {context}")
        context = most
    with StageProgress("Text", 0, "tok") as bar:
        try:
            return tokenise(
                documents,
                loaded.tokenizer,
                folder,
                context=context,
                held_out_every=JUDGED_EVERY,
                max_tokens=config.sequences * context,
                progress=lambda read, tokens: bar.update(tokens, f"{read:,} documents"),
            )
        except ValueError as error:
            if isinstance(error, BadFileError) or not str(error).startswith("documents:"):
                raise
            raise ValueError(
                f"text: {str(error).removeprefix('documents: ')} (a line of .jsonl is a document, any other file one; "
                "about half of them are judged on, the controls are fitted on the others)"
            ) from error


def _of_run(config: JudgedConfig, sources: Sources, loaded: Loaded) -> TokenRows:
    every = [TokenRows.open(folder / TOKENS) for folder in sources.runs]
    if len({rows.content for rows in every}) > 1:
        raise ValueError("text: expected --text, or runs of one text, got runs of several")
    rows = every[0]
    if config.context is not None and config.context != rows.context:
        raise ValueError(f"context: expected {rows.context}, as the run has its rows, got {config.context}")
    if rows.identity.get("tokenizer") != tokenizer_hash(loaded.tokenizer):
        raise ValueError("model: expected one with the tokenizer of the run's text, got another; pass --text")
    return rows


def say_what_changed(path: Path, environment: Mapping[str, Any]) -> None:
    """Say in what the environment of the results at ``path`` is another: who comes back with another number of threads
    should know why all is made again."""
    with suppress(BadFileError):
        found = read_json(path) if path.is_file() else None
        before = found.get("environment") if isinstance(found, dict) else None
        if isinstance(before, dict) and (lines := differences(before, environment, "that there", "this process")):
            say(f"{path}: made anew, in another environment: {'; '.join(lines)}")


# ---- SAEs


def find_places(config: Chosen, sources: Sources, loaded: Loaded) -> tuple[Place, ...]:
    """Every SAE, loaded once to see that it fits the model. Raises ValueError for one that does not, or whose site
    nothing says, and what loading raises."""
    places: list[Place] = []
    taken: set[str] = set()
    with StageProgress("SAEs", len(sources.saes), "SAE") as bar:
        for source in sources.saes:
            sae = source.load()
            name = _free(source.name, taken)
            try:
                reads, writes = _sites(sae, source, config, loaded)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            tensors = {key: value.detach() for key, value in sae.state_dict().items()}
            places.append(
                Place(
                    name,
                    source,
                    reads,
                    writes,
                    _facts_of(sae, source, reads, writes),
                    sum(tensor.nbytes for tensor in tensors.values()),
                    key_of(type(sae).__name__, getattr(sae, "k", None), tensors),
                    stated_of(os.fspath(source.path), sae.metadata).model,
                    _stated_site(sae, source),
                )
            )
            bar.update(len(places), name)
    return tuple(places)


def stated_otherwise(places: Sequence[Place], loaded: Loaded) -> list[str]:
    """A warning for each SAE that says that it is of another model or site."""
    found = []
    for place in places:
        if place.model is not None and place.model.rpartition("/")[2] != loaded.name.rpartition("/")[2]:
            found.append(f"{place.name}: the SAE says that it is of {shown(place.model)}")
        if place.site not in (None, place.reads):
            found.append(f"{place.name}: the SAE says that it is of {place.site}, and is judged at {place.reads}")
    return found


def _free(name: str, taken: set[str]) -> str:
    free, number = name, 2
    while free in taken:
        free, number = f"{name} ({number})", number + 1
    taken.add(free)
    return free


def _sites(sae: nn.Module, source: Source, config: Chosen, loaded: Loaded) -> tuple[Site, Site]:
    site = _stated_site(sae, source) if config.site is None else as_site(config.site)
    if isinstance(sae, Transcoder):
        return _sites_of_transcoder(sae, site, source.row, loaded)
    assert isinstance(sae, (JumpReLUSAE, TopKSAE))
    candidates = [each for each in loaded.sites if loaded.width(each) == sae.d_model]
    if site is not None and site.kind not in INPUT_KINDS and config.site is not None:
        loaded.width(site)  # refuses one that the model does not have
    finding = width_finding(sae.d_model, loaded, site, candidates)
    if finding.status == "wrong":
        raise ValueError(f"does not fit {loaded.name}: {finding.text}")
    if site is None:
        raise ValueError("expected an SAE that says its site, or --site, found neither")
    return site, site


def _stated_site(sae: nn.Module, source: Source) -> Site | None:
    """What the row of its run says, its metadata, else the names of its folders."""
    if source.row is not None:
        return Site(source.row["layer"], source.row["site"])
    if isinstance(sae, Transcoder):
        return stated_site(sae)
    assert isinstance(sae, (JumpReLUSAE, TopKSAE))
    path = os.path.abspath(source.path) if os.path.lexists(source.path) else os.fspath(source.path)
    return stated_of(path, sae.metadata).site


def _sites_of_transcoder(
    sae: Transcoder, reads: Site | None, row: Mapping[str, Any] | None, loaded: Loaded
) -> tuple[Site, Site]:
    if reads is None:
        raise ValueError("expected a transcoder that says the site it reads, or --site, found neither")
    check_reads(reads, sae)
    stated = sae.metadata.get("site_out")
    if row is not None and isinstance(row.get("site_out"), str):
        writes = Site(reads.layer, row["site_out"])
    elif isinstance(stated, str):
        writes = Site(reads.layer, Site.parse(stated).kind)
    else:
        writes = Site(reads.layer, "mlp")
    decoder = find_decoder(loaded.model)
    decoder.check_fits(reads, sae)
    if (width := decoder.width(writes)) != sae.d_out:
        raise ValueError(f"site {writes}: expected a transcoder of d_out {width}, got {sae.d_out}")
    return reads, writes


def _facts_of(sae: nn.Module, source: Source, reads: Site, writes: Site) -> dict[str, Any]:
    """What a row says of an SAE; of a run's the recipe is in its row."""
    assert isinstance(sae, (BaseSAE, Transcoder))
    row = source.row or {}
    recipe = {name: row[name] if row.get(name) is not None else value for name, value in recipe_of(sae).items()}
    kind = sae.kind if isinstance(sae, BaseSAE) else row.get("kind", "jumprelu")
    facts: dict[str, Any] = {"site": reads.kind, "layer": reads.layer, "width": sae.d_sae, "kind": kind, **recipe}
    if isinstance(sae, Transcoder):
        facts |= {"site_out": writes.kind, "skip": sae.W_skip is not None}
    return facts | {"path": os.fspath(source.path)}
