"""`check`, `evaluate`, `study` and `probe`: how good SAEs are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import reporting
from ..process import ending_when_interrupted
from .app import DOES_NOT_FIT, Console, Debug, app
from .options import (
    AsJson,
    Context,
    ControlTokens,
    Device,
    Fresh,
    Impl,
    Model,
    ModelDtype,
    Outliers,
    Revision,
    SaeArgument,
    Saes,
    Sequences,
    SiteOfAll,
    Text,
    named_model,
)
from .present import present_evaluation, present_probing, present_study


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
    revision: Revision = None,
    dtype: Annotated[str, typer.Option(help="Of the model: float32, bfloat16 or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="Where both run.")] = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Does this SAE fit this model here? A line for each thing that is often wrong; exit code 6 when it does not."""
    with ending_when_interrupted(["check"]):
        from ..suite import CheckConfig, check_sae
        from ..suite.config import ModelSection

    section = ModelSection(name=model, revision=revision, dtype=dtype)
    found = check_sae(
        CheckConfig(sae, section, text=text or (), site=site, bos=bos, tokens=tokens, context=context, device=device)
    )
    print(json.dumps(found.to_dict(), indent=2) if as_json else "\n".join(found.lines()))
    if not found.fits:
        raise typer.Exit(DOES_NOT_FIT)


@app.command()
def evaluate(
    saes: Saes,
    model: Model = None,
    text: Text = None,
    site: SiteOfAll = None,
    sequences: Sequences = 2048,
    context: Context = None,
    outliers: Outliers = None,
    control_tokens: ControlTokens = 65536,
    draws: Annotated[int, typer.Option(help="Of the bootstrap over documents.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results. [default: RUN/evaluation, else runs/evaluation]")
    ] = None,
    revision: Revision = None,
    dtype: ModelDtype = "auto",
    device: Device = "auto",
    fresh: Fresh = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Judge SAEs of any kind by Gemma Scope's protocol, beside controls; the same command goes on where it stopped."""
    with ending_when_interrupted(["evaluate", "--fresh"] if fresh else ["evaluate"]):
        from ..suite import EvaluateConfig, evaluate_saes

    config = EvaluateConfig(
        saes,
        named_model(model, revision, dtype),
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
    saes: Annotated[list[str] | None, SaeArgument] = None,
    list_them: Annotated[bool, typer.Option("--list", help="Show the studies and what each asks.")] = False,
    model: Model = None,
    second_model: Annotated[
        str | None, typer.Option(help="Of the same shape, for the study transfer: a folder, or a name on the hub.")
    ] = None,
    text: Text = None,
    site: SiteOfAll = None,
    sequences: Sequences = 2048,
    context: Context = None,
    outliers: Outliers = None,
    without_outliers: Annotated[
        bool, typer.Option("--no-outliers", help="Leave outliers out, as a run with drop_norm did. See --outliers.")
    ] = False,
    control_tokens: ControlTokens = 65536,
    draws: Annotated[int, typer.Option(help="Of the bootstrap over documents.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap and of what is drawn.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results. [default: RUN/studies, else runs/studies]")
    ] = None,
    revision: Revision = None,
    dtype: ModelDtype = "auto",
    device: Device = "auto",
    impl: Impl = "auto",
    fresh: Fresh = False,
    debug: Debug = False,
) -> None:
    """Make one of Gemma Scope's studies of SAEs, or all: a table, a figure and a line each; run again, it goes on."""
    with ending_when_interrupted(["study", "--fresh"] if fresh else ["study"]):
        from ..studies import STUDIES
        from ..suite import StudyConfig, study_saes
        from ..suite.config import ModelSection

    console = Console()
    if list_them:
        width = max(map(len, STUDIES))
        for each in STUDIES.values():
            console.print(f"{each.name:<{width}}  {each.question} ({each.source})", markup=False, soft_wrap=True)
        return
    if name is None or not saes:
        raise ValueError("study: expected NAME SAE..., or --list, got too little")
    config = StudyConfig(
        saes,
        named_model(model, revision, "auto" if model is None and second_model is not None else dtype),
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
        without_outliers=without_outliers,
    )

    def show(name: str, found: Mapping[str, Any]) -> None:
        present_study(config.folder / f"{name}.json", found)

    made = study_saes([name], config, fresh=fresh, on_study=show)
    if made is None:
        return
    reporting.link_from_run(config.folder)
    for each, why in made.left_out.items():
        console.print(f"{each}: not made. {why}", markup=False, soft_wrap=True)
    for warning in dict.fromkeys(text for found in made.done.values() for text in found["warnings"]):
        console.print(f"Note: {warning}", markup=False, soft_wrap=True)


@app.command()
def probe(
    saes: Saes,
    model: Model = None,
    text: Text = None,
    labels: Annotated[
        Path | None, typer.Option(help='Instead: a .jsonl file of {"text": …, "label": …}, a document a line.')
    ] = None,
    site: SiteOfAll = None,
    k: Annotated[
        list[int] | None, typer.Option(help="Latents that a probe reads; repeat. [default: 1, 2, 5, 16]")
    ] = None,
    splits: Annotated[int, typer.Option(help="Of the documents into halves, to train on and to judge on.")] = 3,
    sequences: Sequences = 2048,
    context: Context = None,
    tokens: Annotated[int, typer.Option(help="Of text, at most.")] = 65536,
    draws: Annotated[int, typer.Option(help="Of the bootstrap over documents.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the first split and of the bootstrap.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results. [default: RUN/probing, else runs/probing]")
    ] = None,
    revision: Revision = None,
    dtype: ModelDtype = "auto",
    device: Annotated[str, typer.Option(help="Where model and SAEs run.")] = "auto",
    impl: Impl = "auto",
    fresh: Fresh = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """What a few latents tell of labels of the text: k-sparse probes, beside coordinates and a random dictionary."""
    with ending_when_interrupted(["probe", "--fresh"] if fresh else ["probe"]):
        from ..suite import ProbeConfig, probe_saes

    given: dict[str, Any] = {} if k is None else {"ks": sorted(k)}
    config = ProbeConfig(
        saes,
        named_model(model, revision, dtype),
        text=text or (),
        labels=labels,
        site=site,
        splits=splits,
        sequences=sequences,
        context=context,
        tokens=tokens,
        draws=draws,
        seed=seed,
        out=out,
        device=device,
        impl=impl,
        **given,
    )
    found = probe_saes(config, fresh=fresh)
    if found is None:
        return
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        present_probing(config.folder)
