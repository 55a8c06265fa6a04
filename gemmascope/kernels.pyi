"""For type checkers alone, which do not read setup.py: the folder kernels/ is imported as gemmascope.kernels.

They see a module here, not a package: `from .kernels import density`, not `from .kernels.density import is_sparse`.
"""

from kernels import *  # noqa: F403
from kernels import density as density
from kernels import dispatch as dispatch
from kernels import entries as entries
from kernels import implementations as implementations
from kernels import reference as reference
from kernels import validation as validation
