"""A whole run of `gemmascope train`: from a config and a model to judged SAEs."""

from .config import SuiteConfig
from .plan import Plan, make_plan
from .run import harvest_suite, plan_suite, train_suite

__all__ = ["Plan", "SuiteConfig", "harvest_suite", "make_plan", "plan_suite", "train_suite"]
