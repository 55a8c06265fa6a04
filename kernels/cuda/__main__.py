"""``python -m gemmascope.kernels.cuda`` builds the library and says where it is."""

import sys

from .build import build

try:
    print(build())
except RuntimeError as error:
    sys.exit(str(error))
