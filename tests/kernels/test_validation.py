"""Every message of `gemmascope.kernels.validation`: the argument, what was expected, what came."""

import math
import re

import pytest
import torch

from gemmascope import kernels


def jumprelu_arguments():
    return {
        "pre": torch.zeros(4, 7),
        "b_enc": torch.zeros(7),
        "threshold": torch.zeros(7),
        "bandwidth": 0.5,
    }


def encode_arguments():
    return {
        "x": torch.zeros(4, 3),
        "W_enc": torch.zeros(3, 7),
        "b_enc": torch.zeros(7),
        "threshold": torch.zeros(7),
    }


def code(**changes):
    good = kernels.SparseCode.from_dense(torch.eye(4, 7))
    return good._replace(**changes)


def decode_arguments():
    return {"code": code(), "W_dec": torch.zeros(7, 3), "b_dec": torch.zeros(3)}


ARGUMENTS = {"jumprelu": jumprelu_arguments, "encode": encode_arguments, "decode": decode_arguments}
FLOATS = "float16 or bfloat16 or float32 or float64"
FP64, FP16, INT32 = torch.float64, torch.float16, torch.int32

BAD = [
    ("jumprelu", {"pre": [1.0]}, TypeError, "pre: expected a torch.Tensor, got list"),
    ("jumprelu", {"pre": torch.zeros(7)}, ValueError, "pre: expected shape [N, d_sae], got [7]"),
    ("jumprelu", {"pre": torch.zeros(4, 7, dtype=INT32)}, TypeError, f"pre: expected dtype {FLOATS}, got int32"),
    ("jumprelu", {"b_enc": torch.zeros(4)}, ValueError, "b_enc: expected shape [7], got [4]"),
    ("jumprelu", {"b_enc": torch.zeros(7, device="meta")}, ValueError, "b_enc: expected device cpu, got meta"),
    ("jumprelu", {"threshold": torch.zeros(7, 1)}, ValueError, "threshold: expected shape [7], got [7, 1]"),
    (
        "jumprelu",
        {"threshold": torch.zeros(7, dtype=FP16)},
        TypeError,
        "threshold: expected dtype float32, got float16",
    ),
    ("jumprelu", {"pre": torch.zeros(4, 7).double()}, TypeError, "threshold: expected dtype float64, got float32"),
    ("jumprelu", {"bandwidth": "wide"}, TypeError, "bandwidth: expected a number, got str"),
    ("jumprelu", {"bandwidth": True}, TypeError, "bandwidth: expected a number, got bool"),
    ("jumprelu", {"bandwidth": 0}, ValueError, "bandwidth: expected a finite number > 0, got 0"),
    ("jumprelu", {"bandwidth": -0.5}, ValueError, "bandwidth: expected a finite number > 0, got -0.5"),
    ("jumprelu", {"bandwidth": math.nan}, ValueError, "bandwidth: expected a finite number > 0, got nan"),
    ("jumprelu", {"bandwidth": math.inf}, ValueError, "bandwidth: expected a finite number > 0, got inf"),
    ("encode", {"x": torch.zeros(4, 3, 1)}, ValueError, "x: expected shape [N, d_model], got [4, 3, 1]"),
    ("encode", {"W_enc": torch.zeros(7, 3)}, ValueError, "W_enc: expected shape [3, d_sae], got [7, 3]"),
    ("encode", {"W_enc": torch.zeros(3, 7, dtype=FP16)}, TypeError, "W_enc: expected dtype float32, got float16"),
    ("encode", {"W_enc": torch.zeros(3, 7, device="meta")}, ValueError, "W_enc: expected device cpu, got meta"),
    ("encode", {"b_enc": torch.zeros(3)}, ValueError, "b_enc: expected shape [7], got [3]"),
    ("encode", {"threshold": torch.zeros(3)}, ValueError, "threshold: expected shape [7], got [3]"),
    ("encode", {"threshold": torch.zeros(7).double()}, TypeError, "threshold: expected dtype float32, got float64"),
    ("decode", {"code": torch.zeros(4, 7)}, TypeError, "code: expected a SparseCode, got Tensor"),
    ("decode", {"code": code(d_sae=8)}, ValueError, "code: expected d_sae = 7 as in W_dec, got 8"),
    ("decode", {"W_dec": torch.zeros(7)}, ValueError, "W_dec: expected shape [d_sae, d_model], got [7]"),
    ("decode", {"b_dec": torch.zeros(7)}, ValueError, "b_dec: expected shape [3], got [7]"),
    (
        "decode",
        {"code": code(values=torch.zeros(4, dtype=FP16))},
        TypeError,
        "code.values: expected dtype float32 or float64, got float16",
    ),
    ("decode", {"code": code(indices=torch.zeros(3, dtype=INT32))}, ValueError, "code.indices: expected shape [4]"),
    (
        "decode",
        {"code": code(indices=torch.zeros(4, dtype=torch.int64))},
        TypeError,
        "code.indices: expected dtype int32, got int64",
    ),
    (
        "decode",
        {"code": code(offsets=torch.zeros(5, dtype=INT32))},
        TypeError,
        "code.offsets: expected dtype int64, got int32",
    ),
    (
        "decode",
        {"code": code(offsets=torch.zeros(0, dtype=torch.int64))},
        ValueError,
        "code.offsets: expected N + 1 entries, got none",
    ),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), BAD, ids=[case[3][:60] for case in BAD])
def test_message(name, change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        getattr(kernels, name)(**{**ARGUMENTS[name](), **change})


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_unchanged_arguments_are_accepted(name):
    getattr(kernels, name)(**ARGUMENTS[name]())
