"""The figures and the HTML page of a run, written into its folder from the files there."""

import os
from pathlib import Path
from typing import Any

from ..errors import BadFileError
from ..formats.files import as_path, atomic_write, read_json
from . import page
from .results import PLOTS, RESULTS, read_frequencies, read_log, read_results


def write_plots(run_dir: str | os.PathLike) -> list[Path]:
    """Draw the figures of a run into ``run_dir``/plots and return their paths. Needs matplotlib."""
    from . import plots

    saes = read_results(run_dir)["saes"]
    figures = {
        "training_curves": plots.training_curves(saes, read_log(run_dir)),
        "l0_fvu": plots.l0_against_fvu(saes),
        "firing_frequency": plots.firing_frequencies(saes, read_frequencies(run_dir)),
        "delta_loss": plots.loss_increases(saes),
    }
    folder = Path(run_dir) / "plots"
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        with atomic_write(paths[-1]) as temporary:
            figure.savefig(temporary, format="png", facecolor="white")
    return paths


def write_study(path: str | os.PathLike) -> tuple[Path, Path]:
    """Draw the study whose JSON is ``path`` as an SVG and a PNG beside it; their paths. Needs matplotlib."""
    import matplotlib

    from .study_plots import draw

    path = as_path("path", path)
    figure = draw(read_json(path))
    found = (path.with_suffix(".svg"), path.with_suffix(".png"))
    # The same rows give the same bytes.
    settings: Any = {"svg.hashsalt": path.stem, "svg.fonttype": "none"}
    for image in found:
        options: dict[str, Any] = {"metadata": {"Date": None}} if image.suffix == ".svg" else {}
        with atomic_write(image) as temporary, matplotlib.rc_context(settings):
            figure.savefig(temporary, format=image.suffix[1:], facecolor="white", **options)
    return found


def write_html(run_dir: str | os.PathLike) -> Path:
    """Write ``run_dir``/report.html, one self-contained page, and return its path. Draws missing plots first."""
    run_dir = as_path("run_dir", run_dir)
    results = read_results(run_dir)
    images = {name: run_dir / "plots" / f"{name}.png" for name in PLOTS}
    if not all(image.is_file() for image in images.values()):
        write_plots(run_dir)
    path = run_dir / "report.html"
    with atomic_write(path) as temporary:
        temporary.write_text(page.render(run_dir, results, images), encoding="utf-8")
    return path


def link_from_run(folder: str | os.PathLike) -> Path | None:
    """Write the page of the run anew that ``folder``, of an evaluation, say, lies in, so that it links there. Returns
    the page; None where there is none: in another place, or in a run that is not finished."""
    run_dir = as_path("folder", folder).parent
    if not (run_dir / "report.html").is_file() or not (run_dir / RESULTS).is_file():
        return None
    try:
        return write_html(run_dir)
    except BadFileError:
        return None
