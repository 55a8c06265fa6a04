"""The checks of the Triton operators of the training step, asked about the operators of another implementation."""

import pytest

from gemmascope.kernels.implementations import operator

pytest.importorskip("triton")  # the modules of the checks need it
from tests.kernels import test_dense, test_entries, test_latents, test_residual, test_update

ORACLES = {
    test_entries: ("encode_entries",),
    test_residual: ("residual_pass",),
    test_latents: ("by_latent", "latent_pass", "encoder_times", "weight_gradients"),
    test_update: ("update_from_entries", "update_from_dense"),
    test_dense: ("dense_encode", "dense_backward"),
}


def ask(impl: str, monkeypatch) -> None:
    """Puts the operators of ``impl`` under the names by which the modules' checks call them."""
    for module, names in ORACLES.items():
        for name in names:
            monkeypatch.setattr(module, name, operator(name, impl))
