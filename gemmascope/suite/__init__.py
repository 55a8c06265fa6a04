"""A whole run of `gemmascope train`: from a config and a model to judged SAEs."""

from .config import SuiteConfig
from .model import Loaded, load_architecture, load_model

__all__ = ["Loaded", "SuiteConfig", "load_architecture", "load_model"]
