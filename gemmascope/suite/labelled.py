"""The rows that probes read, and what is known of them: a text with the labels that it gives of itself, or documents
with a label each."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..activations.documents import MAX_DOCUMENT_BYTES
from ..activations.packing import as_encoder
from ..errors import BadFileError
from ..evaluation.token_sets import MarkedText
from ..formats.files import open_file, parse_json, shown
from ..probing import Task, document_tasks, labelled_tasks, pieces_of, token_tasks
from ..reporting.progress import StageProgress
from ..runs import key_of
from ..sites.decoder import find_decoder
from .judged import CONTEXT, JudgedConfig, Sources, check_tokenizer, read_rows, spread_rows
from .model import Loaded
from .prepare import TOKENS

# Of token tasks: so many tokens, spread over the text.
TOKEN_ROWS = 1 << 13
MOST_DOCUMENTS, MOST_LABELS, LABEL_CHARACTERS = 1 << 16, 100, 200
# Tokens of a document by which its script is told.
SCRIPT_TOKENS = 1 << 12


@dataclass(frozen=True, eq=False)
class LabelledText:
    """text: rows whose documents are numbered from 0, without gaps. tasks: of its documents, and of those of its tokens
    of text that ``sample`` [tokens of text] says, in order. facts: what results say of it."""

    text: MarkedText
    tasks: tuple[Task, ...]
    sample: Tensor
    facts: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def documents(self) -> int:
        return int(self.text.documents.max()) + 1

    @property
    def owners(self) -> Tensor:
        """The document of each token of text, int64."""
        return self.text.documents[self.text.is_text]

    @property
    def content(self) -> str:
        """A key of all that results depend on."""
        of_tasks = [[task.name, task.of, task.labels, task.known] for task in self.tasks]
        return key_of(self.text.tokens, self.text.documents, self.text.is_text, self.sample, of_tasks)


def read_labelled(
    config: JudgedConfig, sources: Sources, loaded: Loaded, folder: Path, tokens: int, labels: str | os.PathLike | None
) -> LabelledText:
    """The text of the settings, or the documents of the file ``labels``; at most so many ``tokens`` of it.

    Raises ValueError for text that is too short, BadFileError for a file that is not what `read_labels` expects, and
    what `read_rows` raises.
    """
    if labels is not None:
        return _of_labels(config, loaded, Path(labels), tokens)
    rows, what = read_rows(config, sources, loaded, folder / TOKENS)
    parts = ("held_out",) if what == "held-out rows of the run" else ("train", "held_out")
    there = {"train": rows.n_train, "held_out": rows.n_held_out}
    total = sum(there[part] for part in parts)
    wanted = spread_rows(total, min(config.sequences, max(1, tokens // rows.context)))
    first, ids, documents = 0, [], []
    for part in parts:
        chosen = wanted[(wanted >= first) & (wanted < first + there[part])] - first
        first += there[part]
        if len(chosen):
            ids.append(rows.train(chosen) if part == "train" else rows.held_out(chosen))
            documents.append(rows.documents_of(part, chosen))
    if not ids:
        raise ValueError("text: expected some rows to probe, got none")
    marked = MarkedText.of(loaded.model, torch.cat(ids), torch.cat(documents))
    numbers, renumbered = marked.documents.unique(return_inverse=True)
    if padding := int(numbers[0] < 0):
        renumbered = renumbered - 1  # −1 stays −1
    text = MarkedText(marked.tokens, renumbered, marked.is_text)
    if not text.is_text.any():
        raise ValueError("text: expected some tokens that are not special, got none")
    names = rows.document_names(numbers[padding:])
    pieces = _pieces(loaded, text.tokens[text.is_text])
    sample, token_level = _tokens(text, pieces)
    tasks = (*token_level, *document_tasks(names, _beginnings(text, pieces, len(names))))
    facts = {"text": what, "sequences": len(text.tokens), "sequences_there": total, "context": rows.context}
    facts |= {"documents": len(names), "tokens": int(text.is_text.sum()), "token_rows": int(sample.sum())}
    return LabelledText(text, tasks, sample, facts)


def _pieces(loaded: Loaded, ids: Tensor) -> list[str]:
    """By id, up to the largest of ``ids``; of others nothing."""
    present = ids.unique()
    found = [""] * (int(present[-1]) + 1)
    for number, piece in zip(present.tolist(), pieces_of(loaded.tokenizer, present), strict=True):
        found[number] = piece
    return found


def _tokens(text: MarkedText, pieces: Sequence[str]) -> tuple[Tensor, list[Task]]:
    is_text, tokens = text.is_text, text.tokens[text.is_text]
    follows = torch.zeros_like(is_text)
    follows[:, 1:] = is_text[:, :-1] & is_text[:, 1:] & (text.documents[:, :-1] == text.documents[:, 1:])
    sample = torch.zeros(len(tokens), dtype=torch.bool)
    sample[spread_rows(len(tokens), TOKEN_ROWS)] = True
    tasks = token_tasks(tokens, pieces, ~follows[is_text])
    return sample, [Task(task.name, task.of, task.labels[sample], task.known[sample]) for task in tasks]


def _beginnings(text: MarkedText, pieces: Sequence[str], documents: int) -> list[str]:
    """What was read of each document, its first tokens."""
    found: list[list[str]] = [[] for _ in range(documents)]
    of_text = text.documents[text.is_text].tolist()
    for document, token in zip(of_text, text.tokens[text.is_text].tolist(), strict=True):
        if len(found[document]) < SCRIPT_TOKENS:
            found[document].append(pieces[token])
    return ["".join(each) for each in found]


# ---- labels that are given


def read_labels(path: str | os.PathLike) -> tuple[list[str], list[str]]:
    """The texts and the labels of a .jsonl file: an object a line, with the strings ``text`` and ``label``, of which an
    integer is one too; other keys are left alone, as are blank lines.

    Raises BadFileError naming the line for what is none, for over `MOST_DOCUMENTS` lines, `MOST_LABELS` labels or
    `LABEL_CHARACTERS` characters of one, for fewer than two labels and for a text without any character.
    """
    texts, labels = [], []
    with open_file(path) as file:
        for number in range(1, MOST_DOCUMENTS + 2):
            line = file.readline(MAX_DOCUMENT_BYTES + 1)
            if not line:
                break
            where = f"{shown(path)}: line {number}"
            if len(line) > MAX_DOCUMENT_BYTES or number > MOST_DOCUMENTS:
                raise BadFileError(f"{where}: expected at most {MOST_DOCUMENTS} lines of at most 256 MiB, found more")
            if not line.strip():
                continue
            value = parse_json(line, where)
            if not isinstance(value, dict):
                raise BadFileError(f"{where}: expected an object, found {type(value).__name__}")
            text, label = value.get("text"), value.get("label")
            if not isinstance(text, str) or not text.strip():
                raise BadFileError(f"{where}: text: expected a string with some text, found {text!r:.40}")
            if type(label) not in (str, int) or not 0 < len(str(label)) <= LABEL_CHARACTERS:
                raise BadFileError(
                    f"{where}: label: expected a string of 1 to {LABEL_CHARACTERS} characters or an integer, "
                    f"found {label!r:.40}"
                )
            texts.append(text)
            labels.append(str(label))
    kinds = len(set(labels))
    if not 2 <= kinds <= MOST_LABELS:
        raise BadFileError(f"{shown(path)}: expected 2 to {MOST_LABELS} different labels, found {kinds}")
    return texts, labels


def _of_labels(config: JudgedConfig, loaded: Loaded, path: Path, tokens: int) -> LabelledText:
    """A document a row, cut where it is longer; documents beyond ``tokens`` are left out, some spread over the file."""
    check_tokenizer(loaded)
    texts, labels = read_labels(path)
    encoder = as_encoder(loaded.tokenizer)
    most = config.context or CONTEXT
    if (limit := getattr(find_decoder(loaded.model).config, "max_position_embeddings", None)) is not None:
        if config.context is not None and most > limit:
            raise ValueError(f"context: expected at most the {limit} tokens that the model takes, got {most}")
        most = min(most, limit)
    encoded: list[Tensor] = []
    with StageProgress("Text", len(texts), "document") as bar:
        for start in range(0, len(texts), 256):
            encoded += [torch.from_numpy(ids) for ids, _ in encoder.encode(texts[start : start + 256])]
            bar.update(len(encoded))
    cut = sum(len(ids) > most - 1 for ids in encoded)
    encoded = [ids[: most - 1] for ids in encoded]
    there, kept = len(encoded), [number for number, ids in enumerate(encoded) if len(ids)]
    mean = sum(len(encoded[number]) for number in kept) / max(1, len(kept))
    kept = [
        kept[i] for i in spread_rows(len(kept), min(config.sequences, max(1, int(tokens / max(1.0, mean))))).tolist()
    ]
    context = 1 + max(len(encoded[number]) for number in kept)
    ids = torch.full((len(kept), context), encoder.pad, dtype=torch.int64)
    documents = torch.full_like(ids, -1)
    ids[:, 0] = encoder.bos
    for row, number in enumerate(kept):
        end = 1 + len(encoded[number])
        ids[row, 1:end], documents[row, 1:end] = encoded[number], row
    text = MarkedText(ids, documents, documents >= 0)
    warnings = []
    if cut:
        warnings.append(f"{cut} of {there} documents are read up to their token {most - 1:,}")
    if len(kept) < there:
        warnings.append(f"{len(kept):,} of {there:,} documents are probed: more --sequences or --tokens take more")
    facts = {"text": os.fspath(path), "sequences": len(kept), "sequences_there": there, "context": context}
    facts |= {"documents": len(kept), "tokens": int(text.is_text.sum()), "token_rows": 0}
    sample = torch.zeros(int(text.is_text.sum()), dtype=torch.bool)
    return LabelledText(
        text, tuple(labelled_tasks([labels[number] for number in kept])), sample, facts, tuple(warnings)
    )
