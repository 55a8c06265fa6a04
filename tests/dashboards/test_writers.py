"""Files for others, each against a golden file, and as their readers take them.

pytest tests/dashboards/test_writers.py; with GOLDEN=1 in the environment the golden files are written anew.
"""

import gzip
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gemmascope.dashboards import circuit_tracer, delphi, neuronpedia
from gemmascope.dashboards.codes import CodeStream, Piece, read_piece
from gemmascope.dashboards.naming import plain_names
from gemmascope.dashboards.overview import Overview
from gemmascope.errors import BadFileError, EnvironmentProblemError
from gemmascope.kernels import SparseCode

from . import small

GOLDEN = Path(__file__).parent / "golden"
CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture(scope="module")
def overview(tmp_path_factory) -> Overview:
    return small.write(tmp_path_factory.mktemp("overview"))


def assert_golden(name: str, found: Any) -> None:
    path = GOLDEN / name
    if os.environ.get("GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1, ensure_ascii=True, sort_keys=True) + "\n")
    assert found == json.loads(path.read_text())


def lines(path: Path) -> list[Any]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode().splitlines()]


# ---- Neuronpedia


def test_neuronpedia(overview, tmp_path):
    steps = []
    written = neuronpedia.write(overview, tmp_path, created=CREATED, check=steps.append)
    found = {path.relative_to(tmp_path).as_posix(): lines(path) for path in written}
    assert_golden("neuronpedia.json", found)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(written)
    assert steps == [3, 6]


def test_neuronpedia_in_batches_of_the_same_bytes(overview, tmp_path, monkeypatch):
    whole = neuronpedia.write(overview, tmp_path / "a", created=CREATED)
    again = neuronpedia.write(overview, tmp_path / "b", created=CREATED)
    assert [path.read_bytes() for path in whole] == [path.read_bytes() for path in again]
    monkeypatch.setattr(neuronpedia, "LATENTS_OF_BATCH", 2)
    place = tmp_path / "c" / "tiny-it" / "1-resid-width_3"
    neuronpedia.write(overview, tmp_path / "c", created=CREATED)
    parts = [[line["index"] for line in lines(place / "features" / f"batch-{n}.jsonl.gz")] for n in (0, 1)]
    assert parts == [["0", "1"], ["2"]]
    written = {path.name for path in (place / "activations").iterdir()}
    assert written == {"batch-0.jsonl.gz"}  # the other's latent never fired, and the import fails at an empty file


# The columns of Neuronpedia's database that are neither optional nor filled in by itself, which an import needs:
# schema.prisma and app/api/admin/import/route.ts in apps/webapp of hijohnnylin/neuronpedia, ebb8426.
NEEDED = {
    "release.jsonl": "name description creatorName creatorId",
    "model.jsonl": "id creatorId layers neuronsPerLayer owner",
    "sourceset.jsonl": "modelId name description creatorName creatorId",
    "source.jsonl": "id modelId setName creatorId",
    "features": "modelId layer index",
    "activations": "id tokens index layer modelId maxValue maxValueTokenIndex minValue values creatorId",
}


def test_neuronpedia_has_what_its_database_needs(overview, tmp_path):
    written = neuronpedia.write(overview, tmp_path, created=CREATED)
    for path in written:
        name = path.name if path.name in NEEDED else path.parent.name
        found = lines(path)
        assert found
        assert all(line.keys() == found[0].keys() for line in found)  # it takes the columns of the first
        for column in NEEDED[name].split():
            assert all(line[column] is not None for line in found)
        if path.suffix == ".jsonl":
            assert found[0].get("visibility", "PRIVATE") == "PUBLIC"


def test_neuronpedia_identifies_every_activation(overview, tmp_path):
    written = neuronpedia.write(overview, tmp_path, created=CREATED)
    ids = [line["id"] for path in written if path.parent.name == "activations" for line in lines(path)]
    assert len(set(ids)) == len(ids) == 12
    assert {len(each) for each in ids} == {25}


# ---- circuit-tracer


def test_circuit_tracer(overview, tmp_path):
    steps = []
    written = circuit_tracer.write(overview, tmp_path, check=steps.append)
    found = {path.relative_to(tmp_path).as_posix(): json.loads(path.read_text("utf-8")) for path in written}
    assert_golden("circuit_tracer.json", found)
    assert steps == [3, 6]


