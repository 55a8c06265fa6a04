"""What RAVEL asks about: entities, their attributes, prompts with a place for the entity, and splits of both.

The benchmark's own files (arXiv 2402.17700, github.com/explanare/ravel) hold, for an entity type such as ``city``:

    ravel_city_entity_attributes.json      {entity: {attribute: label}}
    ravel_city_attribute_to_prompts.json   {attribute: [template, …]}
    ravel_city_entity_to_split.json        {entity: "train" | "val" | "test"}
    ravel_city_prompt_to_split.json        {template: "train" | "val" | "test"}
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..checks import check_type
from ..errors import BadFileError
from ..formats.files import as_path, read_json, shown

SPLITS = ("train", "val", "test")
PLACE = "%s"
# A label follows a template at once behind these, and behind a space elsewhere.
_NO_SPACE_AFTER = ('"', "'", "(", "[", "`")


class Prompt(NamedTuple):
    """A template about ``attribute`` with ``entity`` in its place."""

    entity: str
    attribute: str
    template: str

    @property
    def text(self) -> str:
        return self.template.replace(PLACE, self.entity)


def before_label(template: str) -> str:
    """What stands between a template and its label: nothing after a space, a quote or an open bracket, else a space."""
    return "" if template[-1:].isspace() or template.endswith(_NO_SPACE_AFTER) else " "


@dataclass(frozen=True)
class EntityData:
    """Entities of one type.

    labels: {attribute: {entity: label}}. templates: {attribute: templates}, each with one ``%s``. entity_split,
    template_split: what is for training and what for testing; what neither names is in no split.

    Raises TypeError or ValueError for an attribute without labels or templates, a template without one ``%s``, a label
    that is empty and a split that is none.
    """

    name: str
    labels: Mapping[str, Mapping[str, str]]
    templates: Mapping[str, Sequence[str]]
    entity_split: Mapping[str, str]
    template_split: Mapping[str, str]

    def __post_init__(self):
        check_type("name", self.name, str)
        for attribute, templates in self.templates.items():
            if attribute not in self.labels or not self.labels[attribute]:
                raise ValueError(f"labels: expected some for each attribute of templates, got none for {attribute!r}")
            if not templates:
                raise ValueError(f"templates: expected some for {attribute!r}, got none")
            for template in templates:
                if not isinstance(template, str) or template.count(PLACE) != 1:
                    raise ValueError(f"templates: expected texts with one {PLACE}, got {template!r:.80}")
            for entity, label in self.labels[attribute].items():
                if not isinstance(label, str) or not label.strip():
                    raise ValueError(f"labels: expected text for {attribute!r} of {entity!r:.60}, got {label!r:.40}")
        for name in ("entity_split", "template_split"):
            wrong = sorted({str(each) for each in getattr(self, name).values() if each not in SPLITS})
            if wrong:
                raise ValueError(f"{name}: expected {', '.join(SPLITS)}, got {wrong[0]!r:.40}")

    @property
    def attributes(self) -> tuple[str, ...]:
        return tuple(self.templates)

    def chosen(self, attributes: Sequence[str]) -> "EntityData":
        """Only these attributes, and entities that have all of them. Raises ValueError for one that is unknown."""
        for attribute in attributes:
            if attribute not in self.templates:
                raise ValueError(
                    f"attributes: expected some of {', '.join(self.templates)} of a {self.name}, got {attribute!r}"
                )
        if len(set(attributes)) < 2 or len(set(attributes)) < len(attributes):
            raise ValueError(f"attributes: expected at least two, each once, got {list(attributes)}")
        entities = [each for each in self.labels[attributes[0]] if all(each in self.labels[a] for a in attributes)]
        return EntityData(
            self.name,
            {attribute: {entity: self.labels[attribute][entity] for entity in entities} for attribute in attributes},
            {attribute: tuple(self.templates[attribute]) for attribute in attributes},
            {entity: split for entity, split in self.entity_split.items() if entity in set(entities)},
            self.template_split,
        )

    def limited(self, templates: int | None) -> "EntityData":
        """At most so many templates of each attribute and split, the first ones."""
        if templates is None:
            return self
        kept: dict[str, tuple[str, ...]] = {}
        for attribute, every in self.templates.items():
            of_split: dict[str | None, list[str]] = {}
            for template in every:
                of_split.setdefault(self.template_split.get(template), []).append(template)
            few = {template for each in of_split.values() for template in each[:templates]}
            kept[attribute] = tuple(template for template in every if template in few)
        return EntityData(self.name, self.labels, kept, self.entity_split, self.template_split)

    @property
    def entities(self) -> tuple[str, ...]:
        """Of the first attribute, in order."""
        return tuple(self.labels[self.attributes[0]])

    def prompts(self) -> list[Prompt]:
        """Every template with every entity."""
        return [
            Prompt(entity, attribute, template)
            for attribute, templates in self.templates.items()
            for template in templates
            for entity in self.entities
        ]

    def identity(self) -> list[Any]:
        """As values of JSON."""
        return [
            self.name,
            {attribute: dict(labels) for attribute, labels in self.labels.items()},
            {attribute: list(templates) for attribute, templates in self.templates.items()},
            dict(self.entity_split),
            {each: self.template_split.get(each) for every in self.templates.values() for each in every},
        ]


def read_ravel(folder: str | os.PathLike, entity_type: str = "city") -> EntityData:
    """The entities of a type in a folder of the benchmark's own files.

    A template listed under several attributes belongs to the first. Raises ValueError for a type of which the folder
    has no files, BadFileError for files that are not of that layout.
    """
    folder = as_path("data", folder)
    check_type("entity_type", entity_type, str)
    names = ("entity_attributes", "attribute_to_prompts", "entity_to_split", "prompt_to_split")
    paths = {name: folder / f"ravel_{entity_type}_{name}.json" for name in names}
    if not os.path.lexists(paths["entity_attributes"]):
        kinds = sorted(path.name[6:-23] for path in folder.glob("ravel_*_entity_attributes.json"))
        there = f"those of {', '.join(kinds)}" if kinds else "no files of RAVEL"
        raise ValueError(f"data: expected files of the entity type {entity_type!r}, found {there} in {shown(folder)}")
    found = {name: _strings(path) for name, path in paths.items()}
    labels: dict[str, dict[str, str]] = {}
    for entity, of_entity in found["entity_attributes"].items():
        for attribute, label in of_entity.items():
            if label.strip():  # the benchmark leaves some open
                labels.setdefault(attribute, {})[entity] = label
    templates: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    for attribute, listed in found["attribute_to_prompts"].items():
        kept = [template for template in dict.fromkeys(listed) if template not in taken and template.count(PLACE) == 1]
        taken.update(kept)
        if kept and attribute in labels:
            templates[attribute] = tuple(kept)
    try:
        return EntityData(entity_type, labels, templates, found["entity_to_split"], found["prompt_to_split"])
    except ValueError as error:
        raise BadFileError(f"{shown(folder)}: {error}") from error


def _strings(path: Path) -> dict[str, Any]:
    """A dict of a JSON file whose values are texts, lists of texts or dicts of texts."""
    found = read_json(path)

    def is_good(value: Any) -> bool:
        if isinstance(value, list):
            return all(isinstance(each, str) for each in value)
        if isinstance(value, dict):
            return all(isinstance(each, str) for each in value.values())
        return isinstance(value, str)

    values = found.values() if isinstance(found, dict) else ()
    kinds = {type(value) for value in values}
    if not isinstance(found, dict) or len(kinds) != 1 or not all(map(is_good, values)):
        raise BadFileError(f"{shown(path)}: expected an object of texts as RAVEL has it, found another")
    return found
