"""Where SAEs read and write inside a language model: capture activations, splice reconstructions, probe the model."""

from .attach import Attachment, attach, detach_all
from .capture import Capture
from .decoder import all_sites, evaluating, site_width
from .edits import Ablate, Add, Clamp, Edit, Patch
from .probe import probe
from .scales import LatentScales
from .site import KINDS, Site
from .tap import Tap
from .tokens import special_token_ids

__all__ = [
    "KINDS",
    "Ablate",
    "Add",
    "Attachment",
    "Capture",
    "Clamp",
    "Edit",
    "LatentScales",
    "Patch",
    "Site",
    "Tap",
    "all_sites",
    "attach",
    "detach_all",
    "evaluating",
    "probe",
    "site_width",
    "special_token_ids",
]
