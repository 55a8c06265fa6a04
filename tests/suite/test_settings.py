"""What a user writes: TOML files, overrides, numbers of tokens."""

import os
import re

import pytest

from gemmascope.errors import EnvironmentProblemError
from gemmascope.suite import settings
from gemmascope.suite.settings import as_count, check_keys, merged, overridden, read_toml


@pytest.mark.parametrize(
    ("written", "count"),
    [
        (7, 7),
        ("7", 7),
        ("500M", 500_000_000),
        ("1.5B", 1_500_000_000),
        ("20k", 20_000),
        ("60K", 60_000),
        ("20 k", 20_000),
        (" 20k ", 20_000),
        ("0.5k", 500),
        ("1_000", 1000),
        ("0.000000001B", 1),
    ],
)
def test_counts(written, count):
    assert as_count("tokens", written) == count


@pytest.mark.parametrize(
    "written",
    [
        "",
        "M",
        "500m",
        "5T",
        "1e6",
        "-5",
        "+5",
        "0x10",
        "1.5",
        "0.0001k",
        "1,000",
        "nan",
        "inf",
        "٣k",
        "5MM",
        "9" * 5000,
    ],
)
def test_strings_that_are_no_counts(written):
    with pytest.raises(ValueError, match=r'^tokens: expected a whole number, or one such as "500M", "1\.5B" or "20k"'):
        as_count("tokens", written)


@pytest.mark.parametrize("written", [5e8, True, None, [5], float("nan"), {}], ids=repr)
def test_types_that_are_no_counts(written):
    with pytest.raises(TypeError, match=r'^tokens: expected an int, or a str such as "500M", got '):
        as_count("tokens", written)


@pytest.mark.parametrize("written", [0, -1, "0", 10**16, "10000000B"], ids=repr)
def test_counts_out_of_range(written):
    with pytest.raises(ValueError, match=r"^tokens: expected at (least 1|most 1000000000000000), got "):
        as_count("tokens", written)


# ---- files


def write(tmp_path, data: bytes):
    path = tmp_path / "config.toml"
    path.write_bytes(data)
    return path


def test_a_file(tmp_path):
    path = write(tmp_path, b'[suite]\ntokens = "5M"\n[[suite.sae]]\nd_sae = 4\n[[suite.sae]]\nd_sae = 8\n')
    assert read_toml(path) == {"suite": {"tokens": "5M", "sae": [{"d_sae": 4}, {"d_sae": 8}]}}
    assert read_toml(str(path)) == read_toml(path)


def test_a_byte_order_mark_is_passed_over(tmp_path):
    assert read_toml(write(tmp_path, b"\xef\xbb\xbfa = 1")) == {"a": 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a = 1\na = 2", "expected TOML, found: Cannot overwrite a value"),
        (b"[a]\n[a]", "expected TOML, found: Cannot declare"),
        (b"a = 1\n[a.b]\n", "expected TOML, found: "),
        (b"a = ", "expected TOML, found: Invalid value"),
        (b"a = 'x", "expected TOML, found: "),
        (b"a = " + b"9" * 5000, "expected TOML, found: "),
        (b"a = " + b"[" * 100_000, "nested too deeply"),
        (b"a = '\xff'", "expected UTF-8, found the byte 0xff at 5"),
        (b"\xff\xfea\x00", "expected UTF-8, found the byte 0xff at 0"),
        (b"a = 1 #" + b"x" * (1 << 20), "expected at most 1048576 bytes of TOML, found more"),
    ],
    ids=["twice", "table twice", "under a value", "no value", "open", "long int", "deep", "latin", "utf-16", "large"],
)
def test_files_that_are_refused(tmp_path, data, message):
    path = write(tmp_path, data)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: .*{re.escape(message)}") as found:
        read_toml(path)
    assert type(found.value) is ValueError


def test_places_where_there_is_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"^config: expected a file, found none: .*absent\.toml$"):
        read_toml(tmp_path / "absent.toml")
    with pytest.raises(ValueError, match=r"^config: expected a file, found a folder: "):
        read_toml(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"^config: expected a file, found something else: "):
        read_toml(tmp_path / "pipe")
    with pytest.raises(TypeError, match=r"^config: expected a str or an os.PathLike, got int$"):
        read_toml(3)


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, b"")
    monkeypatch.setattr(settings, "open", refuse, raising=False)
    with pytest.raises(EnvironmentProblemError, match=r"config\.toml: cannot be read: Permission denied$"):
        read_toml(path)


# ---- merging and overriding


def test_tables_are_merged_and_values_replaced():
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 3}
    assert merged(base, {"a": {"y": [5]}, "c": {"z": 1}}) == {"a": {"x": 1, "y": [5]}, "b": 3, "c": {"z": 1}}
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 3}


