"""`Overview`: the folder of dashboards: the text, the strings of its tokens, and the table of every SAE.

overview.json, written last, has what follows and the size and SHA-256 of each file. text.safetensors holds the rows of
text; vocabulary.safetensors the strings of the tokens that occur in it or in a table; tables/0000.safetensors, … the
tables, in the order of the SAEs.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_int
from ..errors import BadFileError
from ..formats.files import as_path, read_manifest, seal, shown, write_json
from ..sites import Site
from ..version import __version__
from .table import Bounds, Examples, LatentTable, Sizes, load, read, save, window_start

OVERVIEW, TEXT, VOCABULARY, TABLES = "overview.json", "text.safetensors", "vocabulary.safetensors", "tables"
FORMAT, FORMAT_VERSION = "gemmascope-dashboards", 1
LARGEST = (1 << 31) - 1
MOST_TABLES = 10_000
_KEYS = {
    *("format", "format_version", "gemmascope", "model", "what", "seed", "sizes", "rows", "context", "n_tokens"),
    *("vocabulary", "saes", "text_file", "vocabulary_file", "sha256"),
}
_SAE_KEYS = {"name": str, "reads": str, "writes": str, "kind": str, "d_sae": int, "n_sampled": int, "facts": dict}


@dataclass(frozen=True, eq=False)
class Text:
    """The rows that were read. tokens: int32 [rows, context]; counted: bool of that shape, which of them are text; all
    others are special tokens and padding, on which nothing is said to fire."""

    tokens: Tensor
    counted: Tensor

    @property
    def context(self) -> int:
        return self.tokens.shape[1]


class Vocabulary(Mapping[int, str]):
    """Token id → its string, of the ids that occur. A string may be empty, and hold any character."""

    def __init__(self, strings: Mapping[int, str]):
        self._strings = dict(sorted(strings.items()))

    def __getitem__(self, token: int) -> str:
        return self._strings[token]

    def __iter__(self):
        return iter(self._strings)

    def __len__(self) -> int:
        return len(self._strings)

    def of(self, tokens: Tensor) -> list[str]:
        """The strings of ids [n]; that of −1, no token, is empty."""
        return ["" if token < 0 else self._strings[token] for token in tokens.tolist()]

    def lacking(self, tokens: Tensor) -> list[int]:
        """The ids among ``tokens`` that have no string here, ascending; −1 needs none."""
        return [token for token in tokens.unique().tolist() if token >= 0 and token not in self._strings]

    def tensors(self) -> dict[str, Tensor]:
        """``ids`` int32 [n] ascending, ``utf8`` uint8 of all strings, ``ends`` int64 [n]: where each of them ends."""
        encoded = [string.encode() for string in self._strings.values()]
        ends = torch.tensor([len(each) for each in encoded], dtype=torch.int64, device="cpu").cumsum(0)
        return {
            "ids": torch.tensor(list(self._strings), dtype=torch.int32, device="cpu"),
            "ends": ends,
            "utf8": torch.frombuffer(bytearray(b"".join(encoded) or b"\0"), dtype=torch.uint8),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Vocabulary":
        """Raises ValueError for tensors that are none of a vocabulary."""
        ids, ends, data = tensors["ids"].tolist(), tensors["ends"].tolist(), tensors["utf8"].numpy().tobytes()
        starts = [0, *ends[:-1]] if ends else []
        ascending = all(a < b for a, b in itertools.pairwise(ids)) and (not ids or ids[0] >= 0)
        whole = len(ids) == len(ends) and all(a <= b <= len(data) for a, b in zip(starts, ends, strict=True))
        if not (ascending and whole):
            raise ValueError("expected ascending ids and ends, found others")
        return cls({token: data[a:b].decode() for token, a, b in zip(ids, starts, ends, strict=True)})


@dataclass(frozen=True)
class TableOf:
    """An SAE of an overview. facts: what a row of results says of it, values of JSON."""

    name: str
    reads: Site
    writes: Site
    kind: str
    d_sae: int
    n_sampled: int
    facts: Mapping[str, Any]


class Shown(NamedTuple):
    """The window of an example: its tokens, the activation on each, and which of them the example is of."""

    tokens: list[str]
    values: list[float]
    at: int


class Overview:
    """Dashboards as they lie in a folder. Tables are read when asked for.

    overview = Overview.open("runs/demo/dashboards")
    for of in overview.saes:
        table = overview.table(of.name)  # a `LatentTable`
        overview.vocabulary.of(overview.window_tokens(table.top)[0, 0])
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], text: Text, vocabulary: Vocabulary):
        self.folder, self.text, self.vocabulary = folder, text, vocabulary
        self.model: str = manifest["model"]
        """The name of the language model."""
        self.what: str = manifest["what"]
        """What the text is, in words."""
        self.seed: int = manifest["seed"]
        self.version: str = manifest["gemmascope"]
        """Of the package that wrote it."""
        self.n_tokens: int = manifest["n_tokens"]
        """Tokens counted."""
        self.n_vocabulary: int = manifest["vocabulary"]
        """Tokens that the model has; ids are below it."""
        self.sizes = Sizes(**manifest["sizes"])
        self.saes = tuple(
            TableOf(
                **{
                    **{key: each[key] for key in _SAE_KEYS},
                    "reads": Site.parse(each["reads"]),
                    "writes": Site.parse(each["writes"]),
                }
            )
            for each in manifest["saes"]
        )
        self._files = {each["name"]: each["file"] for each in manifest["saes"]}

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "Overview":
        """Raises BadFileError for what is no overview, and for one that is damaged. Tables are checked when read."""
        folder = as_path("folder", folder)
        path = folder / OVERVIEW
        manifest = read_manifest(path, FORMAT, FORMAT_VERSION)
        content = {key: value for key, value in manifest.items() if key != "sha256"}
        if manifest.keys() != _KEYS or manifest["sha256"] != seal(content) or not _is_whole(manifest):
            raise BadFileError(f"{shown(path)}: expected the overview as it was written, found it changed")
        shape = (manifest["rows"], manifest["context"])
        layout = {"tokens": (torch.int32, shape), "counted": (torch.bool, shape)}
        text = Text(**read(folder / TEXT, manifest["text_file"], layout))
        low, high = torch.aminmax(text.tokens)
        if int(low) < 0 or int(high) >= manifest["vocabulary"]:
            raise BadFileError(
                f"{shown(folder / TEXT)}: tokens: expected ids from 0 to {manifest['vocabulary'] - 1}, found "
                f"{int(low)} to {int(high)}"
            )
        layout = {"ids": (torch.int32, (None,)), "ends": (torch.int64, (None,)), "utf8": (torch.uint8, (None,))}
        strings = read(folder / VOCABULARY, manifest["vocabulary_file"], layout)
        try:
            vocabulary = Vocabulary.from_tensors(strings)
        except ValueError as error:
            raise BadFileError(f"{shown(folder / VOCABULARY)}: {error}") from error
        if lost := vocabulary.lacking(text.tokens):
            raise BadFileError(f"{shown(folder / VOCABULARY)}: expected the token {lost[0]} of the text, found it not")
        return cls(folder, manifest, text, vocabulary)

    def files(self) -> list[Path]:
        """Those that it consists of, but for the tables."""
        return [self.folder / name for name in (OVERVIEW, TEXT, VOCABULARY)]

    def table(self, name: str) -> LatentTable:
        """Of the SAE of that name. Raises ValueError for another name, BadFileError for a damaged file."""
        found = [(number, each) for number, each in enumerate(self.saes) if each.name == name]
        if not found:
            raise ValueError(f"name: expected that of one of {len(self.saes)} SAEs, got {name!r:.60}")
        [(number, of)] = found
        rows, context = self.text.tokens.shape
        bounds = Bounds(rows, context, self.n_vocabulary, self.n_tokens, of.n_sampled)
        path = table_path(self.folder, number)
        table = load(path, self._files[name], of.d_sae, self.sizes, bounds)
        for part in (table.promoted, table.suppressed):
            if lost := self.vocabulary.lacking(part):
                raise BadFileError(f"{shown(path)}: expected tokens of the vocabulary, found {lost[0]}")
        return table

    def starts(self, examples: Examples) -> Tensor:
        """Where the windows of ``examples`` […] begin in their rows: int64 […], 0 where there is no example."""
        return window_start(examples.position.long(), self.text.context, self.sizes)

    def window_tokens(self, examples: Examples) -> Tensor:
        """The tokens of the windows of ``examples`` […]: int32 […, window], −1 where there is no example."""
        at = self.starts(examples)[..., None] + torch.arange(self.sizes.window, dtype=torch.int64, device="cpu")
        rows = examples.row.long().clamp(min=0)[..., None]
        return self.text.tokens[rows, at].where(examples.there[..., None], -1)

    def shown(self, examples: Examples) -> list[Shown | None]:
        """``examples`` […] one after another as lists; None where there is none."""
        tokens, starts = self.window_tokens(examples).flatten(0, -2).tolist(), self.starts(examples)
        at, windows = (examples.position - starts).flatten().tolist(), examples.window.flatten(0, -2).tolist()
        there, strings = examples.there.flatten().tolist(), self.vocabulary
        return [
            Shown([strings[token] for token in ids], values, own) if is_there else None
            for is_there, ids, values, own in zip(there, tokens, windows, at, strict=True)
        ]


