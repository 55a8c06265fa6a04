from typing import Any

TensorDescriptor: Any
