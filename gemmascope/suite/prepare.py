"""`Prepared`: the model, the text as tokens, the SAEs to train and what all of it is known by."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..activations import Harvester, TokenRows, read_dataset, read_documents, tokenise
from ..errors import BadFileError
from ..formats.files import shown
from ..kernels import choose
from ..reporting.progress import ErrorConsole, StageProgress
from ..sites import Site
from ..training.spec import SAESpec
from .config import SuiteConfig, TextSection
from .model import Loaded, as_device, environment, load_model
from .plan import Plan, make_plan

TOKENS = "tokens"


def say(message: str) -> None:
    ErrorConsole().print(message, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Prepared:
    """What a run works with. identity: JSON by part (model, text, config, environment), see `train_suite`."""

    config: SuiteConfig
    loaded: Loaded
    rows: TokenRows
    specs: tuple[SAESpec, ...]
    device: torch.device
    identity: dict[str, Any]
    run_id: str | None = None
    """What trackers know the run by, from its start to its end."""

    @property
    def model(self) -> nn.Module:
        return self.loaded.model

    @property
    def name(self) -> str:
        return self.loaded.name

    @property
    def sites(self) -> list[Site]:
        return sorted({site for spec in self.specs for site in spec.sites})

    def harvester(self) -> Harvester:
        return Harvester(
            self.model,
            self.rows,
            self.sites,
            seed=self.config.suite.seed,
            rows_per_block=self.config.rows_per_block,
            forward_rows=self.config.activations.forward_rows,
            identity=self.loaded.identity,
        )

    def plan(self, measured: bool = True) -> Plan:
        return make_plan(self.config, self.loaded, self.rows, measured=measured)


def prepare(config: SuiteConfig, folder: Path, begun: bool = False) -> Prepared:
    """Load the model, tokenise the text into ``folder``/tokens unless that was done, and choose the SAEs.

    begun: the tokens there are those of a run, and not replaced; raises ValueError where the text is another one.
    """
    device = as_device(config.run.device)
    with StageProgress("Model", 0, "B") as bar:

        def hashed(done: int, of: int) -> None:
            bar.meter.total = of
            bar.update(done, "checksum of its files")

        loaded = load_model(config.model, device, hashed)
    specs = config.specs(loaded.sites)
    rows = tokens(config.text, loaded.tokenizer, folder / TOKENS, begun)
    impl = choose(config.run.impl, device, torch.float32).impl
    identity = {
        "model": loaded.identity,
        **settings(config, rows.content),
        "environment": environment(device) | {"impl": impl},
    }
    return Prepared(config, loaded, rows, specs, device, identity)


def settings(config: SuiteConfig, content: Any) -> dict[str, dict[str, Any]]:
    """What of a run's identity the config and the content of its text decide."""
    tables = config.identity()
    tables["text"].pop("files", None)  # their content tells; folders may be moved
    return {
        "text": {"content": content} | tables["text"],
        "config": {name: table for name, table in tables.items() if name not in ("model", "text")},
    }


def tokens(config: TextSection, tokenizer: Any, folder: Path, begun: bool = False) -> TokenRows:
    """The rows of the text, made in ``folder`` unless they are there."""
    if config.dataset is not None:
        documents = read_dataset(
            config.dataset, split=config.split, column=config.column, revision=config.dataset_revision
        )
    else:
        documents = read_documents(config.files, field=config.field)
    names = ("context", "held_out_every", "max_tokens", "max_tokens_per_source")
    settings = {name: getattr(config, name) for name in names}
    if begun:
        _refuse_other_text(folder, {"documents": documents.content(), "settings": settings})
    with StageProgress("Text", config.max_tokens or 0, "tok") as bar:
        return tokenise(
            documents,
            tokenizer,
            folder,
            **settings,
            progress=lambda documents, tokens: bar.update(tokens, f"{documents:,} documents"),
        )


def _refuse_other_text(folder: Path, text: dict[str, Any]) -> None:
    try:
        found = TokenRows.open(folder).identity
    except BadFileError:  # `tokenise` makes what is missing again, and says what is damaged
        return
    for part, now in text.items():
        if found[part] != now:
            raise ValueError(
                f"text: expected that of the run in {shown(folder.parent)}, found other {part}; take another folder, "
                "or start over with --fresh"
            )