def table_path(folder: Path, number: int) -> Path:
    """Of the table of the SAE of that number, from 0."""
    return folder / TABLES / f"{number:04d}.safetensors"


def write_overview(
    folder: Path,
    *,
    model: str,
    what: str,
    seed: int,
    sizes: Sizes,
    text: Text,
    vocabulary: Vocabulary,
    n_vocabulary: int,
    saes: Sequence[tuple[TableOf, Mapping[str, Any]]],
) -> Overview:
    """Write all but the tables, which are at `table_path` and whose entries `LatentTable.save` returned.

    Raises ValueError for SAEs of one name and for tokens beyond the vocabulary.
    """
    check_int("n_vocabulary", n_vocabulary, 1, LARGEST)
    names = [of.name for of, _ in saes]
    if len(set(names)) < len(names) or not 0 < len(names) <= MOST_TABLES:
        raise ValueError(f"saes: expected 1 to {MOST_TABLES} SAEs of different names, got {len(names)}")
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "gemmascope": __version__,
        "model": model,
        "what": what,
        "seed": seed,
        "sizes": asdict(sizes),
        "rows": text.tokens.shape[0],
        "context": text.tokens.shape[1],
        "n_tokens": int(text.counted.sum()),
        "vocabulary": n_vocabulary,
        "saes": [
            {
                **{key: getattr(of, key) for key in _SAE_KEYS},
                "reads": str(of.reads),
                "writes": str(of.writes),
                "file": dict(entry),
            }
            for of, entry in saes
        ],
        "text_file": save(folder / TEXT, {"tokens": text.tokens, "counted": text.counted}),
        "vocabulary_file": save(folder / VOCABULARY, vocabulary.tensors()),
    }
    write_json(folder / OVERVIEW, content | {"sha256": seal(content)})
    return Overview.open(folder)


