"""What gemmascope uses of transformers: reading all of it takes type checkers a minute."""

from typing import Any

from torch import nn

class Gemma2Config:
    def __init__(self, **values: Any) -> None: ...

class Gemma2ForCausalLM(nn.Module):
    config: Any
    def __init__(self, config: Gemma2Config) -> None: ...

class PreTrainedTokenizerFast:
    backend_tokenizer: Any
    def __init__(self, **values: Any) -> None: ...
    def __call__(self, text: Any, **values: Any) -> Any: ...
    def __getattr__(self, name: str) -> Any: ...
