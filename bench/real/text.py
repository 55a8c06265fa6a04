"""English prose from Debian's documentation packages, Perl and CPython: one document a line of JSON,
{"source", "name", "text"}, about 20 MB.

The packages are downloaded by apt, which checks them, and unpacked, not installed. Licences differ by package: read and
train on them, never commit them.
"""

import gzip
import html
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gemmascope.errors import EnvironmentProblemError
from gemmascope.formats.files import atomic_write

PACKAGES = (
    "fortunes",
    "fortunes-min",
    "anarchism",
    "debian-handbook",
    "aptitude-doc-en",
    "debian-reference-en",
    "developers-reference",
    "debian-faq",
    "jargon-text",
    "dict-devil",
)
# Under /usr/share of the packages.
PAGES = {
    "debian-handbook": ("doc/debian-handbook/html/en-US/*.html",),
    "aptitude": ("doc/aptitude/html/en/*.html",),
    "debian-reference": ("doc/debian-reference-en/**/*.html", "debian-reference/*.en.html"),
    "developers-reference": ("doc/developers-reference/**/*.html", "developers-reference/*.html"),
    "debian-faq": ("doc/debian/FAQ/*.html", "doc/debian-faq/**/*.html"),
}
# Source, file, what separates its entries, entries of a document.
DICTIONARIES = (
    ("jargon", "doc/jargon-text/jargon.txt.gz", r"\n(?=   [^\s].{0,40}:)", 15),
    ("devils-dictionary", "dictd/devil.dict.dz", r"\n\n(?=\S)", 15),
)
FORTUNES = 12  # of a document
FEWEST_CHARACTERS = 400
LEAST_SOURCES = 5


class Entry(NamedTuple):
    source: str
    name: str
    text: str


def make_text(path: Path, cache: Path, share: Path = Path("/usr/share")) -> Path:
    """The documents at ``path``, made unless they are there; ``cache`` keeps the packages, ``share`` is the machine's.

    A minute. Raises EnvironmentProblemError when fewer than `LEAST_SOURCES` sources can be had.
    """
    if path.exists():
        return path
    characters = Counter()
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as out:
        for entry in tidied(documents(unpack(cache), share)):
            characters[entry.source] += len(entry.text)
            out.write(json.dumps(entry._asdict(), ensure_ascii=False) + "\n")
        if len(characters) < LEAST_SOURCES:
            found = ", ".join(characters) or "none"
            raise EnvironmentProblemError(
                f"text: expected at least {LEAST_SOURCES} sources, found {found}; `apt-get update` may help"
            )
    for source, count in characters.most_common():
        print(f"  {source:24s} {count / 1e6:6.2f} M characters", file=sys.stderr)
    return path


def unpack(cache: Path) -> Path:
    """The folder usr/share of all packages that apt has, unpacked into ``cache``."""
    root = cache / "unpacked"
    root.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        done = root / f".{package}"
        if done.exists():
            continue
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=cache) as temporary:
            command = ("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package)
            try:
                subprocess.run(command, cwd=temporary, check=True, capture_output=True)
                for deb in Path(temporary).glob("*.deb"):
                    subprocess.run(("dpkg", "-x", str(deb), str(root)), check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                print(f"  {package}: apt does not have it", file=sys.stderr)
                continue
        done.touch()
    return root / "usr" / "share"


def documents(packages: Path, share: Path) -> Iterator[Entry]:
    """Every text there is, as it is."""
    yield from fortunes(packages / "games" / "fortunes")
    for path in sorted((packages / "doc/anarchism/markdown").glob("*.md*")):
        without_links = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", read(path))
        yield Entry("anarchism", path.name, re.sub(r"(?<!\n)\n(?!\n)", " ", without_links))
    for source, patterns in PAGES.items():
        for path in sorted({path for pattern in patterns for path in packages.glob(pattern)}):
            if not re.search(r"\.(?!en\.)[a-z]{2}\.html$", path.name):  # other languages
                yield Entry(source, path.relative_to(packages).as_posix(), plain(read(path)))
    for source, name, separator, together in DICTIONARIES:
        if (packages / name).exists():
            yield from grouped(source, source, re.split(separator, read(packages / name)), together)
    for source, pattern in (("licences", "common-licenses/*"), ("perl", "perl/**/*.pod")):
        for path in sorted(share.glob(pattern)):
            if path.is_file() and not path.is_symlink() and "unicore" not in path.parts:
                yield Entry(source, path.relative_to(share).as_posix(), read(path))
    yield from python()


def fortunes(folder: Path) -> Iterator[Entry]:
    for path in sorted(folder.glob("*")):
        if not path.suffix and path.is_file() and not path.is_symlink() and "art" not in path.name:
            items = [item.strip() for item in read(path).split("\n%\n") if item.strip()]
            yield from grouped("fortunes", path.name, items, FORTUNES)


def python() -> Iterator[Entry]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some Linux packages leave it out
        return
    for name in sorted(topics):
        yield Entry("python", name, topics[name])


def grouped(source: str, name: str, items: list[str], together: int) -> Iterator[Entry]:
    for start in range(0, len(items), together):
        yield Entry(source, f"{name}-{start}", "\n\n".join(items[start : start + together]))


def read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix in (".gz", ".dz") else data).decode("utf-8", "replace")


def plain(page: str) -> str:
    """The text of an HTML page; the lines of what is preformatted stay."""
    body = re.search(r"<body.*", page, re.S)
    page = re.sub(r"<(script|style|head|nav)\b.*?</\1>", " ", body.group(0) if body else page, flags=re.S)
    page = re.sub(r"<pre[^>]*>(.*?)</pre>", lambda match: match.group(0).replace("\n", "\x01"), page, flags=re.S)
    page = re.sub(r"</(p|li|h\d|div|dt|dd|tr|pre|title)>|<br[^>]*>", "\n\n", re.sub(r"\s+", " ", page))
    return html.unescape(re.sub(r"<[^>]+>", "", page)).replace("\x01", "\n")


def tidied(entries: Iterator[Entry]) -> Iterator[Entry]:
    """Without paragraphs seen before, runs of empty lines and documents of almost nothing."""
    seen: set[str] = set()
    for entry in entries:
        kept = []
        for paragraph in re.sub(r"[ \t]+\n", "\n", entry.text.replace("\r", "")).split("\n\n"):
            key = re.sub(r"\W+", "", paragraph.lower())
            if len(key) <= 80 or key not in seen:
                kept.append(paragraph)
            seen.add(key)
        text = re.sub(r"\n{3,}", "\n\n", "\n\n".join(kept)).strip()
        if len(text) >= FEWEST_CHARACTERS:
            yield entry._replace(text=text)
