"""The commands. Each gathers its options and calls one function of the library; `__main__` handles failures."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import rich.console
import rich.table
import torch
import typer

from . import reporting
from .checks import dtype_name
from .kernels import choose, density
from .process import ending_when_interrupted
from .version import __version__

app = typer.Typer(add_completion=False, help="Sparse autoencoders on every layer of Gemma.")

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

OPERATORS = "jumprelu, encode, decode"
PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DOES_NOT_FIT = 6  # exit code of `check`
WIDTH_OF_FILES = 100  # columns when the output is not a terminal


class Console(rich.console.Console):
    """Standard output; a closed pipe is left to `__main__`."""

    def __init__(self):
        super().__init__(highlight=False)
        if not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = WIDTH_OF_FILES

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"gemmascope {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


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
        from .demo import run as job

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
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")] = False,
    from_store: Annotated[Path | None, typer.Option(help="Read activations from a store of `harvest`.")] = None,
    allow_environment_change: Annotated[
        bool, typer.Option("--allow-environment-change", help="Go on with other versions or another device.")
    ] = False,
    allow_model_change: Annotated[bool, typer.Option("--allow-model-change", help="Go on with another model.")] = False,
    debug: Debug = False,
) -> None:
    """Train SAEs at many sites of a Gemma at once; the same command goes on where it was stopped."""
    with ending_when_interrupted(["train", "--fresh"] if fresh else ["train"]):
        from .suite import SuiteConfig, plan_suite, train_suite
        from .suite.prepare import say

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
        from .suite import SuiteConfig, harvest_suite

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


@app.command()
def check(
    sae: Annotated[str, typer.Argument(metavar="SAE", help="A file or folder, or OWNER/NAME/PATH on the hub.")],
    model: Annotated[str, typer.Option(help="The Gemma that it is to be used in: a folder, or a name on the hub.")],
    text: Annotated[
        list[str] | None, typer.Option(help="UTF-8 files or a glob; repeat for more. [default: Python's own docs]")
    ] = None,
    site: Annotated[
        str | None, typer.Option(help="Where it is to be used: layer_12/resid, … [default: what the SAE says]")
    ] = None,
    bos: Annotated[bool, typer.Option("--bos/--no-bos", help="Whether texts begin with a BOS.")] = True,
    tokens: Annotated[int, typer.Option(help="Tokens of text.")] = 4096,
    context: Annotated[int, typer.Option(help="Tokens of a row.")] = 256,
    revision: Annotated[str | None, typer.Option(help="Of the model: branch, tag or commit.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model: float32, bfloat16 or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="Where both run.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print every figure as JSON instead.")] = False,
    debug: Debug = False,
) -> None:
    """Does this SAE fit this model here? A line for each thing that is often wrong; exit code 6 when it does not."""
    with ending_when_interrupted(["check"]):
        from .suite import CheckConfig, check_sae
        from .suite.config import ModelSection

    section = ModelSection(name=model, revision=revision, dtype=dtype)
    found = check_sae(
        CheckConfig(sae, section, text=text or (), site=site, bos=bos, tokens=tokens, context=context, device=device)
    )
    print(json.dumps(found.to_dict(), indent=2) if as_json else "\n".join(found.lines()))
    if not found.fits:
        raise typer.Exit(DOES_NOT_FIT)


@app.command()
def evaluate(
    saes: Annotated[
        list[str],
        typer.Argument(
            metavar="SAE...",
            help="Folder of a run; files or folders of SAEs or transcoders; OWNER/NAME/PATH on the hub.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="The Gemma: a folder, or a name on the hub. [default: that of the run]")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="UTF-8 files or a glob; repeat for more. [default: what the run held out]")
    ] = None,
    site: Annotated[str | None, typer.Option(help="Of every SAE: layer_12/resid, … [default: what each says]")] = None,
    sequences: Annotated[int, typer.Option(help="Rows of text, at most.")] = 2048,
    context: Annotated[int | None, typer.Option(help="Tokens of a row. [default: 1024, of a run its own]")] = None,
    outliers: Annotated[
        float | None,
        typer.Option(help="A token is one above so many times the median norm. [default: the run's, or 5]"),
    ] = None,
    control_tokens: Annotated[int, typer.Option(help="Tokens that controls are fitted on, and judged on.")] = 65536,
    draws: Annotated[int, typer.Option(help="Of the bootstrap over documents.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results. [default: RUN/evaluation, else runs/evaluation]")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of the model: branch, tag or commit.")] = None,
    dtype: Annotated[str, typer.Option(help="Of a model that is named: float32, bfloat16 or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="Where all runs.")] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every figure as JSON instead.")] = False,
    debug: Debug = False,
) -> None:
    """Judge SAEs of any kind by Gemma Scope's protocol, beside controls; the same command goes on where it stopped."""
    with ending_when_interrupted(["evaluate", "--fresh"] if fresh else ["evaluate"]):
        from .suite import EvaluateConfig, evaluate_saes
        from .suite.config import ModelSection

    if model is None and (revision is not None or dtype != "auto"):
        raise ValueError("model: expected --model beside --revision and --dtype, got none")
    section = None if model is None else ModelSection(name=model, revision=revision, dtype=dtype)
    config = EvaluateConfig(
        saes,
        section,
        text=text or (),
        site=site,
        sequences=sequences,
        context=context,
        outliers=outliers,
        control_tokens=control_tokens,
        draws=draws,
        seed=seed,
        out=out,
        device=device,
    )
    found = evaluate_saes(config, fresh=fresh)
    if found is None:
        return
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        present_evaluation(config.folder)


