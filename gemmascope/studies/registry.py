"""The studies by name, in the order in which they are listed and run."""

from . import bf16, frequency, position, sparsity_fidelity, subsets, transfer, uniformity, width_ladder
from .common import Study

_EVERY = (sparsity_fidelity, position, width_ladder, frequency, subsets, transfer, bf16, uniformity)
STUDIES: dict[str, Study] = {module.STUDY.name: module.STUDY for module in _EVERY}
