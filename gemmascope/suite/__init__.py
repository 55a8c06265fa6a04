"""A whole run of `gemmascope train`: from a config and a model to judged SAEs."""

from .check import CheckConfig, check_sae
from .config import SuiteConfig
from .export import export_saes, import_sae
from .model import Loaded, load_architecture, load_model
from .plan import Plan, make_plan
from .run import harvest_suite, plan_suite, train_suite

__all__ = [
    "CheckConfig",
    "Loaded",
    "Plan",
    "SuiteConfig",
    "check_sae",
    "export_saes",
    "harvest_suite",
    "import_sae",
    "load_architecture",
    "load_model",
    "make_plan",
    "plan_suite",
    "train_suite",
]
