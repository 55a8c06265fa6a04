"""`SuiteConfig`: everything a run of `gemmascope train` is told, as one tree that checks itself.

A file of TOML has a table for each section::

    [model]
    name = "google/gemma-2-2b"
    [text]
    files = ["corpus/**/*.txt"]
    [suite]
    sites = ["resid", "layer_12/*"]
    tokens = "500M"
    [[suite.sae]]
    d_sae = 16384
    target_l0 = [20, 80]

Paths are relative to the current directory. Unknown keys, wrong types and values that cannot be are ValueError or
TypeError naming the key in full: ``suite.sae[1].d_sae: expected at least 1, got -3``.
"""

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from ..checks import check_choice, check_int, check_number, check_type
from ..kernels import dispatch, validation
from ..sites import INPUT_KINDS, KINDS, Site
from ..training import TrainConfig
from ..training.config import KINDS as KINDS_OF_SAE
from ..training.config import LARGEST_SEED, LOSS_FIELDS, SPARSITIES_OF, TARGETED, TOP_K
from ..training.spec import SAESpec
from .presets import BATCH_SIZES, RECIPES, preset_tables, recipe
from .selection import Candidate, listing, matching, named
from .settings import as_count, check_keys, merged, overridden, read_toml

MODEL_DTYPES = ("auto", "float32", "bfloat16")
ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2")
RING_DTYPES = ("bfloat16", "float32")
RINGS = ("auto", "device", "host")
TRACKERS = ("trackio", "wandb", "tensorboard")

LARGEST_CONTEXT = 1 << 20
LARGEST_BATCH = 1 << 20
LARGEST_RING = 1 << 31
LARGEST_FORWARD = 1 << 24
LARGEST_D_SAE = 1 << 24
MOST_SAES = 10_000

# What decides how many latents fire; each may be a list of several.
AIMS = ("target_l0", "l0_coefficient", "k")
# A block's own keys besides; those of the recipe that the suite decides have no place in one.
_OF_THE_SUITE = {"steps": "tokens", "batch_size": "batch_size of [suite]", "loss": "the names of its numbers"}
_OF_THE_BLOCK = ("d_sae", "seed", *AIMS)
RECIPE_FIELDS = frozenset(
    {*(each.name for each in dataclasses.fields(TrainConfig)), *LOSS_FIELDS} - {*_OF_THE_SUITE, *_OF_THE_BLOCK}
)


def _check_text(name: str, value: Any) -> None:
    check_type(name, value, str)
    if not value.strip() or not value.isprintable():
        raise ValueError(f"{name}: expected printable text, got {value!r}")


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """A list of texts, each once; a single text is a list of one."""
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list of str, got {type(value).__name__}")
    if value == []:
        raise ValueError(f"{name}: expected some, got an empty list")
    for index, each in enumerate(value):
        _check_text(f"{name}[{index}]", each)
        if each in value[:index]:
            raise ValueError(f"{name}[{index}]: expected each once, got {each!r} twice")
    return tuple(value)


def _numbers(name: str, value: Any, low: float, *, whole: bool = False, open_low: bool = False) -> tuple[Any, ...]:
    """A list of numbers, each once; a single number is a list of one."""
    single = not isinstance(value, (list, tuple))
    values = (value,) if single else tuple(value)
    if not values and value != ():
        raise ValueError(f"{name}: expected a number or a list of some, got an empty list")
    for index, each in enumerate(values):
        key = name if single else f"{name}[{index}]"
        if whole:
            check_int(key, each, int(low), LARGEST_SEED)
        else:
            check_number(key, each, low, open_low=open_low)
        if each in values[:index]:
            raise ValueError(f"{key}: expected each once, got {each} twice")
    return values if whole else tuple(float(each) for each in values)


