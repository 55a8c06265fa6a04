"""A whole run of `gemmascope train`: from a config and a model to judged SAEs."""

from .config import SuiteConfig
from .model import Loaded, load_architecture, load_model
from .plan import Plan, make_plan

__all__ = ["Loaded", "Plan", "SuiteConfig", "load_architecture", "load_model", "make_plan"]
