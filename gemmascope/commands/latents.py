"""`dashboards` and `ravel`: what latents do."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..process import ending_when_interrupted
from .app import Debug, app
from .options import (
    AsJson,
    Context,
    Device,
    Fresh,
    Impl,
    Model,
    ModelDtype,
    Revision,
    Saes,
    Sequences,
    SiteOfAll,
    Text,
    named_model,
)
from .present import present_dashboards, present_ravel


@app.command()
def dashboards(
    saes: Saes,
    model: Model = None,
    text: Text = None,
    site: SiteOfAll = None,
    sequences: Sequences = 2048,
    context: Context = None,
    top: Annotated[int, typer.Option(help="Examples with the largest activations, of each latent.")] = 20,
    window: Annotated[int, typer.Option(help="Tokens shown of an example.")] = 32,
    writers: Annotated[
        list[str] | None,
        typer.Option(help="Of site, neuronpedia, delphi, circuit-tracer; repeat, or join by commas. [default: site]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the examples that are drawn.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the dashboards. [default: RUN/dashboards, else runs/dashboards]")
    ] = None,
    revision: Revision = None,
    dtype: ModelDtype = "auto",
    device: Device = "auto",
    fresh: Fresh = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Find what each latent of SAEs does: examples, histograms, logits; the same command goes on where it stopped."""
    with ending_when_interrupted(["dashboards", "--fresh"] if fresh else ["dashboards"]):
        from ..dashboards.table import Sizes
        from ..suite import DashboardConfig, make_dashboards

    config = DashboardConfig(
        saes,
        named_model(model, revision, dtype),
        text=text or (),
        site=site,
        sequences=sequences,
        context=context,
        sizes=Sizes(top=top, window=window),
        writers=[name for given in writers or ["site"] for name in given.split(",")],
        seed=seed,
        out=out,
        device=device,
    )
    found = make_dashboards(config, fresh=fresh)
    if found is None:
        return
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        present_dashboards(config.folder, found)


@app.command()
def ravel(
    saes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SAE]...",
            help="Folder of a run; files or folders of SAEs; OWNER/NAME/PATH on the hub. None: controls alone.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Gemma or GPT-2: a folder, or a name on the hub. [default: that of the run]")
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(help="Of every SAE: layer_12/resid, … [default: what each says]. Without SAEs: repeat for more."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of RAVEL's own files. [default: built-in cities]", show_default=False)
    ] = None,
    entity_type: Annotated[str, typer.Option(help="Of the data: city, nobel_prize_winner, …")] = "city",
    attribute: Annotated[
        list[str] | None, typer.Option(help="Of the entities; repeat, at least two. [default: all]")
    ] = None,
    templates: Annotated[int | None, typer.Option(help="Of each attribute and split, at most.")] = None,
    control: Annotated[
        list[str] | None, typer.Option(help="neurons, pca, random, das, mdas; repeat. [default: all]")
    ] = None,
    preset: Annotated[str, typer.Option(help="ravel, sae-ravel or saebench: the defaults of what follows.")] = "ravel",
    bos: Annotated[bool | None, typer.Option("--bos/--no-bos", help="Whether prompts begin with BOS.")] = None,
    entities: Annotated[int | None, typer.Option(help="At most, those the model knows best.")] = None,
    labels: Annotated[str | None, typer.Option(help="first: their first token counts; single: they have one.")] = None,
    score: Annotated[str | None, typer.Option(help="first-token or string.")] = None,
    known: Annotated[str | None, typer.Option(help="any or every prompt must be answered rightly.")] = None,
    pairs: Annotated[int | None, typer.Option(help="To train on, of each task and attribute.")] = None,
    test_pairs: Annotated[int | None, typer.Option(help="The same of each part of the test.")] = None,
    split: Annotated[str | None, typer.Option(help="entities or pairs.")] = None,
    source: Annotated[str | None, typer.Option(help="Prompt of the source: attribute or same.")] = None,
    clashes: Annotated[str | None, typer.Option(help="Labels of one first token: drop, keep or isolate.")] = None,
    error: Annotated[str | None, typer.Option(help="What the SAE does not reconstruct: keep or drop.")] = None,
    mask: Annotated[str | None, typer.Option(help="In the test: hard or soft.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Of the temperature: linear or log.")] = None,
    temperature_start: Annotated[float | None, typer.Option(help="Of the mask.")] = None,
    temperature_end: Annotated[float | None, typer.Option(help="Of the mask.")] = None,
    lr: Annotated[float | None, typer.Option(help="Of Adam, for masks.")] = None,
    rotation_lr: Annotated[float | None, typer.Option(help="The same for directions.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs of a step.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of masks.")] = None,
    rotation_epochs: Annotated[int | None, typer.Option(help="Where directions are learnt too.")] = None,
    l1: Annotated[float | None, typer.Option(help="Weight of the mask's sum in the loss.")] = None,
    directions: Annotated[int | None, typer.Option(help="That DAS exchanges.")] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each intervention.")] = 1,
    draws: Annotated[int, typer.Option(help="Of the bootstrap over entities.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of pairs, orders and directions; the first of --seeds.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results. [default: RUN/ravel, else runs/ravel]")
    ] = None,
    revision: Revision = None,
    dtype: ModelDtype = "auto",
    device: Device = "auto",
    impl: Impl = "auto",
    fresh: Fresh = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Does a mask over the latents move one attribute of an entity and no other? SAEs beside neurons, PCA and DAS."""
    with ending_when_interrupted(["ravel", "--fresh"] if fresh else ["ravel"]):
        from ..ravel import CONTROLS, protocol_of
        from ..suite import RavelConfig, ravel_saes

    names = (
        "bos",
        "entities",
        "labels",
        "score",
        "known",
        "pairs",
        "test_pairs",
        "split",
        "source",
        "clashes",
        "error",
    )
    names += ("mask", "schedule", "temperature_start", "temperature_end", "lr", "batch_size", "epochs")
    names += ("rotation_lr", "rotation_epochs", "l1", "directions")
    given = locals()
    config = RavelConfig(
        saes or (),
        named_model(model, revision, dtype),
        sites=site or (),
        data=data,
        entity_type=entity_type,
        attributes=attribute or (),
        templates=templates,
        controls=control or CONTROLS,
        protocol=protocol_of(preset, **{name: given[name] for name in names}),
        seeds=seeds,
        seed=seed,
        draws=draws,
        out=out,
        device=device,
        impl=impl,
    )
    found = ravel_saes(config, fresh=fresh)
    if found is None:
        return
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        present_ravel(config.folder)
