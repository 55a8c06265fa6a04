"""Tables, pictures and one HTML page, from recorded rows only."""

import argparse
import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from bench.cases import judge
from bench.reporting import records, tables
from bench.reporting.tables import Row
from gemmascope.formats.files import atomic_write
from gemmascope.reporting.html import document, figure, section

OUT = Path("runs/bench")
STYLE = "pre.table { background: none; padding: 0; }\n"
CASE = ("suite", "shape", "tokens", "target_l0", "dtype", "skew", "beta1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", type=Path, help="rows; default: every file of the results")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder of the results")
    parser.add_argument("--suite", nargs="+", default=(), help="only these suites")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the pictures and the page")


def machine_key(row: Row) -> tuple[str, int]:
    return row["machine"]["device"], row["machine"]["threads"]


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of every part of every contender in every case on every machine, the rows of its last run. A run that was to time
    a part and did not, because the contender failed, counts."""
    rows, last = list(rows), {}

    def runs(row: Row, parts: Iterable[str]) -> list[tuple]:
        return [(machine_key(row), *(row[name] for name in CASE), row["contender"], part) for part in parts]

    for row in rows:
        for run in runs(row, row["parts"]):
            last[run] = max(last.get(run, ""), row["machine"]["date"])

    def counts(row: Row) -> bool:
        parts = [row["part"]] if "part" in row else row["parts"]
        return any(last[run] == row["machine"]["date"] for run in runs(row, parts))

    return [row for row in rows if counts(row)]


def by_machine(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["suite"], *machine_key(row)), []).append(row)
    return groups


def machine_of(rows: Sequence[Row]) -> Row:
    """What the newest of the rows says of the machine, with the versions that any of them names."""
    machine = max((row["machine"] for row in rows), key=lambda machine: machine["date"])
    versions = dict(machine["versions"])
    for row in rows:
        versions |= row.get("versions", {})
    return machine | {"versions": versions}


def text_of(suite: str, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(title, table) of each case of one suite on one machine, the bars last."""
    found = []
    for title, of_case in tables.by_case(rows).items():
        found.append((title, "\n".join(tables.case_lines(of_case))))
    bars = judge(suite, [dict(row) for row in rows])
    if bars:
        found.append(("Bars", "\n".join(tables.bar_lines(bars))))
    return found


def page(sections: Sequence[tuple[str, str, bytes | None, list[tuple[str, str]]]]) -> str:
    """sections: (title, machine, PNG, tables by title)."""
    body = []
    for title, machine, image, texts in sections:
        parts = [f"<p>{escape(machine)}</p>"]
        if image is not None:
            parts.append(figure(image, title))
        parts += [f"<h3>{escape(name)}</h3>\n<pre class=table>{escape(text)}</pre>" for name, text in texts]
        body.append(section(title, "\n".join(parts)))
    content = "\n".join(body)
    return document(
        "gemmascope: benchmarks",
        f"""<h1>Benchmarks</h1>
<p>Times are medians; contenders of a case ran in turn on the same activations and weights, after their results had been
checked. "x ours" is how many times as long as ours a contender takes. The roofline is what the machine itself reached
in the same run: a large copy and a large product.</p>
{content}""",
        STYLE,
    )


def slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def save(path: Path, content: bytes) -> Path:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    return path


def main(given: argparse.Namespace) -> int:
    files = given.files or sorted(given.results.glob("*.jsonl"))
    # Rows of what is not timed part by part have pages of their own.
    rows = newest(row for path in files for row in records.read(path) if "parts" in row)
    groups = {key: rows for key, rows in sorted(by_machine(rows).items()) if not given.suite or key[0] in given.suite}
    if not groups:
        raise ValueError(
            f"results: expected rows in {given.results}, found none; python -m bench run --save makes them"
        )
    from bench.reporting import pictures  # matplotlib, which timing on a bare GPU machine does without

    sections, written = [], []
    for (suite, device, threads), of_machine in groups.items():
        machine = tables.machine_line(machine_of(of_machine))
        times = [row for row in of_machine if row["kind"] == "time"]
        image = None
        if times:
            same = sum(key[0] == suite for key in groups)
            name = suite if same == 1 else f"{suite}-{slug(device)}-{threads}"
            stream = io.BytesIO()
            pictures.picture(suite, times, machine).savefig(stream, format="png")
            image = stream.getvalue()
            written.append(save(given.out / f"{name}.png", image))
        texts = text_of(suite, of_machine)
        sections.append((f"Suite {suite}", machine, image, texts))
        print(f"\n== {suite}: {machine}")
        for title, text in texts:
            print(f"\n{title}\n{text}")
    written.append(save(given.out / "bench.html", page(sections).encode()))
    print(json.dumps({"files": [str(path) for path in written]}))
    return 0
