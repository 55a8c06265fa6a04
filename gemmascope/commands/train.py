"""`demo`, `train` and `harvest`: from a model and text to SAEs."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..process import ending_when_interrupted
from .app import Console, Debug, app
from .options import (
    Fresh,
)
from .present import present


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text to learn; repeat for more. [default: Python's own docs]")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A shorter training, for a first look.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of the data.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")] = False,
    debug: Debug = False,
) -> None:
    """Train a small Gemma 2 and an SAE at each of its sites, then judge, plot and save them."""
    with ending_when_interrupted(["demo", "--fresh"] if fresh else ["demo"]):
        from ..demo import run as job

    results = job.run(job.DemoConfig(out=out, text=tuple(text or ()), fast=fast, seed=seed, fresh=fresh))
    if results is not None:
        present(out, results)


ConfigFile = Annotated[
    Path | None,
    typer.Argument(metavar="[CONFIG.toml]", help="What to train; not needed with --preset.", show_default=False),
]


Preset = Annotated[str | None, typer.Option(help="Start from a recipe: small, gemma-scope-2b-16k, … (see docs).")]


Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: suite.sae.d_sae=4096. Repeat.")
]


@app.command()
def train(
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. [default: run.out of the config]")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show what it would take, and train nothing.")] = False,
    fresh: Fresh = False,
    from_store: Annotated[Path | None, typer.Option(help="Read activations from a store of `harvest`.")] = None,
    allow_environment_change: Annotated[
        bool, typer.Option("--allow-environment-change", help="Go on with other versions or another device.")
    ] = False,
    allow_model_change: Annotated[bool, typer.Option("--allow-model-change", help="Go on with another model.")] = False,
    debug: Debug = False,
) -> None:
    """Train SAEs at many sites of a Gemma at once; the same command goes on where it was stopped."""
    with ending_when_interrupted(["train", "--fresh"] if fresh else ["train"]):
        from ..suite import SuiteConfig, plan_suite, train_suite
        from ..suite.prepare import say

    settings = suite_config(SuiteConfig, config, preset, overrides, out)
    if plan:
        found = plan_suite(settings)
        Console().print(found.text(), markup=False, soft_wrap=True, end="")
        found.refuse()
        return
    may_change = {"environment": allow_environment_change, "model": allow_model_change}
    results = train_suite(
        settings,
        fresh=fresh,
        allow=[name for name, allowed in may_change.items() if allowed],
        store=from_store,
        before=lambda found: say(found.text()),  # on standard error, on which nothing depends
    )
    if results is not None:
        present(Path(settings.run.out), results)


@app.command()
def harvest(
    out: Annotated[Path, typer.Option(help="Folder of the store.", show_default=False)],
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Write the activations that `train` would see to a store, for `train --from-store`; run again, it goes on."""
    with ending_when_interrupted(["harvest"]):
        from ..suite import SuiteConfig, harvest_suite

    store = harvest_suite(suite_config(SuiteConfig, config, preset, overrides, None), out)
    Console().print(
        f"{store.blocks} superblocks at {len(store.sites)} sites in {store.folder}", markup=False, soft_wrap=True
    )


def suite_config(
    kind: Any, file: Path | None, preset: str | None, overrides: list[str] | None, out: Path | None
) -> Any:
    """The config of a command: a file, a preset or both, and what its options say."""
    if file is None and preset is None:
        raise ValueError("config: expected a file or --preset, got neither")
    changed = list(overrides or ())
    if out is not None:
        changed.append(f"run.out={json.dumps(str(out), ensure_ascii=False)}")
    return kind.read(file, changed, preset=preset)