def _is_whole(manifest: Mapping[str, Any]) -> bool:
    file = {"file": str, "bytes": int, "sha256": str}
    try:
        sizes = Sizes(**manifest["sizes"])
        names = [each["name"] for each in manifest["saes"]]
        for index, each in enumerate(manifest["saes"]):
            entry = each["file"]
            if {key: type(value) for key, value in each.items()} != _SAE_KEYS | {"file": dict}:
                return False
            if {key: type(value) for key, value in entry.items()} != file:
                return False
            if entry["file"] != f"{index:04d}.safetensors" or not 0 < each["d_sae"] <= LARGEST or each["n_sampled"] < 0:
                return False
            for site in (each["reads"], each["writes"]):
                Site.parse(site)
        return (
            0 < len(set(names)) == len(names) <= MOST_TABLES
            and all(type(manifest[key]) is str for key in ("gemmascope", "model", "what"))
            and all(type(manifest[key]) is int for key in ("seed", "rows", "context", "n_tokens", "vocabulary"))
            and manifest["rows"] > 0
            and sizes.window <= manifest["context"] <= LARGEST
            and 0 <= manifest["n_tokens"] <= manifest["rows"] * manifest["context"]
            and 0 < manifest["vocabulary"] <= LARGEST
            and all(
                {key: type(value) for key, value in manifest[name].items()} == file
                for name in ("text_file", "vocabulary_file")
            )
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
