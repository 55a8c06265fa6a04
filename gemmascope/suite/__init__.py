"""A whole run of `gemmascope train`: from a config and a model to judged SAEs."""

from .check import CheckConfig, check_sae
from .config import SuiteConfig
from .dashboards import DashboardConfig, make_dashboards
from .evaluate import evaluate_saes
from .export import export_saes, import_sae
from .judged import EvaluateConfig
from .model import Loaded, load_architecture, load_model
from .plan import Plan, make_plan
from .probe import ProbeConfig, probe_saes
from .ravel import RavelConfig, ravel_saes
from .run import harvest_suite, plan_suite, train_suite
from .study import Studied, StudyConfig, study_saes

__all__ = [
    "CheckConfig",
    "DashboardConfig",
    "EvaluateConfig",
    "Loaded",
    "Plan",
    "ProbeConfig",
    "RavelConfig",
    "Studied",
    "StudyConfig",
    "SuiteConfig",
    "check_sae",
    "evaluate_saes",
    "export_saes",
    "harvest_suite",
    "import_sae",
    "load_architecture",
    "load_model",
    "make_dashboards",
    "make_plan",
    "plan_suite",
    "probe_saes",
    "ravel_saes",
    "study_saes",
    "train_suite",
]
