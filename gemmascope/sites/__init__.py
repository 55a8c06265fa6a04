"""Where SAEs read and write inside a language model: capture activations, splice reconstructions, probe the model."""

from .attach import Attachment, attach, detach_all
from .attribution import Attribution, attribute
from .capture import Capture
from .code_store import CodeStore, collect_to_store
from .collect import Codes, collect
from .decoder import all_sites, evaluating, site_width
from .edits import Ablate, Add, Clamp, Edit, Patch
from .probe import probe
from .scales import LatentScales
from .site import INPUT_KINDS, KINDS, Site
from .tap import Tap
from .tokens import special_token_ids

__all__ = [
    "INPUT_KINDS",
    "KINDS",
    "Ablate",
    "Add",
    "Attachment",
    "Attribution",
    "Capture",
    "Clamp",
    "CodeStore",
    "Codes",
    "Edit",
    "LatentScales",
    "Patch",
    "Site",
    "Tap",
    "all_sites",
    "attach",
    "attribute",
    "collect",
    "collect_to_store",
    "detach_all",
    "evaluating",
    "probe",
    "site_width",
    "special_token_ids",
]