def test_blocks_complete_that_of_a_preset():
    base = {"suite": {"sae": [{"d_sae": 16, "bandwidth": 0.1}]}}
    changes = {"suite": {"sae": [{"target_l0": 5}, {"d_sae": 32}]}}
    assert merged(base, changes)["suite"]["sae"] == [
        {"d_sae": 16, "bandwidth": 0.1, "target_l0": 5},
        {"d_sae": 32, "bandwidth": 0.1},
    ]


TWO = [{"d_sae": 1}, {"d_sae": 2}]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("suite.tokens=5M", {"suite": {"tokens": "5M", "sae": TWO}}),
        ("suite.sae.d_sae=4096", {"suite": {"sae": [{"d_sae": 4096}, {"d_sae": 4096}]}}),
        ("suite.sae[1].d_sae=4096", {"suite": {"sae": [{"d_sae": 1}, {"d_sae": 4096}]}}),
        ("suite.sae.target_l0=[5, 9.5]", {"suite": {"sae": [{"d_sae": n, "target_l0": [5, 9.5]} for n in (1, 2)]}}),
        ("suite.training.bandwidth = 1e-3", {"suite": {"training": {"bandwidth": 1e-3}, "sae": TWO}}),
        ('model.name="a=b"', {"model": {"name": "a=b"}, "suite": {"sae": TWO}}),
        ("model.name=google/gemma-2-2b", {"model": {"name": "google/gemma-2-2b"}, "suite": {"sae": TWO}}),
        ("suite.on=true", {"suite": {"on": True, "sae": TWO}}),
        ("suite.sae=[{d_sae = 3}]", {"suite": {"sae": [{"d_sae": 3}]}}),
    ],
)
def test_overrides(override, expected):
    assert overridden({"suite": {"sae": TWO}}, [override]) == expected


def test_overrides_follow_each_other_and_change_no_original():
    base = {"suite": {"sites": ["a", "b"]}}
    result = overridden(base, ["suite.sites[1]=c", "suite.tokens=1", "suite.tokens=2", "suite.sae.d_sae=5"])
    assert result == {"suite": {"sites": ["a", "c"], "tokens": 2, "sae": [{"d_sae": 5}]}}
    assert base == {"suite": {"sites": ["a", "b"]}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("suite.tokens", "--set: expected KEY=VALUE such as suite.sae.d_sae=4096, got 'suite.tokens'"),
        ("=5", "--set: expected KEY=VALUE"),
        ("suite..tokens=5", "--set: expected KEY=VALUE"),
        ("suite.sae[-1].d_sae=5", "--set: expected KEY=VALUE"),
        ("suite.sae[x].d_sae=5", "--set: expected KEY=VALUE"),
        ("suite.sae[2].d_sae=5", "suite.sae: expected an index below 2, got [2]"),
        ("suite.sites[0]=x", "suite.sites: expected a list, got NoneType"),
        ("suite.tokens.x=5", "suite.tokens: expected a table, got '5M'"),
        ("suite[0].tokens=5", "suite: expected a list, got dict"),
        ("suite.sites=[resid]", "suite.sites: expected a value of TOML or a bare word, got '[resid]'"),
        ("suite.sites=", "suite.sites: expected a value of TOML or a bare word, got ''"),
        ("suite.sites='x", "suite.sites: expected a value of TOML or a bare word"),
        ("suite.tokens=5\nsuite.seed=3", "suite.tokens: expected a value of one line"),
    ],
)
def test_overrides_that_are_refused(override, message):
    with pytest.raises(ValueError, match=r"^" + re.escape(message)):
        overridden({"suite": {"tokens": "5M", "sae": [{"d_sae": 1}, {"d_sae": 2}]}}, [override])


def test_an_override_nested_too_deeply():
    with pytest.raises(ValueError, match=r"^suite\.sites: expected a value, found arrays nested too deeply$"):
        overridden({}, ["suite.sites=" + "[" * 100_000])


@pytest.mark.parametrize("overrides", ["a=1", [3], None], ids=repr)
def test_overrides_of_another_type(overrides):
    with pytest.raises(TypeError, match=r"^overrides: expected "):
        overridden({}, overrides)


def test_keys():
    check_keys("suite", {"tokens": 1}, ["tokens", "sites"])
    with pytest.raises(ValueError, match=r"^suite\.tokns: expected a known key, perhaps tokens, got 'tokns'$"):
        check_keys("suite", {"tokns": 1}, ["tokens", "sites"])
    with pytest.raises(ValueError, match=r"^zzz: expected one of sites, tokens, got 'zzz'$"):
        check_keys("", {"zzz": 1}, ["tokens", "sites"])
    with pytest.raises(TypeError, match=r"^suite: expected a table, got list$"):
        check_keys("suite", [1], ["tokens"])
