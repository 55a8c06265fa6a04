"""`Protocol`: every choice of a RAVEL evaluation, and the three sets of them that have a name.

    ravel      entities and templates of the test are not those of the training; the error of an SAE stays
    sae-ravel  Chaudhary & Geiger, arXiv 2409.04478: GPT-2 small, country and continent, one template each
    saebench   SAEBench 0.6 (arXiv 2503.09532): as its code does it, without its mistakes

What each of them measured its figures by is in docs/ravel.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from ..checks import check_choice, check_int, check_number, check_type

OPTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "labels": ("first", "single"),
        "score": ("first-token", "string"),
        "clashes": ("drop", "keep", "isolate"),
        "equal": ("none", "isolation", "all"),
        "source": ("attribute", "same"),
        "split": ("entities", "pairs"),
        "known": ("any", "every"),
        "error": ("keep", "drop"),
        "mask": ("hard", "soft"),
        "schedule": ("linear", "log"),
    }
)


@dataclass(frozen=True)
class Protocol:
    """bos: whether a prompt begins with BOS. labels: the ``first`` token stands for a label of several, or labels have
    a ``single`` token, which drops the entities of others. score: an answer is right by its ``first-token``, or as a
    ``string`` by `answers.says`. known: an entity counts for whom the model answers ``any`` prompt of each attribute
    rightly (prompts that it does not are left out), or ``every`` one. entities: at most so many, those with the most
    right answers. entity_tokens: only entities of so many tokens.

    pairs: of base and source, for training, of each task (cause, isolation) and attribute; None: all there are.
    test_pairs: the same for each part of the test. split: by ``entities`` and by templates, or by ``pairs``, where an
    entity is on both sides; then test_share of them are for the test and validation_share for nothing. equal: whether
    base and source may have the same label: in ``none``, in ``isolation`` alone or in ``all`` pairs, which then has
    base = source as well. clashes: pairs whose different labels have the same first token are dropped, kept, or, as
    SAEBench does, count to isolate with the label of the source. source: its prompt is about the ``attribute`` that is
    moved, or the ``same`` as that of the base.

    error: what the SAE does not reconstruct stays or is dropped. mask: rounded (``hard``) or as trained (``soft``) in
    the test. temperature_start, temperature_end, schedule: of σ(m/T), over all steps. lr, rotation_lr: of Adam, of
    masks and of directions, whose entries are small. batch_size, epochs: of pairs. rotation_epochs: the same where
    directions are learnt as well. l1: times Σσ(m/T).
    directions: that DAS exchanges, all of the site's where it has fewer.

    Raises TypeError or ValueError naming the setting that is wrong.
    """

    name: str
    bos: bool = True
    labels: str = "first"
    score: str = "first-token"
    known: str = "any"
    entities: int | None = 500
    entity_tokens: int | None = None
    pairs: int | None = 1024
    test_pairs: int | None = 512
    split: str = "entities"
    test_share: float = 0.2
    validation_share: float = 0.0
    equal: str = "none"
    clashes: str = "drop"
    source: str = "attribute"
    error: str = "keep"
    mask: str = "hard"
    temperature_start: float = 1.0
    temperature_end: float = 0.01
    schedule: str = "log"
    lr: float = 0.01
    rotation_lr: float = 1e-3
    batch_size: int = 32
    epochs: int = 2
    rotation_epochs: int = 2
    l1: float = 0.0
    directions: int = 16

    def __post_init__(self):
        check_type("preset", self.name, str)
        check_type("bos", self.bos, bool)
        for name, options in OPTIONS.items():
            check_choice(name, getattr(self, name), options)
        for name in ("entities", "entity_tokens", "pairs", "test_pairs"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        for name in ("batch_size", "epochs", "rotation_epochs", "directions"):
            check_int(name, getattr(self, name), 1)
        for name in ("temperature_start", "temperature_end", "lr", "rotation_lr"):
            check_number(name, getattr(self, name), 0, open_low=True)
        check_number("l1", self.l1, 0)
        check_number("test_share", self.test_share, 0, open_low=True)
        check_number("validation_share", self.validation_share, 0)
        if self.test_share + self.validation_share >= 1:
            raise ValueError(
                "test_share: expected less than 1 together with validation_share, got "
                f"{self.test_share + self.validation_share:g}"
            )

    def temperature(self, step: int, steps: int) -> float:
        """Of ``step`` from 0 out of ``steps``; the last one has `temperature_end`."""
        done = step / max(1, steps - 1)
        start, end = self.temperature_start, self.temperature_end
        return start + (end - start) * done if self.schedule == "linear" else start * (end / start) ** done

    def to_dict(self) -> dict[str, Any]:
        """As values of JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


PRESETS: Mapping[str, Protocol] = MappingProxyType(
    {
        "ravel": Protocol("ravel"),
        "sae-ravel": Protocol(
            "sae-ravel",
            bos=False,
            labels="single",
            known="every",
            entities=40,
            entity_tokens=1,
            pairs=None,
            test_pairs=None,
            split="pairs",
            validation_share=0.1,
            equal="all",
            clashes="keep",
            source="same",
            error="drop",
            mask="soft",
            temperature_start=10.0,
            temperature_end=0.1,
            schedule="linear",
            lr=1e-3,
            batch_size=16,
            epochs=20,
            rotation_epochs=20,
        ),
        "saebench": Protocol(
            "saebench",
            score="string",
            pairs=3500,
            test_pairs=1500,
            split="pairs",
            test_share=0.3,
            equal="isolation",
            error="drop",
            temperature_start=1.0,
            temperature_end=1e-4,
            lr=1e-3,
            batch_size=8,
            epochs=2,
            rotation_epochs=10,
        ),
    }
)


def protocol_of(preset: str, **changes: Any) -> Protocol:
    """The preset of that name with some settings changed; those that are None are not. Raises ValueError for a name
    that is none, and as `Protocol`."""
    check_choice("preset", preset, tuple(PRESETS))
    return replace(PRESETS[preset], **{name: value for name, value in changes.items() if value is not None})