@app.command()
def study(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Of the study, or all; --list shows them.", show_default=False)
    ] = None,
    saes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SAE...",
            help="Folder of a run; files or folders of SAEs or transcoders; OWNER/NAME/PATH on the hub.",
            show_default=False,
        ),
    ] = None,
    list_them: Annotated[bool, typer.Option("--list", help="Show the studies and what each asks.")] = False,
    model: Annotated[
        str | None, typer.Option(help="The Gemma: a folder, or a name on the hub. [default: that of the run]")
    ] = None,
    second_model: Annotated[
        str | None, typer.Option(help="Of the same shape, for the study transfer: a folder, or a name on the hub.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="UTF-8 files or a glob; repeat for more. [default: what the run held out]")
    ] = None,
    site: Annotated[str | None, typer.Option(help="Of every SAE: layer_12/resid, … [default: what each says]")] = None,
    sequences: Annotated[int, typer.Option(help="Rows of text, at most.")] = 2048,
    context: Annotated[int | None, typer.Option(help="Tokens of a row. [default: 1024, of a run its own]")] = None,
    outliers: Annotated[
        float | None,
        typer.Option(help="A token is one above so many times the median norm. [default: the run's, or 5]"),
    ] = None,
    control_tokens: Annotated[int, typer.Option(help="Tokens that controls are fitted on, and judged on.")] = 65536,
    draws: Annotated[int, typer.Option(help="Of the bootstrap over documents.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap and of what is drawn.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results. [default: RUN/studies, else runs/studies]")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of the model: branch, tag or commit.")] = None,
    dtype: Annotated[str, typer.Option(help="Of models that are named: float32, bfloat16 or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="Where all runs.")] = "auto",
    impl: Annotated[str, typer.Option(help="Who computes the SAEs, see `info`.")] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")] = False,
    debug: Debug = False,
) -> None:
    """Make one of Gemma Scope's studies of SAEs, or all: a table, a figure and a line each; run again, it goes on."""
    with ending_when_interrupted(["study", "--fresh"] if fresh else ["study"]):
        from .studies import STUDIES
        from .suite import StudyConfig, study_saes
        from .suite.config import ModelSection

    console = Console()
    if list_them:
        width = max(map(len, STUDIES))
        for each in STUDIES.values():
            console.print(f"{each.name:<{width}}  {each.question} ({each.source})", markup=False, soft_wrap=True)
        return
    if name is None or not saes:
        raise ValueError("study: expected NAME SAE..., or --list, got too little")
    if model is None and (revision is not None or (dtype != "auto" and second_model is None)):
        raise ValueError("model: expected --model beside --revision and --dtype, got none")
    section = None if model is None else ModelSection(name=model, revision=revision, dtype=dtype)
    config = StudyConfig(
        saes,
        section,
        text=text or (),
        site=site,
        sequences=sequences,
        context=context,
        outliers=outliers,
        control_tokens=control_tokens,
        draws=draws,
        seed=seed,
        out=out,
        device=device,
        impl=impl,
        second_model=None if second_model is None else ModelSection(name=second_model, dtype=dtype),
    )

    def show(name: str, found: Mapping[str, Any]) -> None:
        images = reporting.write_study(config.folder / f"{name}.json")
        files = ", ".join(str(config.folder / f"{name}.{ending}") for ending in ("csv", "json"))
        console.print(f"{name}: {found['conclusion']}", markup=False, soft_wrap=True)
        console.print(f"  {files}, {', '.join(map(str, images))}", markup=False, soft_wrap=True)

    made = study_saes([name], config, fresh=fresh, on_study=show)
    if made is None:
        return
    for each, why in made.left_out.items():
        console.print(f"{each}: not made. {why}", markup=False, soft_wrap=True)
    for warning in dict.fromkeys(text for found in made.done.values() for text in found["warnings"]):
        console.print(f"Note: {warning}", markup=False, soft_wrap=True)


Weights = Annotated[
    str | None, typer.Option("--dtype", help="Cast to float32, bfloat16, float16 or float64. [default: as they are]")
]


@app.command()
def export(
    saes: Annotated[
        list[str],
        typer.Argument(
            metavar="SAE...", help="Files or folders of SAEs, OWNER/NAME/PATH on the hub, or the folder of a run."
        ),
    ],
    format: Annotated[
        str,
        typer.Option(help="gemma-scope, gemma-scope-2, saelens, circuit-tracer or safetensors.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="New folder.", show_default=False)],
    dtype: Weights = None,
    debug: Debug = False,
) -> None:
    """Write SAEs and transcoders in the format of others, with a model card."""
    with ending_when_interrupted(["export"]):
        from .suite import export_saes

    exported = export_saes(saes, format, out, dtype=dtype_named(dtype))
    console = Console()
    for entry in exported.entries:
        lines = [
            f"{exported.folder / entry.folder}: {entry.kind}, {entry.site or 'site unknown'}, {entry.d_sae} latents"
        ]
        console.print(*lines, *(f"  {change}" for change in entry.changes), sep="\n", markup=False, soft_wrap=True)
    console.print(f"{len(exported.entries)} in {exported.folder}, with README.md", markup=False, soft_wrap=True)


@app.command(name="import")
def import_foreign(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="File or folder of an SAE or a transcoder, or OWNER/NAME/PATH of an SAE on the hub."
        ),
    ],
    out: Annotated[Path, typer.Option(help="New folder.", show_default=False)],
    dtype: Weights = None,
    debug: Debug = False,
) -> None:
    """Read an SAE or a transcoder of any format known here and save it as a folder of ours."""
    with ending_when_interrupted(["import"]):
        from .suite import import_sae

    Console().print(f"{import_sae(source, out, dtype=dtype_named(dtype))} in {out}", markup=False, soft_wrap=True)


def dtype_named(name: str | None) -> torch.dtype | None:
    """The dtype of an option; None where it was not given."""
    if name is None:
        return None
    names = {dtype_name(dtype): dtype for dtype in DTYPES}
    if name not in names:
        raise ValueError(f"dtype: expected {' or '.join(names)}, got {name!r}")
    return names[name]


@app.command(name="report")
def remake_report(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a finished run or evaluation.")],
    debug: Debug = False,
) -> None:
    """Make the table, the plots and the HTML report of a run or an evaluation again."""
    if reporting.is_evaluation(run):
        present_evaluation(run)
    else:
        present(run, reporting.read_results(run))


def present(run: Path, results: dict) -> None:
    """Write the plots and the HTML report of a run, and show its table."""
    plots = reporting.write_plots(run)
    page = reporting.write_html(run)
    console = Console()
    console.print(reporting.final_table(results))
    console.print(f"Report: {page}", f"Plots: {', '.join(map(str, plots))}", sep="\n", markup=False, soft_wrap=True)


def present_evaluation(folder: Path) -> None:
    """Write the plots and the HTML report of an evaluation, and show its table and its warnings."""
    page = reporting.write_evaluation(folder)
    results = reporting.read_evaluation(folder)
    console = Console()
    console.print(reporting.evaluation_table(results))
    for warning in results["warnings"]:
        console.print(f"Note: {warning}", markup=False, soft_wrap=True)
    console.print(f"Report: {page}", markup=False, soft_wrap=True)


@app.command()
def info(debug: Debug = False) -> None:
    """Show versions, devices, and which implementation each kernel would use and why."""
    console = Console()
    facts = [("gemmascope", __version__), ("python", f"{platform.python_version()} on {platform.platform()}")]
    facts += [(package, installed_version(package)) for package in PACKAGES]
    facts += [(device, description) for device, description in devices()]
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        console.print(f"{name:<{width}}  {value}", markup=False, soft_wrap=True)

    table = rich.table.Table(title=f"impl='auto' of {OPERATORS}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("device", "dtype", "implementation", "why"):
        table.add_column(column, overflow="fold")
    for device, _ in devices():
        for dtype in DTYPES:
            choice = choose("auto", device, dtype)
            table.add_row(device, dtype_name(dtype), choice.impl, choice.reason)
    console.print()
    console.print(table)
    console.print()
    for kind in dict.fromkeys("cpu" if name == "cpu" else "cuda" for name, _ in devices()):
        switch, decode = density.training_switch(torch.device(kind)), density.decode_dense_above(torch.device(kind))
        console.print(
            f"{kind}: of all pairs of token and latent, a training step turns dense above {switch.dense_above:g}, "
            f"sparse below {switch.sparse_below:g}; sae(x) decodes by whole matrices above {decode:g}",
            markup=False,
            soft_wrap=True,
        )


def installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[tuple[str, str]]:
    """Name and description of the CPU and of each GPU that torch sees."""
    pages, page_size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [("cpu", f"{processor_name()}, {cores} cores, {pages * page_size / 2**30:.1f} GiB")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append((f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"))
    return found


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def run_command(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; failures are raised."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("gemmascope", list(arguments) or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return 0
