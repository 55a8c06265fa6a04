"""Where SAEs read and write inside a language model: capture activations, splice reconstructions, probe the model."""

from .attach import Attachment, attach
from .capture import Capture
from .decoder import all_sites, evaluating, site_width, special_token_ids
from .probe import probe
from .site import KINDS, Site

__all__ = [
    "KINDS",
    "Attachment",
    "Capture",
    "Site",
    "all_sites",
    "attach",
    "evaluating",
    "probe",
    "site_width",
    "special_token_ids",
]