class _Section:
    """What the sections share; each is a frozen dataclass."""

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True)
class ModelSection(_Section):
    """Which language model, and how it runs."""

    name: str
    """On the Hugging Face hub, or a folder: any Gemma 2 or 3."""
    revision: str | None = None
    """Branch, tag or commit on the hub; by default its main branch."""
    dtype: str = "auto"
    """``float32``, ``bfloat16``, or ``auto``: bfloat16 on a GPU, float32 on a CPU, where bfloat16 is slower."""
    attention: str = "eager"
    """How transformers computes attention. ``sdpa`` is refused for models with a soft-cap, which it drops."""

    def __post_init__(self):
        _check_text("name", self.name)
        if self.revision is not None:
            _check_text("revision", self.revision)
        check_choice("dtype", self.dtype, MODEL_DTYPES)
        check_choice("attention", self.attention, ATTENTIONS)


@dataclass(frozen=True)
class TextSection(_Section):
    """What is read, and how it becomes rows of tokens: ``files``, or a ``dataset``."""

    files: tuple[str, ...] = ()
    """Patterns of UTF-8 files, ``**`` for any folders. A ``.jsonl`` has a document a line; each may be ``.gz``."""
    dataset: str | None = None
    """On the Hugging Face hub, streamed to tokenise it."""
    split: str = "train"
    column: str = "text"
    """Of the dataset."""
    dataset_revision: str | None = None
    field: str = "text"
    """Of each line of a ``.jsonl`` file."""
    context: int = 1024
    """Tokens of a row, BOS included."""
    held_out_every: int = 16
    """One document of so many is held out for evaluation."""
    max_tokens: int | None = None
    """Of all text; such as "20M"."""
    max_tokens_per_source: int | None = None
    """Of each file or dataset."""

    def __post_init__(self):
        self._put("files", _texts("files", self.files))
        for name in ("dataset", "dataset_revision"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        if bool(self.files) == (self.dataset is not None):
            raise ValueError(f"files: expected files or a dataset, got {'both' if self.files else 'neither'}")
        for name in ("split", "column", "field"):
            _check_text(name, getattr(self, name))
        check_int("context", self.context, 2, LARGEST_CONTEXT)
        check_int("held_out_every", self.held_out_every, 2)
        for name in ("max_tokens", "max_tokens_per_source"):
            if getattr(self, name) is not None:
                self._put(name, as_count(name, getattr(self, name), self.context))


@dataclass(frozen=True)
class ActivationsSection(_Section):
    """How activations are held between the model and the SAEs."""

    ring_tokens: int = 1 << 17
    """Tokens among which batches are shuffled."""
    dtype: str = "bfloat16"
    """Of the ring: ``bfloat16`` or ``float32``."""
    drop_norm: float | None = None
    """Leave out tokens whose norm at a site is above so many times the median there; they are counted in any case."""
    forward_rows: int = 8
    """Rows of tokens that the model reads at once."""
    ring: str = "auto"
    """Where it is: on the ``device`` of the SAEs, the ``host``, or ``auto``: the device if it fits there."""

    def __post_init__(self):
        self._put("ring_tokens", as_count("ring_tokens", self.ring_tokens, 1, LARGEST_RING))
        check_choice("dtype", self.dtype, RING_DTYPES)
        if self.drop_norm is not None:
            check_number("drop_norm", self.drop_norm, 1, open_low=True)
        check_int("forward_rows", self.forward_rows, 1, LARGEST_FORWARD)
        check_choice("ring", self.ring, RINGS)

    @property
    def least_kept(self) -> float:
        """Of the tokens, at least: as if a hundredth were outliers where they are dropped, of which there are fewer."""
        return 1.0 if self.drop_norm is None else 0.99


@dataclass(frozen=True)
class SAEBlock(_Section):
    """SAEs of one width: one for each site and each combination of ``target_l0``, ``l0_coefficient``, ``k`` and
    ``seed``.

    In a file the ``numbers`` of its recipe, fields of `TrainConfig` and `Loss`, stand beside the others: ``kind`` too,
    which says what else there must be. A jumprelu SAE aims at a ``target_l0`` or has an ``l0_coefficient``, relu and
    gated ones have an ``l0_coefficient``, and topk, batchtopk and matryoshka ones ``k``, the last also ``prefixes``.
    """

    d_sae: int
    sites: tuple[str, ...] = ()
    """Patterns of sites among those of ``suite.sites``, where that is given; by default all of those."""
    target_l0: tuple[float, ...] = ()
    l0_coefficient: tuple[float, ...] = ()
    k: tuple[int, ...] = ()
    seed: tuple[int, ...] = ()
    """By default the suite's."""
    tokens: int | None = None
    """By default the suite's; with fewer it is finished sooner."""
    target: str | None = None
    """Where transcoders write, ``mlp`` for one, in the layer of the site that they read: one of ``sites``, which then
    mean sites of the model's inputs too, ``mlp_in`` and ``mlp_in_normed``, whatever ``suite.sites`` are."""
    init_from: str | None = None
    """An SAE to go on from: a file, a folder or ``REPOSITORY:PATH`` on the hub. ``{layer}`` and ``{kind}`` stand for
    those of the site."""
    label: str | None = None
    """Ends the names of its SAEs."""
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        check_int("d_sae", self.d_sae, 1, LARGEST_D_SAE)
        self._put("sites", _texts("sites", self.sites))
        self._put("target_l0", _numbers("target_l0", self.target_l0, 0, open_low=True))
        self._put("l0_coefficient", _numbers("l0_coefficient", self.l0_coefficient, 0))
        self._put("k", _numbers("k", self.k, 1, whole=True))
        self._put("seed", _numbers("seed", self.seed, 0, whole=True))
        if self.tokens is not None:
            self._put("tokens", as_count("tokens", self.tokens))
        if self.target is not None:
            check_choice("target", self.target, KINDS)
            if not self.sites:
                raise ValueError("sites: expected those that the transcoders read with a target, got none")
            if self.init_from is not None:
                raise ValueError(f"init_from: expected none with a target, got {self.init_from!r}")
        if self.init_from is not None:
            _check_text("init_from", self.init_from)
        if self.label is not None:
            check_type("label", self.label, str)
            if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", self.label, re.ASCII):
                raise ValueError(f"label: expected letters, digits, '.', '_' or '-', got {self.label!r}")
        _check_numbers("numbers", self.numbers)
        if self.target is None and self.numbers.get("skip"):
            raise ValueError("skip: expected a target with skip = true, got none")

    @property
    def size(self) -> int:
        """SAEs at each site."""
        return math.prod(max(1, len(each)) for each in (self.target_l0, self.l0_coefficient, self.k, self.seed))

    @classmethod
    def of_table(cls, key: str, table: Any) -> "SAEBlock":
        own = {each.name for each in dataclasses.fields(cls)} - {"numbers"}
        _refuse_the_suites(key, table)
        check_keys(key, table, own | RECIPE_FIELDS)
        numbers = {name: value for name, value in table.items() if name in RECIPE_FIELDS}
        return _made(cls, key, {name: value for name, value in table.items() if name in own} | {"numbers": numbers})

    def to_table(self) -> dict[str, Any]:
        own = {name: value for name, value in _plain(self).items() if name != "numbers"}
        return own | dict(self.numbers)


def _check_numbers(key: str, numbers: Any) -> None:
    _refuse_the_suites(key, numbers)
    check_keys(key, numbers, RECIPE_FIELDS)


def _check_aims(key: str, block: SAEBlock, kind: Any, name: str) -> None:
    """Raise ValueError unless ``block`` of the recipe ``name`` aims at what its ``kind`` can aim at."""
    if kind not in KINDS_OF_SAE:
        return  # refused, with its name, by `TrainConfig`
    of_kind, targeted = f"with kind = {kind!r}", bool({*SPARSITIES_OF[kind]} & {*TARGETED})
    allowed = ("k",) if kind in TOP_K else ("target_l0", "l0_coefficient") if targeted else ("l0_coefficient",)
    for each in AIMS:
        if each not in allowed and getattr(block, each):
            expected = f"{' or '.join(allowed)} in its place {of_kind}"
            raise ValueError(f"{key}.{each}: expected {expected}, got {_brief(getattr(block, each))}")
    if not any(getattr(block, each) for each in allowed) and (name == "small" or kind in TOP_K):
        if targeted:
            raise ValueError(f"{key}.target_l0: expected one, or an l0_coefficient, with recipe = 'small', got neither")
        raise ValueError(f"{key}.{allowed[0]}: expected one, or several, {of_kind}, got none")
    for each in ("aux_k", "aux_coefficient"):
        if each in block.numbers and kind not in TOP_K:
            raise ValueError(f"{key}.{each}: expected none {of_kind}, got {block.numbers[each]!r:.40}")


def _brief(values: Sequence[float]) -> str:
    return ", ".join(f"{each:g}" for each in values)


def _refuse_the_suites(key: str, table: Any) -> None:
    for name, instead in _OF_THE_SUITE.items():
        if isinstance(table, Mapping) and name in table:
            raise ValueError(f"{key}.{name}: expected not to be given, since the suite decides it; set {instead}")


@dataclass(frozen=True)
class SuiteSection(_Section):
    """Which SAEs are trained at which sites, on how many tokens, by which recipe."""

    sae: tuple[SAEBlock, ...]
    tokens: int
    """That every SAE is trained on, repeating the text if need be; such as "500M"."""
    sites: tuple[str, ...] = ()
    """Patterns such as ``resid``, ``layer_12/*``, ``layer_5-9/mlp``. Without them every block has its own."""
    batch_size: int = cast(int, None)
    """Tokens of a step. None: 4,096 by the recipe gemma-scope, 1,024 by small."""
    recipe: str = "small"
    """``small``, for millions of tokens, or ``gemma-scope``, for billions."""
    seed: int = 0
    """Of the order of the text and, where a block has none, of its SAEs."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TrainConfig` and `Loss` for all blocks; those of a block go first."""

    def __post_init__(self):
        check_choice("recipe", self.recipe, RECIPES)
        if self.batch_size is None:
            self._put("batch_size", BATCH_SIZES[self.recipe])
        check_int("batch_size", self.batch_size, 1, LARGEST_BATCH)
        self._put("tokens", as_count("tokens", self.tokens, self.batch_size))
        self._put("sites", _texts("sites", self.sites))
        check_int("seed", self.seed, 0, LARGEST_SEED)
        _check_numbers("training", self.training)
        if not isinstance(self.sae, (list, tuple)):
            raise TypeError(f"sae: expected a list of blocks, got {type(self.sae).__name__}")
        if not self.sae:
            raise ValueError("sae: expected at least one [[suite.sae]] block, got none")
        self._put("sae", tuple(self.sae))
        for index, block in enumerate(self.sae):
            check_type(f"sae[{index}]", block, SAEBlock)
            if not (block.sites or self.sites):
                raise ValueError(f"sae[{index}].sites: expected sites here or in [suite], got neither")
            if block.size > MOST_SAES:
                raise ValueError(f"sae[{index}]: expected at most {MOST_SAES} SAEs, got {block.size}")
            tokens = block.tokens
            if tokens is not None and not self.batch_size <= tokens <= self.tokens:
                bounds = f"from one batch, {self.batch_size}, to those of the suite, {self.tokens}"
                raise ValueError(f"sae[{index}].tokens: expected {bounds}, got {tokens}")
            for _ in self.recipes(index):
                pass

    def recipes(self, index: int) -> Iterator[TrainConfig]:
        """Those of block ``index``, the last of target L0, λ, k and seed changing fastest."""
        block, key = self.sae[index], f"sae[{index}]"
        numbers = {**self.training, **block.numbers}
        steps = (block.tokens or self.tokens) // self.batch_size
        _check_aims(key, block, numbers.get("kind", "jumprelu"), self.recipe)
        aims = (getattr(block, name) or (None,) for name in AIMS)
        for *values, seed in itertools.product(*aims, block.seed or (self.seed,)):
            aim = {name: value for name, value in zip(AIMS, values, strict=True) if value is not None}
            size = {"d_sae": block.d_sae, "batch_size": self.batch_size, "seed": seed}
            try:
                config = recipe(self.recipe, steps=steps, **size, **aim, **numbers)
            except (TypeError, ValueError) as error:
                ours = str(error).partition(":")[0] in self.training.keys() - block.numbers.keys()
                raise type(error)(f"{'training' if ours else key}.{error}") from error
            if block.target is not None and config.resample_steps:
                found = list(config.resample_steps)
                raise ValueError(f"{key}.resample_steps: expected none with a target, got {found}")
            if block.target is None and config.skip:
                raise ValueError("training.skip: expected a target in every block with skip = true, got blocks of SAEs")
            yield config

    @classmethod
    def of_table(cls, key: str, table: Any) -> "SuiteSection":
        check_keys(key, table, _names(cls))
        blocks = table.get("sae", [])
        if isinstance(blocks, Mapping):
            blocks = [blocks]  # [suite.sae] for [[suite.sae]]
        if not isinstance(blocks, (list, tuple)):
            raise TypeError(f"{key}.sae: expected [[{key}.sae]] blocks, got {type(blocks).__name__}")
        made = tuple(SAEBlock.of_table(f"{key}.sae[{index}]", block) for index, block in enumerate(blocks))
        return _made(cls, key, {**table, "sae": made})

    def to_table(self) -> dict[str, Any]:
        table = _plain(self) | {"sae": [block.to_table() for block in self.sae]}
        return {name: value for name, value in table.items() if value != {}}


@dataclass(frozen=True)
class CheckpointSection(_Section):
    """When the run is saved so that it can go on."""

    minutes: float = 10.0
    """Between checkpoints."""
    steps: int | None = None
    """Between checkpoints, instead of ``minutes``."""
    keep: int = 2
    """So many are kept."""

    def __post_init__(self):
        check_number("minutes", self.minutes, 0, open_low=True)
        if self.steps is not None:
            check_int("steps", self.steps, 1)
        check_int("keep", self.keep, 2, 1000)


@dataclass(frozen=True)
class EvaluateSection(_Section):
    """On how much text the SAEs are judged."""

    rows: int = 128
    """Held-out rows; fewer where there are not so many."""
    train_rows: int = 128
    """Training rows from which the baselines are fitted."""
    loss_rows: int | None = None
    """Of ``rows``, those on which the model itself runs on reconstructions; all by default. With a large vocabulary
    these forwards take most of the time."""

    def __post_init__(self):
        check_int("rows", self.rows, 1, 1 << 20)
        check_int("train_rows", self.train_rows, 1, 1 << 20)
        if self.loss_rows is not None:
            check_int("loss_rows", self.loss_rows, 1, 1 << 20)


@dataclass(frozen=True)
class RunSection(_Section):
    """Where the run is, on what it runs, and how it reports."""

    out: str = "runs/suite"
    """Its folder."""
    device: str = "auto"
    """Of the model and the SAEs; ``auto``: a GPU if there is one."""
    impl: str = "auto"
    """Of the SAEs' kernels."""
    log_every: int = 10
    """Steps between rows of the table and of the log."""
    trackers: tuple[str, ...] = ()
    """Any of trackio, wandb, tensorboard."""

    def __post_init__(self):
        if isinstance(self.out, os.PathLike):
            self._put("out", os.fspath(self.out))
        _check_text("out", self.out)
        check_type("device", self.device, str)
        if self.device != "auto":
            validation.as_device("device", self.device)
        check_choice("impl", self.impl, dispatch.IMPLS)
        check_int("log_every", self.log_every, 1)
        self._put("trackers", _texts("trackers", self.trackers))
        for index, tracker in enumerate(self.trackers):
            check_choice(f"trackers[{index}]", tracker, TRACKERS)


@dataclass(frozen=True)
class SuiteConfig:
    """A run of `gemmascope train`. Raises ValueError or TypeError naming the key that is wrong."""

    model: ModelSection
    text: TextSection
    suite: SuiteSection
    activations: ActivationsSection = ActivationsSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    run: RunSection = RunSection()

    def __post_init__(self):
        for each in dataclasses.fields(self):
            check_type(each.name, getattr(self, each.name), cast(type, each.type))
        if self.rows_per_block * (self.text.context - 1) < self.suite.batch_size:
            raise ValueError(
                f"activations.ring_tokens: expected at least one batch of {self.suite.batch_size} tokens in whole rows "
                f"of {self.text.context}, the first of each left out, got {self.activations.ring_tokens}"
            )
        if self.activations.forward_rows * self.text.context > LARGEST_FORWARD:
            raise ValueError(
                f"activations.forward_rows: expected at most {LARGEST_FORWARD // self.text.context} rows of "
                f"{self.text.context} tokens, got {self.activations.forward_rows}"
            )

    @classmethod
    def read(
        cls, path: str | os.PathLike | None, overrides: Sequence[str] = (), *, preset: str | None = None
    ) -> "SuiteConfig":
        """The config of a TOML file, on top of a ``preset`` and below ``overrides`` KEY=VALUE (see `settings`).

        Raises ValueError or TypeError for what is wrong in any of them, a missing file included;
        EnvironmentProblemError for a file that cannot be read.
        """
        tables = {} if preset is None else preset_tables(preset)
        if path is not None:
            tables = merged(tables, read_toml(path))
        return cls.from_dict(overridden(tables, overrides))

    @classmethod
    def preset(cls, name: str, **sections: Mapping[str, Any]) -> "SuiteConfig":
        """A preset, refined: ``SuiteConfig.preset("gemma-scope-2b-16k", text={"files": ["corpus/*.txt"]})``."""
        return cls.from_dict(merged(preset_tables(name), sections))

    @classmethod
    def from_dict(cls, tables: Mapping[str, Any]) -> "SuiteConfig":
        """The config of nested tables, as a file or `to_dict` has them."""
        check_keys("", tables, _names(cls))
        made: dict[str, Any] = {}
        for each in dataclasses.fields(cls):
            kind, given = cast(Any, each.type), tables.get(each.name)
            if given is None and each.name not in ("model", "text", "suite"):
                continue
            given = {} if given is None else given
            if kind is SuiteSection:
                made[each.name] = SuiteSection.of_table(each.name, given)
            else:
                check_keys(each.name, given, _names(kind))
                made[each.name] = _made(kind, each.name, given)
        return cls(**made)

    def to_dict(self) -> dict[str, Any]:
        """Nested tables of what JSON and TOML hold, defaults included; `from_dict` takes them."""
        plain = {each.name: _plain(getattr(self, each.name)) for each in dataclasses.fields(self)}
        return plain | {"suite": self.suite.to_table()}

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of the SAEs: what a run that goes on must find unchanged."""
        tables = self.to_dict()
        tables["activations"].pop("ring")
        return {name: tables[name] for name in ("model", "text", "activations", "suite")}

    @property
    def steps(self) -> int:
        """Of the suite: whole batches of its tokens."""
        return self.suite.tokens // self.suite.batch_size

    @property
    def rows_per_block(self) -> int:
        """Rows of tokens of a superblock, which fills the ring once."""
        return max(1, self.activations.ring_tokens // self.text.context)

    def selected_sites(self, sites: Iterable[Site]) -> tuple[Site, ...]:
        """Those of a model's ``sites`` at which SAEs are trained, by layer and then by kind; of transcoders the sites
        that they read and those where they write.

        Raises ValueError for a pattern that means none of them, and for sites of ``suite.sites`` that no block uses.
        """
        blocks = zip(self._block_sites(tuple(sites)), self.suite.sae, strict=True)
        return tuple(sorted({each for found, block in blocks for site in found for each in _sites_of(block, site)}))

    def _block_sites(self, sites: tuple[Site, ...]) -> list[tuple[Site, ...]]:
        ours = matching("suite.sites", self.suite.sites, sites) if self.suite.sites else sites
        inputs = tuple(Site(layer, kind) for layer in sorted({site.layer for site in sites}) for kind in INPUT_KINDS)
        found = []
        for index, block in enumerate(self.suite.sae):
            among = ours if block.target is None else (*sites, *inputs)
            found.append(matching(f"suite.sae[{index}].sites", block.sites, among) if block.sites else ours)
        of_saes = [each for each, block in zip(found, self.suite.sae, strict=True) if block.target is None]
        unused = {*ours}.difference(*of_saes)
        if self.suite.sites and unused:
            raise ValueError(f"suite.sites: expected sites of some block, got {listing(unused)}, of which none trains")
        return found

    def specs(self, sites: Iterable[Site]) -> tuple[SAESpec, ...]:
        """Every SAE to train in a model of these ``sites``: site by site, in each as the blocks follow each other.

        Raises ValueError as `selected_sites`, for the same SAE twice and for more than 10,000.
        """
        found = self._block_sites(tuple(sites))
        count = sum(len(each) * block.size for each, block in zip(found, self.suite.sae, strict=True))
        if count > MOST_SAES:
            raise ValueError(f"suite.sae: expected at most {MOST_SAES} SAEs, got {count}")
        candidates = []
        for index, (block, ours) in enumerate(zip(self.suite.sae, found, strict=True)):
            key = f"suite.sae[{index}]"
            starts = {site: _start(block.init_from, site) for site in ours}
            if block.init_from is not None and len(set(starts.values())) < len(ours):
                raise ValueError(
                    f"{key}.init_from: expected {{layer}} and {{kind}} in it with {len(ours)} sites, "
                    f"got {block.init_from!r} for all of them"
                )
            for site in ours:
                if site.kind == block.target:
                    raise ValueError(f"{key}.target: expected another site than {site} itself, got {block.target!r}")
            for site, config in itertools.product(ours, self.suite.recipes(index)):
                target = None if block.target is None else Site(site.layer, block.target)
                candidates.append(Candidate(key, site, config, starts[site], block.label, target))
        return named(sorted(candidates, key=lambda each: each.site))


def _sites_of(block: SAEBlock, site: Site) -> tuple[Site, ...]:
    return (site,) if block.target is None else (site, Site(site.layer, block.target))


def _start(init_from: str | None, site: Site) -> str | None:
    if init_from is None:
        return None
    return init_from.replace("{layer}", str(site.layer)).replace("{kind}", site.kind)


def _names(section: type) -> list[str]:
    return [each.name for each in dataclasses.fields(section)]


def _made(section: Any, key: str, values: Mapping[str, Any]) -> Any:
    for each in dataclasses.fields(section):
        required = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        if required and values.get(each.name) is None:
            raise ValueError(f"{key}.{each.name}: expected to be given, got none")
    with _keyed(key):
        return section(**values)


@contextmanager
def _keyed(key: str) -> Iterator[None]:
    """Errors of this block name their key in full."""
    try:
        yield
    except TypeError as error:
        raise TypeError(f"{key}.{error}") from error
    except ValueError as error:
        raise ValueError(f"{key}.{error}") from error


def _plain(section: Any) -> dict[str, Any]:
    """Its fields, None and empty lists left out."""
    values = {each.name: getattr(section, each.name) for each in dataclasses.fields(section)}
    return {
        name: list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if value is not None and value != ()
    }
