"""SparseCode: the methods, by hand and against the dense code."""

import pytest
import torch

from gemmascope.kernels import SparseCode
from tests.helpers import assert_bitwise_equal

# Three tokens: two latents, none, one.
CODE = SparseCode(
    values=torch.tensor([1.5, -2.0, 0.25]),
    indices=torch.tensor([0, 3, 2], dtype=torch.int32),
    offsets=torch.tensor([0, 2, 2, 3]),
    d_sae=4,
)
DENSE = torch.tensor([[1.5, 0.0, 0.0, -2.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.25, 0.0]])


def test_counts():
    assert (CODE.n_tokens, CODE.nnz) == (3, 3)
    assert CODE.l0().tolist() == [2, 0, 1]
    assert CODE.token_indices().tolist() == [0, 0, 2]
    assert CODE.firing_count().tolist() == [1, 0, 1, 1]


def test_dense_and_back():
    assert_bitwise_equal("dense", CODE.to_dense(), DENSE)
    again = SparseCode.from_dense(DENSE)
    for name in ("values", "indices", "offsets"):
        assert_bitwise_equal(name, getattr(again, name), getattr(CODE, name))
    assert again.d_sae == 4


def test_to_dense_is_differentiable():
    values = CODE.values.clone().requires_grad_()
    CODE._replace(values=values).to_dense().backward(torch.arange(12.0).view(3, 4))
    assert values.grad.tolist() == [0.0, 3.0, 10.0]


@pytest.mark.parametrize(
    ("dtype", "kept"), [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
)
def test_from_dense_keeps_at_least_fp32(dtype, kept):
    code = SparseCode.from_dense(DENSE.to(dtype))
    assert code.values.dtype == code.to_dense().dtype == kept
    assert (code.indices.dtype, code.offsets.dtype) == (torch.int32, torch.int64)


def test_from_dense_keeps_nan():
    code = SparseCode.from_dense(torch.tensor([[0.0, torch.nan, -0.0]]))
    assert code.indices.tolist() == [1]
    assert code.values.isnan().all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty(shape):
    code = SparseCode.from_dense(torch.zeros(shape))
    assert (code.n_tokens, code.nnz, code.d_sae) == (shape[0], 0, shape[1])
    assert code.l0().tolist() == [0] * shape[0]
    assert code.firing_count().tolist() == [0] * shape[1]
    assert code.to_dense().shape == shape


def test_from_dense_wants_a_matrix():
    with pytest.raises(ValueError, match=r"f: expected shape \[N, d_sae\], got \[2, 3, 4\]"):
        SparseCode.from_dense(torch.zeros(2, 3, 4))


def test_to_moves_every_tensor():
    code = CODE.to("meta")
    assert {t.device.type for t in code[:3]} == {"meta"}
    assert code.d_sae == 4