def test_percentiles_are_of_where_it_fires():
    """Within a bin of the exact ones, the last exact."""
    f = torch.zeros(2, 6, 3)
    f[small.COUNTED] = torch.rand(int(small.COUNTED.sum()), 3, generator=torch.Generator().manual_seed(0)) + 0.1
    f[..., 1] *= small.COUNTED & (torch.arange(12).view(2, 6) > 5)
    f[..., 2] = 0
    table = small.table(f)
    assert table.percentiles(2) == []
    for latent in (0, 1):
        fires = f[..., latent][f[..., latent] > 0]
        found = table.percentiles(latent)
        assert found == sorted(found)
        assert found[-1] == fires.max().item()
        width = table.histogram_end[latent].item() / small.SIZES.bins
        for number, value in enumerate(found, start=1):
            exact = fires.sort().values[-(-number * len(fires) // 100) - 1].item()
            assert exact // width * width <= value <= (exact // width + 1) * width


def test_percentiles_of_evenly_filled_bins():
    """Two activations in (0, 1], one in each of (1, 2] and (2, 3], of bins of width 1."""
    f = torch.zeros(2, 6, 3)
    f[0, 1:5, 0] = torch.tensor([0.25, 0.5, 1.5, 2.75])
    found = small.table(f).percentiles(0)
    assert [found[number - 1] for number in (25, 50, 75, 100)] == [0.5, 1.0, 2.0, 2.75]
    assert found[61] == pytest.approx(1.48)


def test_every_layer_and_latent_has_a_number_of_its_own():
    numbers = {circuit_tracer.cantor(layer, latent) for layer in range(30) for latent in range(200)}
    assert len(numbers) == 30 * 200
    assert circuit_tracer.cantor(0, 0) == 0
    assert circuit_tracer.cantor(2, 3) == 18


# ---- delphi


def pieces(f=small.F, cuts=(1,)) -> list[Piece]:
    found = []
    for start, end in zip((0, *cuts), (*cuts, len(f)), strict=True):
        counted = small.COUNTED[start:end]
        stream = CodeStream()
        stream.add(SparseCode.from_dense(f[start:end][counted]), counted, start)
        token, latent, value = (torch.cat(parts) for parts in zip(*stream._parts, strict=True))
        found.append(Piece(token, latent, value))
    return found


def contents(written: list[Path]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in written:
        if path.suffix == ".json":
            found[path.name] = json.loads(path.read_text())
            continue
        tensors = load_file(path)
        found[path.name] = {
            name: {"dtype": str(x.dtype), "shape": list(x.shape), "values": x.tolist()} for name, x in tensors.items()
        }
    return found


def test_delphi(overview, tmp_path):
    written = delphi.write(tmp_path / "whole", 3, overview, pieces, splits=2)
    assert_golden("delphi.json", contents(written))
    other = delphi.write(tmp_path / "cut", 3, overview, lambda: pieces(cuts=()), splits=2)
    assert [path.read_bytes() for path in other] == [path.read_bytes() for path in written]


@pytest.mark.parametrize("splits", [1, 2, 3, 5])
def test_delphi_reads_all_that_fires(overview, tmp_path, splits):
    """As its loader does: each file's latents begin at the first number of its name."""
    written = delphi.write(tmp_path, 3, overview, pieces, splits)
    f = torch.zeros_like(small.F)
    ranges = []
    for path in written[:-1]:
        start, end = map(int, path.stem.split("_"))
        ranges += range(start, end + 1)
        tensors = load_file(path)
        row, position, latent = tensors["locations"].long().T
        f[row, position, latent + start] = tensors["activations"].float()
        assert torch.equal(tensors["tokens"], small.TOKENS.long())
    assert ranges == [0, 1, 2]
    assert torch.equal(f, small.F)
    config = json.loads(written[-1].read_text())
    assert config["n_splits"] == len(ranges) if splits >= 3 else splits
    assert config["cache_ctx_len"] == 6


def test_delphi_takes_the_smallest_for_zero(overview, tmp_path):
    f = small.F.clone()
    f[1, 1, 0], f[1, 2, 0] = 1e-5, 1.1e-5
    written = delphi.write(tmp_path, 3, overview, lambda: pieces(f), splits=1)
    locations = load_file(written[0])["locations"].tolist()
    assert [0, 1, 0] in locations
    assert [1, 2, 0] in locations
    assert [1, 1, 0] not in locations


def test_delphi_has_wider_numbers_for_wide_saes(overview, tmp_path):
    made = [Piece(torch.tensor([1]), torch.tensor([65536], dtype=torch.int32), torch.tensor([1.0]))]
    written = delphi.write(tmp_path, 65537, overview, lambda: made, splits=1)
    locations = load_file(written[0])["locations"]
    assert locations.dtype == torch.uint32
    assert locations.tolist() == [[0, 1, 65536]]
    written = delphi.write(tmp_path / "two", 65537, overview, lambda: made, splits=2)
    assert [load_file(path)["locations"].dtype for path in written[:-1]] == [torch.uint16] * 2


def test_what_float16_cannot_hold(overview, tmp_path):
    f = small.F.clone()
    f[0, 1, 0] = 65536
    with pytest.raises(EnvironmentProblemError, match="expected activations of at most 65504, which float16 holds"):
        delphi.write(tmp_path / "cache", 3, overview, lambda: pieces(f))
    assert not list(tmp_path.rglob("*.safetensors"))


# ---- codes on their way to disk


def test_a_stream_is_read_back(tmp_path):
    stream = CodeStream()
    for row in (0, 1):
        counted = small.COUNTED[row : row + 1]
        stream.add(SparseCode.from_dense(small.F[row : row + 1][counted]), counted, row)
    assert stream.nbytes == 4 * 16
    entry = stream.write(tmp_path / "a.safetensors")
    assert stream.nbytes == 0
    piece = read_piece(tmp_path / "a.safetensors", entry)
    f = torch.zeros(12, 3).index_put((piece.token, piece.latent.long()), piece.value)
    assert torch.equal(f.view_as(small.F), small.F)
    empty = stream.write(tmp_path / "b.safetensors")
    assert [len(part) for part in read_piece(tmp_path / "b.safetensors", empty)] == [0, 0, 0]
    with pytest.raises(BadFileError, match="another checksum"):
        read_piece(tmp_path / "b.safetensors", entry)


def test_names_for_others():
    names = ["a/b c", "a.b.c", "../..", "日本", "A.B.C", "-x_1"]
    assert plain_names(names) == ["a-b-c", "a-b-c_2", "sae", "sae_2", "A-B-C_3", "x_1"]
