"""Labels that a text gives of itself: of its tokens, by how they are written, and of its documents.

Of tokens, by the token's own characters, the blanks before it left out:

    starts a word    it begins with a letter that no letter stands before
    capital          it begins with a capital letter
    all capitals     two letters or more, all of them capitals
    digits           all characters are digits
    punctuation      no character is a letter, a digit or a blank

Of documents:

    source: S        it is out of the source S, one of the `MOST_SOURCES` with the most documents
    code             its name or its source ends as that of a program does, and not as that of prose; of others nothing
                     is known
    script: S        most of its letters are of the script S, by the names that Unicode gives them

Labels that are given, one a document: `labelled_tasks`.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from ..checks import check_tensor

MOST_SOURCES = 5
CODE = frozenset(
    {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".sh", ".rb"}
)
PROSE = frozenset({".md", ".rst", ".txt", ".tex", ".html", ".htm", ".adoc"})
# A script counts where a document has so many letters at least.
FEWEST_LETTERS = 20
_BLANKS = ("▁", "Ġ")  # how sentencepiece and byte-level BPE write one


@dataclass(frozen=True, eq=False)
class Task:
    """Two classes. of: ``tokens`` or ``documents``, what a row is. labels: bool [rows]; known: bool [rows], where there
    is a label at all."""

    name: str
    of: str
    labels: Tensor
    known: Tensor


def pieces_of(tokenizer: Any, ids: Tensor) -> list[str]:
    """What each of the ids [n] stands for, with the blank before it, whatever kind of tokenizer of transformers."""
    found = []
    for number, token in zip(ids.tolist(), tokenizer.convert_ids_to_tokens(ids.tolist()), strict=True):
        text = tokenizer.decode([number])
        blank = isinstance(token, str) and token.startswith(_BLANKS)
        found.append(f" {text.lstrip(' ')}" if blank else text)
    return found


def token_tasks(tokens: Tensor, pieces: Sequence[str], first: Tensor) -> list[Task]:
    """Of tokens int64 [n], one after another. pieces: by id, at least as many as the largest. first: bool [n], where a
    token follows nothing."""
    check_tensor("first", first, tokens.shape, (torch.bool,))
    known, found = torch.ones_like(first), {}
    ids, places = tokens.unique(return_inverse=True)
    texts: list[str] = [pieces[number] for number in map(int, ids)]
    words = [text.strip() for text in texts]
    of_id = {
        "capital": [word[:1].isupper() for word in words],
        "all capitals": [len(word) > 1 and word.isalpha() and word.isupper() for word in words],
        "digits": [word.isdigit() for word in words],
        "punctuation": [bool(word) and not any(c.isalnum() or c.isspace() for c in word) for word in words],
    }
    ends = torch.tensor([text[-1:].isalpha() for text in texts], dtype=torch.bool)[places]
    begins = torch.tensor([word[:1].isalpha() for word in words], dtype=torch.bool)[places]
    joined = torch.tensor([text[:1].isalpha() for text in texts], dtype=torch.bool)[places]
    follows = torch.zeros_like(first)
    follows[1:] = ends[:-1] & ~first[1:]
    found["starts a word"] = begins & ~(joined & follows)
    found |= {name: torch.tensor(flags, dtype=torch.bool)[places] for name, flags in of_id.items()}
    return [Task(name, "tokens", labels, known) for name, labels in found.items()]


def document_tasks(names: Sequence[tuple[str, str]], texts: Sequence[str]) -> list[Task]:
    """Of documents by their (source, name), as `TokenRows.document_names` has them, and what was read of their text."""
    known = torch.ones(len(names), dtype=torch.bool)
    sources = Counter(source for source, _ in names)
    common = [source for source, count in sources.most_common() if count > 1][:MOST_SOURCES]
    tasks = [_one_of(f"source: {source}", [each == source for each, _ in names], known) for source in common]
    endings = [{PurePath(part.removesuffix(".gz")).suffix.lower() for part in pair} for pair in names]
    is_code, is_prose = ([bool(found & kinds) for found in endings] for kinds in (CODE, PROSE))
    told = torch.tensor([code != prose for code, prose in zip(is_code, is_prose, strict=True)], dtype=torch.bool)
    tasks.append(_one_of("code", is_code, told))
    scripts = [script_of(text) for text in texts]
    told = torch.tensor([script is not None for script in scripts], dtype=torch.bool)
    present = Counter(script for script in scripts if script is not None)
    tasks += [_one_of(f"script: {each}", [script == each for script in scripts], told) for each in sorted(present)]
    return _different(tasks)


def _different(tasks: Sequence[Task]) -> list[Task]:
    """Without those that ask what one before them asks, or the opposite: of two sources there is one task."""
    kept: list[Task] = []
    for task in tasks:
        same = (each for each in kept if torch.equal(each.known, task.known))
        differing = ((each.labels ^ task.labels)[task.known] for each in same)
        if all(differs.any() and not differs.all() for differs in differing):
            kept.append(task)
    return kept


def script_of(text: str) -> str | None:
    """``latin``, ``cyrillic``, ``cjk``, …: of most of the letters, the first in the alphabet of equals; None of fewer
    than `FEWEST_LETTERS`."""
    letters = Counter(c for c in text if c.isalpha())
    if letters.total() < FEWEST_LETTERS:
        return None
    scripts: Counter[str] = Counter()
    for letter, count in letters.items():
        scripts[unicodedata.name(letter, "other").split()[0].lower()] += count
    return min(scripts, key=lambda script: (-scripts[script], script))


def labelled_tasks(labels: Sequence[str]) -> list[Task]:
    """Each label against all others; of two labels the second of the alphabet against the first alone."""
    known, kinds = torch.ones(len(labels), dtype=torch.bool), sorted(set(labels))
    return [
        _one_of(f"label: {each}", [label == each for label in labels], known)
        for each in (kinds[1:] if len(kinds) == 2 else kinds)
    ]


def _one_of(name: str, flags: Sequence[bool], known: Tensor) -> Task:
    return Task(name, "documents", torch.tensor(flags, dtype=torch.bool), known)
