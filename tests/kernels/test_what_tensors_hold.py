"""Indices and starts of lists that lead out of memory, or to other tokens' entries: refused on every route of a CPU."""

import pytest
import torch

from gemmascope import kernels
from tests.kernels.native import needs_native
from tests.kernels.operators import D, F, N, arguments

IMPLS = ["reference", "pytorch", pytest.param("cpu", marks=needs_native)]


def code(offsets, indices=(0, 1, 2)) -> kernels.SparseCode:
    indices = torch.tensor(indices, dtype=torch.int32)
    return kernels.SparseCode(torch.ones(len(indices)), indices, torch.tensor(offsets), 4)


BAD_CODES = {
    "below 0": (code([0, -(10**8), 3]), "offsets: expected ascending entries"),
    "beyond the end": (code([0, 3, 100_000]), "offsets: expected to end with 3, got 100000"),
    "descending": (code([0, 2, 1, 3]), "offsets: expected ascending entries"),
    "too few": (code([0, 1]), "offsets: expected to end with 3, got 1"),
    "not from 0": (code([1, 3]), "offsets: expected a first entry of 0, got 1"),
    "no token but entries": (code([0]), "offsets: expected to end with 3, got 0"),
    "overflowing": (code([0, 2**63 - 1, -(2**63), 3]), "offsets: expected ascending entries"),
    "latent below 0": (code([0, 3], [0, -1, 2]), r"indices: expected indices in \[0, 4\), got -1"),
    "no such latent": (code([0, 3], [0, 1, 4]), r"indices: expected indices in \[0, 4\), got 4"),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", BAD_CODES)
def test_decode(name, impl):
    bad, message = BAD_CODES[name]
    with pytest.raises(ValueError, match=message):
        kernels.decode(bad, torch.ones(4, 2), torch.ones(2), impl=impl)


@pytest.mark.parametrize("method", ["check", "l0", "token_indices", "firing_count", "to_dense"])
@pytest.mark.parametrize("name", BAD_CODES)
def test_codes(name, method):
    bad, message = BAD_CODES[name]
    with pytest.raises(ValueError, match=message):
        getattr(bad, method)()


def changed(tensor, place, value):
    changed = tensor.clone()
    changed[place] = value
    return changed


# operator, argument, field, what is put where, and what is said
BAD_LISTS = [
    ("residual_pass", "entries", "offsets", 0, 1, "offsets: expected a first entry of 0"),
    ("residual_pass", "entries", "offsets", 1, -(10**8), "offsets: expected ascending entries"),
    ("residual_pass", "entries", "offsets", 1, 10**8, "offsets: expected ascending entries"),
    ("residual_pass", "entries", "latents", 1, F, r"latents: expected indices in \[0, 40\), got 40"),
    ("residual_pass", "entries", "latents", 1, -1, r"latents: expected indices in \[0, 40\)"),
    ("by_latent", "entries", "latents", 1, F, r"latents: expected indices in \[0, 40\), got 40"),
    ("latent_pass", "entries", "tokens", 2, N, r"tokens: expected indices in \[0, 5\), got 5"),
    ("latent_pass", "entries", "tokens", 2, -1, r"tokens: expected indices in \[0, 5\), got -1"),
    ("latent_pass", "transposed", "order", 0, 10**6, r"order: expected indices in \[0, \d+\), got 1000000"),
    ("latent_pass", "transposed", "order", 0, -1, r"order: expected indices in \[0, \d+\), got -1"),
    ("latent_pass", "transposed", "offsets", -1, 10**6, "offsets: expected .*at most"),
    ("latent_pass", "transposed", "offsets", 1, -5, "offsets: expected ascending entries"),
    ("weight_gradients", "sums", "tokens", 0, N, r"(tokens|rows): expected indices in \[0, 5\), got 5"),
    ("weight_gradients", "transposed", "offsets", -1, 10**6, "offsets: expected .*at most"),
    ("update_from_entries", "sums", "tokens", 0, -1, r"tokens: expected indices in \[0, 5\), got -1"),
    ("update_from_entries", "transposed", "offsets", 0, 1, "offsets: expected a first entry of 0"),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", BAD_LISTS, ids=lambda case: "-".join(map(str, case[:5])))
def test_training_operators(case, impl):
    name, argument, field, place, value, message = case
    given = arguments(impl)[name]
    given[argument] = given[argument]._replace(**{field: changed(getattr(given[argument], field), place, value)})
    with pytest.raises(ValueError, match=message):
        getattr(kernels, name)(**given, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_lies_beyond_the_last_entry_is_not_looked_at(impl):
    given = arguments(impl)["residual_pass"]
    expected = kernels.residual_pass(**given, impl=impl)
    beyond = torch.full((3,), -7, dtype=torch.int32)
    entries = given["entries"]
    longer = entries._replace(
        z=torch.cat((entries.z, torch.full((3,), torch.nan))),
        latents=torch.cat((entries.latents, torch.full_like(beyond, F))),
        tokens=torch.cat((entries.tokens, beyond)),
    )
    found = kernels.residual_pass(longer, *list(given.values())[1:], impl=impl)
    assert torch.equal(found.residual, expected.residual)
    order, starts = kernels.by_latent(longer, F, impl=impl)
    assert (len(order), len(starts)) == (len(longer.z), F + 1)
    assert expected.residual.shape == (N, D)
