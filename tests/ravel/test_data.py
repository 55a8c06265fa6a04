import json
from pathlib import Path

import pytest

from gemmascope.errors import BadFileError
from gemmascope.ravel import EntityData, Prompt, cities, read_ravel
from gemmascope.ravel.data import before_label

FILES = {
    "entity_attributes": {"Aba": {"Land": "Xu", "Sea": "Red"}, "Bob": {"Land": "Yu", "Sea": ""}},
    "attribute_to_prompts": {"Land": ["%s is in", "the land of %s:", "no place"], "Sea": ["%s is by", "%s is in"]},
    "entity_to_split": {"Aba": "train", "Bob": "test"},
    "prompt_to_split": {"%s is in": "train", "the land of %s:": "test", "%s is by": "val"},
}


def written(folder: Path, **changed) -> Path:
    for name, content in (FILES | changed).items():
        (folder / f"ravel_town_{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_the_benchmarks_own_files(tmp_path):
    data = read_ravel(written(tmp_path), "town")
    assert data.attributes == ("Land", "Sea")
    assert data.entities == ("Aba", "Bob")
    assert data.labels == {"Land": {"Aba": "Xu", "Bob": "Yu"}, "Sea": {"Aba": "Red"}}  # an empty label is none
    # A template belongs to one attribute, and has a place for the entity.
    assert data.templates == {"Land": ("%s is in", "the land of %s:"), "Sea": ("%s is by",)}
    assert data.entity_split == {"Aba": "train", "Bob": "test"}
    both = data.chosen(["Land", "Sea"])
    assert both.entities == ("Aba",)  # the one that has both
    assert [prompt.text for prompt in both.prompts()] == ["Aba is in", "the land of Aba:", "Aba is by"]


def test_at_most_so_many_templates_of_each_split(tmp_path):
    prompts = {"Land": ["%s a", "%s b", "%s c", "%s d"], "Sea": ["%s e"]}
    splits = {"%s a": "train", "%s b": "train", "%s c": "test", "%s d": "test", "%s e": "train"}
    data = read_ravel(written(tmp_path, attribute_to_prompts=prompts, prompt_to_split=splits), "town")
    assert data.limited(1).templates == {"Land": ("%s a", "%s c"), "Sea": ("%s e",)}
    assert data.limited(None) is data


def test_files_that_are_damaged(tmp_path):
    with pytest.raises(ValueError, match="entity type 'planet', found those of town"):
        read_ravel(written(tmp_path), "planet")
    with pytest.raises(ValueError, match="no files of RAVEL"):
        read_ravel(tmp_path / "nowhere")
    for wrong in ([], {"Aba": 3}, {"Aba": {"Land": 3}}, {"Aba": {"Land": "x"}, "Bob": "y"}):
        with pytest.raises(BadFileError, match="ravel_town_entity_attributes"):
            read_ravel(written(tmp_path, entity_attributes=wrong), "town")
    with pytest.raises(BadFileError, match="entity_split: expected train, val, test, got 'dev'"):
        read_ravel(written(tmp_path, entity_to_split={"Aba": "dev"}), "town")
    (tmp_path / "ravel_town_entity_to_split.json").unlink()
    with pytest.raises(BadFileError, match="entity_to_split"):
        read_ravel(tmp_path, "town")


def test_attributes_that_are_unknown_or_too_few():
    with pytest.raises(ValueError, match=r"attributes: expected some of country, continent, language.*'mayor'"):
        cities().chosen(["country", "mayor"])
    for wrong in (["country"], ["country", "country"]):
        with pytest.raises(ValueError, match="attributes: expected at least two"):
            cities().chosen(wrong)
    with pytest.raises(ValueError, match="templates: expected texts with one %s"):
        EntityData("town", {"Land": {"Aba": "Xu"}}, {"Land": ("%s and %s",)}, {}, {})


def test_the_cities():
    data = cities()
    assert len(data.entities) >= 150
    assert data.attributes == ("country", "continent", "language")
    table = data.labels
    assert (table["country"]["Kyoto"], table["continent"]["Kyoto"], table["language"]["Kyoto"]) == (
        ("Japan", "Asia", "Japanese")
    )
    assert {len(table[attribute]) for attribute in data.attributes} == {len(data.entities)}
    # A country is on one continent; an entity is no example of a prompt.
    pairs = {(table["country"][city], table["continent"][city]) for city in data.entities}
    assert len(pairs) == len(set(table["country"].values()))
    examples = " ".join(template for every in data.templates.values() for template in every)
    assert not [city for city in data.entities if city in examples]
    for templates in data.templates.values():
        assert {data.template_split[template] for template in templates} == {"train", "test"}
    of_split = [sum(split == name for split in data.entity_split.values()) for name in ("train", "test")]
    assert sum(of_split) == len(data.entities)
    assert 0.3 < of_split[1] / len(data.entities) < 0.35


def test_what_stands_before_a_label():
    assert [before_label(each) for each in ("in %s", "lat: ", '"country": "', "(", "%s,")] == [" ", "", "", "", " "]
    assert Prompt("Ulm", "country", "%s is in").text == "Ulm is in"
