"""Documents out of files and datasets: what is read, in which order, and one test per refusal."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import sys
import types

import pytest

from gemmascope.activations import documents
from gemmascope.activations.documents import Document, read_dataset, read_documents
from gemmascope.errors import BadFileError, EnvironmentProblemError


@pytest.fixture
def write(tmp_path):
    def write(name, data):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = data.encode() if isinstance(data, str) else data
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


def read(tmp_path, *patterns, **arguments):
    return list(read_documents(patterns, base=tmp_path, **arguments))


def names(tmp_path, *patterns):
    return [document.name for document in read(tmp_path, *patterns)]


# ---- which files


def test_globs_are_relative_to_base_sorted_and_at_any_depth(tmp_path, write):
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "deep/A.md", "other.rst", ".hidden/d.txt"):
        write(name, name)
    assert names(tmp_path, "**/*.txt") == ["a.txt", "b.txt", "deep/er/c.txt"]
    assert names(tmp_path, "*.rst", "deep/*.md", "*.txt") == ["a.txt", "b.txt", "deep/A.md", "other.rst"]
    assert read(tmp_path, "deep/er/*")[0] == Document("deep/er/c.txt", "deep/er/c.txt", "deep/er/c.txt")


def test_base_is_the_current_folder_by_default(tmp_path, write, monkeypatch):
    write("x/a.txt", "a")
    monkeypatch.chdir(tmp_path / "x")
    assert [document.name for document in read_documents(["*.txt"])] == ["a.txt"]
    assert [document.name for document in read_documents([tmp_path / "x" / "a.txt"])] == ["a.txt"]


def test_files_outside_of_base_keep_their_path(tmp_path, write):
    write("in/a.txt", "a"), write("out/b.txt", "b")
    assert names(tmp_path / "in", "../out/*.txt") == ["../out/b.txt"]
    assert names(tmp_path / "in", f"{tmp_path}/out/*") == [(tmp_path / "out" / "b.txt").as_posix()]


def test_a_file_comes_once(tmp_path, write):
    write("a.txt", "a"), write("d/b.txt", "b")
    (tmp_path / "link.txt").symlink_to("a.txt")
    (tmp_path / "d" / "loop").symlink_to(tmp_path / "d")
    assert names(tmp_path, "**/*.txt", "a.txt", "./a.txt", "d/../a.txt", str(tmp_path / "*.txt")) == [
        "a.txt",
        "d/b.txt",
    ]


def test_a_name_that_looks_like_a_glob_is_a_name_first(tmp_path, write):
    write("a[1].txt", "itself"), write("a1.txt", "no")
    assert names(tmp_path, "a[1].txt") == ["a[1].txt"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("no/*.txt", "found none"),
        ("missing.txt", "found none"),
        ("nul\0.txt", "found none"),
        ("folder", r"found a folder; its files are matched by \*\*/\*.txt behind it"),
        ("folder/**", "found none"),
    ],
    ids=["glob", "file", "nul", "folder", "only folders"],
)
def test_a_pattern_without_files_is_named(tmp_path, write, pattern, found):
    write("a.txt", "a")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    shown = repr(pattern) if "\0" in pattern else pattern
    with pytest.raises(BadFileError, match=found) as error:
        read_documents(["a.txt", pattern], base=tmp_path)
    assert str(error.value).startswith(f"{shown}: expected a file")


def test_pipes_and_dead_links_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(BadFileError, match=r"pipe.txt: expected a file, found a device, pipe or socket"):
        read_documents(["*.txt"], base=tmp_path)
    os.remove(tmp_path / "pipe.txt")
    (tmp_path / "dead.txt").symlink_to("nowhere")
    with pytest.raises(BadFileError, match=r"dead.txt: expected a file, found none"):
        read_documents(["*.txt"], base=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"patterns": "a.txt"}, TypeError, "patterns: expected a list of paths or globs, got str"),
        ({"patterns": None}, TypeError, "patterns: expected a list of paths or globs, got NoneType"),
        ({"patterns": []}, ValueError, "patterns: expected at least one path or glob, got none"),
        ({"patterns": [3]}, TypeError, "patterns: expected a str or an os.PathLike, got int"),
        ({"patterns": ["a"], "field": 3}, TypeError, "field: expected a str, got int"),
        ({"patterns": ["a"], "field": ""}, ValueError, "field: expected the name of a field, got ''"),
        ({"patterns": ["a"], "base": 3}, TypeError, "base: expected a str or an os.PathLike, got int"),
    ],
    ids=lambda value: None,
)
def test_wrong_arguments(arguments, kind, message):
    with pytest.raises(kind) as error:
        read_documents(**arguments)
    assert str(error.value) == message


# ---- text


def test_text_is_kept_as_it_is(tmp_path, write):
    text = "a\r\nb\x00c\x85 ü \U0001f600\n"
    write("a.txt", text), write("b.txt.gz", text), write("bom.txt", b"\xef\xbb\xbfx"), write("empty.txt", "")
    assert [document.text for document in read(tmp_path, "*")] == [text, text, "x", ""]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_what_is_not_utf8_is_refused_with_its_place(tmp_path, write, name):
    write(name, b"abc\xffdef")
    with pytest.raises(BadFileError, match=rf"{name}: expected UTF-8, found byte 0xff at 3$"):
        read(tmp_path, "*")


def test_one_document_at_a_time(tmp_path, write):
    write("a.txt", "a"), write("b.txt", b"\xff")
    reading = read_documents(["*"], base=tmp_path)
    assert iter(reading) is reading
    assert next(reading).text == "a"
    with pytest.raises(BadFileError):
        next(reading)


def test_too_large_a_document(tmp_path, write, monkeypatch):
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 1 << 20)
    write("a.txt", b"x" * (1 << 20))
    assert len(read(tmp_path, "a.txt")[0].text) == 1 << 20
    for name in ("b.txt", "b.txt.gz"):
        write(name, b"x" * ((1 << 20) + 1))
        with pytest.raises(BadFileError, match=f"{name}: expected documents of at most 1 MiB, found a larger one"):
            read(tmp_path, name)


@pytest.mark.parametrize("name", ["bomb.txt.gz", "bomb.jsonl.gz"])
def test_bombs_are_not_inflated(tmp_path, write, monkeypatch, name):
    monkeypatch.setattr(documents, "SMALL_BYTES", 1 << 20)
    line = json.dumps({"text": "x" * 1000}).encode() + b"\n"
    write(name, line * 4000)
    with pytest.raises(BadFileError, match=f"{name}: expected text, found over 1741... bytes in so small a file"):
        read(tmp_path, name)
    write("short.txt.gz", line * 1000)
    assert len(read(tmp_path, "short.txt.gz")[0].text) == len(line) * 1000


def test_every_damaged_byte_of_a_gz_is_found_or_harmless(tmp_path, write):
    path = write("a.txt.gz", "the cat sat on the mat")
    good, harmless = path.read_bytes(), 0
    for index in range(len(good)):
        path.write_bytes(good[:index] + bytes([good[index] ^ 0x10]) + good[index + 1 :])
        with contextlib.suppress(BadFileError):
            assert read(tmp_path, "a.txt.gz")[0].text == "the cat sat on the mat"
            harmless += 1
    assert harmless < 10  # time, system and flags of the head
    path.write_bytes(good[:-1])
    with pytest.raises(BadFileError, match=r"a.txt.gz: expected a .gz file, found damage"):
        read(tmp_path, "a.txt.gz")


# ---- lines


def lines(*objects):
    return "\n".join(json.dumps(found) for found in objects)


@pytest.mark.parametrize("name", ["c/a.jsonl", "c/a.JSONL.gz"])
def test_lines(tmp_path, write, name):
    text = lines({"text": "one"}, {"text": "two", "name": "n", "source": "s"}, {"text": "", "name": 3, "other": [{}]})
    data = (text + "\r\n\n  \n" + lines({"text": "line\nfeed\ud800"}) + "\n").encode()
    (tmp_path / "c").mkdir()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read(tmp_path, "c/*") == [
        Document(f"{name}:1", "one", name),
        Document("n", "two", "s"),
        Document(f"{name}:3", "", name),
        Document(f"{name}:6", "line\nfeed\ud800", name),
    ]


def test_the_field_is_the_callers(tmp_path, write):
    write("a.jsonl", lines({"name": "the text", "text": 3}))
    assert read(tmp_path, "*", field="name") == [Document("a.jsonl:1", "the text", "a.jsonl")]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b"[]", "expected an object, found list"),
        (b"{", "expected JSON, found"),
        (b'{"text": NaN}', "expected JSON, found the constant NaN"),
        (b'{"text": "a", "text": "b"}', "expected JSON, found the key 'text' twice"),
        (b'{"txt": "a", "id": 3}', "expected the field 'text', found txt, id"),
        (b"{}", "expected the field 'text', found none"),
        (b'{"text": null}', "text: expected a string, found NoneType"),
        (b'{"text": "\xc3\x28"}', "expected UTF-8, found byte 0xc3 at 27"),
        (b"[" * 5000, "expected JSON, found nesting deeper than 64"),
        (json.dumps({"text": "", "name": "n" * 1001}).encode(), "name: expected at most 1000 characters, found 1001"),
    ],
    ids=lambda value: None,
)
def test_a_wrong_line_is_named(tmp_path, write, line, found):
    write("a.jsonl", b'{"text": "fine"}\n' + line + b"\n")
    reading = read_documents(["*"], base=tmp_path)
    next(reading)
    with pytest.raises(BadFileError) as error:
        next(reading)
    assert str(error.value).startswith(f"{tmp_path}/a.jsonl: line 2: {found}")


# ---- content


def test_content_is_that_of_names_and_bytes(tmp_path, write):
    def content(*patterns, **arguments):
        return read_documents(patterns, base=tmp_path, **arguments).content()

    write("a.txt", "a"), write("b.txt", "b")
    both = content("*.txt")
    assert content("b.txt", "a.txt") == both
    assert len({both, content("a.txt"), content("*.txt", field="t")}) == 3
    write("b.txt", "c")
    assert content("*.txt") != both
    write("b.txt", "b")
    assert content("*.txt") == both
    os.rename(tmp_path / "b.txt", tmp_path / "c.txt")
    assert content("*.txt") != both


def test_content_uses_no_document_up(tmp_path, write):
    write("a.txt", "a"), write("b.jsonl", lines({"text": "b"}))
    reading = read_documents(["*"], base=tmp_path)
    first = reading.content()
    assert [document.text for document in reading] == ["a", "b"]
    assert reading.content() == first


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_file_that_changes_is_noticed(tmp_path, write, when):
    write("a.jsonl", lines({"text": "a"}, {"text": "b"}))
    reading = read_documents(["*"], base=tmp_path)
    reading.content()
    if when == "during":
        next(reading)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(EnvironmentProblemError, match=r"a.jsonl: expected it to stay the same while it is read"):
        list(reading)


def test_a_file_that_vanishes(tmp_path, write):
    path = write("a.txt", "a")
    reading = read_documents(["*"], base=tmp_path)
    path.unlink()
    with pytest.raises(BadFileError, match=r"a.txt: expected a file, found none"):
        next(reading)


def test_a_failing_disk(tmp_path, write, monkeypatch):
    write("a.txt", "a")
    reading = read_documents(["*"], base=tmp_path)

    class Failing(io.BytesIO):
        def fileno(self):
            return 0

        def read(self, *size):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(documents, "open_file", lambda path: Failing())
    with pytest.raises(EnvironmentProblemError, match=r"a.txt: cannot be read: Input/output error"):
        next(reading)


# ---- datasets


class Hub:
    """A fake of `datasets` and of the hub: rows, and the errors that come before some of them, in turn."""

    def __init__(self, rows, faults=(), announced="all"):
        self.rows, self.faults = rows, list(faults)
        self.announced = len(rows) if announced == "all" else announced
        self.opened, self.waits = [], []

    def load_dataset(self, name, config, *, split, revision, streaming):
        assert streaming is True
        if self.faults and self.faults[0][0] == "open":
            raise self.faults.pop(0)[1]
        return Stream(self, (name, config, split, revision), 0)

    def dataset_info(self, name, revision=None):
        return types.SimpleNamespace(sha=f"sha-of-{revision}")


class Stream:
    def __init__(self, hub, asked, start):
        self.hub, self.asked, self.start = hub, asked, start
        self.info = types.SimpleNamespace(splits={asked[2]: types.SimpleNamespace(num_examples=hub.announced)})

    def skip(self, n):
        return Stream(self.hub, self.asked, n)

    def __iter__(self):
        self.hub.opened.append((*self.asked, self.start))
        for index in range(self.start, len(self.hub.rows)):
            if self.hub.faults and self.hub.faults[0][0] == index:
                fault = self.hub.faults.pop(0)[1]
                if fault is None:  # an end without an error
                    return
                raise fault
            yield self.hub.rows[index]


@pytest.fixture
def install(monkeypatch):
    def install(hub):
        monkeypatch.setitem(sys.modules, "datasets", hub)
        monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=lambda: hub))
        monkeypatch.setattr(documents.time, "sleep", hub.waits.append)
        return hub

    return install


ROWS = [{"text": f"text {index}", "id": index} for index in range(5)]


def dataset(**arguments):
    return read_dataset("owner/name", **{"split": "train", "column": "text"} | arguments)


def test_rows_of_a_dataset(install):
    hub = install(Hub(ROWS))
    reading = dataset(config="en", revision="v1")
    assert list(reading) == [Document(f"train:{index}", f"text {index}", "owner/name") for index in range(5)]
    assert hub.opened == [("owner/name", "en", "train", "sha-of-v1", 0)]
    assert reading.facts["revision"] == "sha-of-v1"
    assert hub.waits == []


def test_null_is_an_empty_document(install):
    install(Hub([{"text": None}, {"text": "a"}]))
    assert [document.text for document in dataset()] == ["", "a"]


def test_the_content_of_a_dataset_is_what_was_asked_for(install):
    install(Hub(ROWS))
    reading = dataset()
    first = reading.content()
    list(reading)
    assert reading.content() == first == dataset().content()
    other = [{"split": "test"}, {"column": "id2"}, {"revision": "v1"}, {"config": "en"}]
    assert len({first, *(dataset(**arguments).content() for arguments in other)}) == 5


class ReadTimeout(Exception):  # noqa: N818
    __module__ = "httpx._exceptions"


class ServerError(OSError):
    def __init__(self, status):
        self.response = types.SimpleNamespace(status_code=status)


@pytest.mark.parametrize(
    "fault",
    [ConnectionError("reset"), TimeoutError(), ReadTimeout("slow"), ServerError(503), ServerError(429), None],
    ids=["reset", "timeout", "httpx", "503", "429", "silent end"],
)
def test_a_stream_that_breaks_off_goes_on_where_it_stopped(install, fault):
    hub = install(Hub(ROWS, [("open", ConnectionError()), (0, fault), (3, fault), (3, fault)]))
    reading = dataset()
    assert [document.text for document in reading] == [f"text {index}" for index in range(5)]
    assert [opened[-1] for opened in hub.opened] == [0, 0, 3, 3]
    assert hub.waits == [1, 2, 1, 2]  # at row 0 the stream could not be opened, and then broke off
    assert {opened[3] for opened in hub.opened} == {"sha-of-None"}


@pytest.mark.parametrize("fault", [ConnectionError("reset by peer"), None], ids=["reset", "silent end"])
def test_a_network_that_stays_away_ends_the_reading(install, fault):
    hub = install(Hub(ROWS, [(2, fault)] * 99))
    reading, found = dataset(), []
    with pytest.raises(EnvironmentProblemError, match=r"owner/name: row 2 of the split 'train': the stream broke off"):
        found.extend(reading)
    assert hub.waits == [1, 2, 4, 8, 16, 32]
    assert len(hub.opened) == 7


def test_an_end_that_nobody_announced_is_the_end(install):
    install(Hub(ROWS, announced=None))
    assert len(list(dataset())) == 5


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (
            FileNotFoundError("no such dataset"),
            BadFileError,
            "row 0 of the split 'train': cannot be read: no such dataset",
        ),
        (ValueError("Bad split: train"), BadFileError, "row 0 of the split 'train': cannot be read: Bad split: train"),
        (ServerError(404), BadFileError, "cannot be read"),
        (ServerError(403), EnvironmentProblemError, "access is restricted"),
    ],
    ids=["missing", "split", "404", "403"],
)
def test_what_waiting_does_not_mend_is_raised_at_once(install, fault, kind, message):
    hub = install(Hub(ROWS, [("open", fault)] * 99))
    with pytest.raises(kind, match=message):
        next(dataset())
    assert hub.waits == []


def test_rows_without_text(install):
    install(Hub([{"id": 3, "body": ""}]))
    with pytest.raises(BadFileError, match="owner/name: expected the column 'text', found id, body"):
        next(dataset())
    install(Hub([{"text": 3}]))
    with pytest.raises(BadFileError, match="owner/name: row 0: text: expected text, found int"):
        next(dataset())


def test_datasets_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentProblemError, match=r'datasets: expected to be .* pip install "gemmascope\[data\]"'):
        dataset()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"split": 3}, TypeError, "split: expected a str, got int"),
        ({"column": ""}, ValueError, "column: expected some text, got ''"),
        ({"revision": 3}, TypeError, "revision: expected a str, got int"),
        ({"config": 3}, TypeError, "config: expected a str, got int"),
    ],
    ids=lambda value: None,
)
def test_wrong_arguments_of_datasets(arguments, kind, message):
    with pytest.raises(kind) as error:
        dataset(**arguments)
    assert str(error.value) == message


def test_sha256_is_what_content_rests_on(tmp_path, write):
    write("a.txt", "a")
    expected = hashlib.sha256(
        b'["files", "text"]' + json.dumps(["a.txt", 1, hashlib.sha256(b"a").hexdigest()]).encode()
    )
    assert read_documents(["*"], base=tmp_path).content() == expected.hexdigest()
