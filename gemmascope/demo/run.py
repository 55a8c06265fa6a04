"""The demo: a small Gemma 2 trained on real text, and `gemmascope train` on it: an SAE at each of twelve sites.

What is the demo's own comes first, in two stages: the text as documents, and the language model. They lie in the run's
folder as those of any other training would, and the rest is `suite.run_suite`. `gemmascope dashboards` of the run comes
last.
"""

import dataclasses
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..activations import Document, TokenRows
from ..checks import check_int, check_type
from ..dashboards.table import Sizes
from ..formats.files import as_path, atomic_write
from ..kernels import choose
from ..reporting.progress import StageProgress
from ..runs import Run, Stage
from ..suite.config import (
    ActivationsSection,
    EvaluateSection,
    ModelSection,
    RunSection,
    SAEBlock,
    SuiteConfig,
    SuiteSection,
    TextSection,
)
from ..suite.dashboards import DashboardConfig, make_dashboards
from ..suite.memory import HOST
from ..suite.model import plain_defaults
from ..suite.plan import Plan
from ..suite.prepare import TOKENS, say, tokens
from ..suite.run import forget, run_suite, spread
from ..training.config import LARGEST_SEED
from . import small_gemma, text
from .byte_tokenizer import byte_tokenizer
from .small_gemma import CONTEXT, LanguageModelConfig

MODEL, TEXT = "model", "text.jsonl"
BATCH_SIZE = 1024


@dataclass(frozen=True)
class DemoConfig:
    """out: the run's folder. text: the user's own UTF-8 files instead of Python's documentation. fast: a shorter
    training. seed: of weights and data order. fresh: start over instead of resuming. impl: of the SAEs, see `choose`.

    Raises ValueError and TypeError naming the setting that is wrong.
    """

    out: Path = Path("runs/demo")
    text: tuple[Path, ...] = ()
    fast: bool = False
    seed: int = 0
    fresh: bool = False
    impl: str = "auto"

    def __post_init__(self):
        as_path("out", self.out)
        check_type("text", self.text, tuple)
        for name in ("fast", "fresh"):
            check_type(name, getattr(self, name), bool)
        check_int("seed", self.seed, 0, LARGEST_SEED)
        choose(self.impl, "cpu", torch.float32)  # refuses one that cannot run

    def language_model(self) -> LanguageModelConfig:
        return LanguageModelConfig(steps=220 if self.fast else 280, seed=self.seed)

    def suite(self) -> SuiteConfig:
        """What `gemmascope train` is told."""
        out = Path(self.out)
        return SuiteConfig(
            run=RunSection(out=str(out), device="cpu", impl=self.impl),
            model=ModelSection(name=str(out / MODEL), dtype="float32"),
            text=TextSection(files=(str(out / TEXT),), context=CONTEXT),
            suite=SuiteSection(
                sites=("*",),
                sae=(SAEBlock(d_sae=512, target_l0=(5,)),),
                tokens=(189 if self.fast else 378) * BATCH_SIZE,  # what three rings hold, so that no forward is in vain
                batch_size=BATCH_SIZE,
                seed=self.seed,
            ),
            activations=ActivationsSection(ring_tokens=1 << (16 if self.fast else 17)),
            evaluate=EvaluateSection(rows=64 if self.fast else 96, train_rows=512),
        )

    def dashboards(self) -> DashboardConfig:
        """What `gemmascope dashboards` is told; a token is a byte, of which a window holds more than of words."""
        return DashboardConfig(
            (self.out,),
            sequences=128 if self.fast else 512,
            sizes=Sizes(window=64),
            seed=self.seed,
            device="cpu",
            impl=self.impl,
        )


@plain_defaults()
def run(config: DemoConfig) -> dict[str, Any] | None:
    """Do what is missing of the run in ``config.out`` and return its results, also written to results.json there.

    None when a signal stopped the training of the SAEs, or their dashboards, which the same call goes on with. Another
    text, seed or size is another run, which takes the place of the one before.

    Raises ValueError for a text that is none or too short and as `Run`; BadFileError for a file of the run that was
    damaged since; EnvironmentProblemError as `Run` and when a file cannot be written; TrainingFailedError when every
    SAE gave up.
    """
    check_type("config", config, DemoConfig)
    started, suite = time.monotonic(), config.suite()
    documents = text.read(config.text, CONTEXT)
    with Run(config.out, config.fresh, kind="demo") as work:
        if config.fresh:
            forget(work.folder)
        written, rows = tokenised(work, documents, suite.text)
        trained = work.stage("model", dataclasses.asdict(config.language_model()), rows.content, suite.evaluate.rows)
        language_model(config, trained, rows)
        names = ", ".join(Path(path).name for path in config.text)
        results = run_suite(
            suite,
            work,
            allow=("environment",),
            before=announce,
            measured=False,
            after=[written, trained],
            restart=True,
            model_facts={
                "name": "a small Gemma 2",
                "text": names or f"documentation of Python {platform.python_version()}",
                **trained.facts,
                "seconds": trained.seconds,
            },
            started=started,
        )
    if results is None or make_dashboards(config.dashboards(), fresh=config.fresh) is None:
        return None
    return results


def tokenised(work: Run, documents: list[Document], config: TextSection) -> tuple[Stage, TokenRows]:
    """The text in the run's folder, and its rows of tokens."""
    path, lines = work.folder / TEXT, text.lines(documents)
    stage = work.stage("text", lines)
    if not stage.done():
        with stage.doing():
            with atomic_write(path) as temporary:
                temporary.write_bytes(lines)
            stage.keep(path)
    return stage, tokens(config, byte_tokenizer(), work.folder / TOKENS)


def language_model(demo: DemoConfig, stage: Stage, rows: TokenRows) -> None:
    """Train the model on the rows that are not held out, and save it."""
    config, folder = demo.language_model(), stage.run.folder / MODEL
    if stage.done():
        say(f"language model: resumed from {folder}")
        return
    train_rows = rows.train(torch.arange(rows.n_train, dtype=torch.int64, device="cpu"))
    held_out = rows.held_out(spread(rows.n_held_out, demo.suite().evaluate.rows))
    model = small_gemma.build(config)
    with (
        stage.doing(),
        StageProgress("Language model", config.steps, "tok", config.batch_rows * CONTEXT) as bar,
    ):
        small_gemma.train(model, train_rows, config, lambda step, loss: bar.update(step, f"loss {loss:.3f}"))
        stage.facts |= {
            "text_bytes": rows.facts["bytes"],
            "bigram_loss": text.bigram_loss(train_rows, held_out),
            "steps": config.steps,
        }
        stage.keep(*small_gemma.save(model, folder))


def announce(plan: Plan) -> None:
    memory = f"{plan.needs.total(HOST) / 1e9:.2f} GB of memory"
    say(f"SAEs: {len(plan.specs)} of {plan.specs[0].config.d_sae} latents, at most {memory} in training, all included")
    impl, why = choose(plan.config.run.impl, "cpu", torch.float32)
    say(f"SAEs are trained by impl={impl!r}: {why}")
