"""Where a transcoder reads: the site that it was trained on, by what it says itself.

That is not to be guessed: Gemma Scope 1's transcoders read the normalised residual without the gain of the norm, Gemma
Scope 2's with it, both hidden_size wide, and one on the other's site gives plausible nonsense.
"""

from typing import Any

from ..formats import hook_names
from .site import HOOK_POINTS, Site


def is_transcoder(sae: Any) -> bool:
    """Whether it reads one activation and writes another."""
    return hasattr(sae, "d_in") and hasattr(sae, "d_out")


def stated_site(transcoder: Any) -> Site | None:
    """The site that its metadata says it reads; None where they name none of ours."""
    metadata = getattr(transcoder, "metadata", None)
    found = hook_names.split(metadata.get("site")) if isinstance(metadata, dict) else None
    if found is None:
        return None
    kinds = {point: kind for kind, point in HOOK_POINTS.items()}
    return Site(found[0], kinds[found[1]])


def check_reads(site: Site, transcoder: Any) -> None:
    """Raise ValueError where it says that it reads another kind of site than ``site``."""
    stated = stated_site(transcoder)
    if stated is not None and stated.kind != site.kind:
        raise ValueError(
            f"site {site}: expected a transcoder that reads {site.kind}, got one that reads {stated.kind} "
            f"({HOOK_POINTS[stated.kind]}), as its metadata says"
        )


def input_of(site: Site, transcoder: Any, given: Site | None) -> Site:
    """The site that a transcoder which writes at ``site`` reads: the one ``given``, or that of its metadata, in the
    layer of ``site``. Raises ValueError where there is neither, or the two are of different kinds."""
    if given is not None:
        check_reads(given, transcoder)
        return given
    stated = stated_site(transcoder)
    if stated is None:
        raise ValueError(
            f"inputs: expected the site that the transcoder at {site} reads, which its metadata leaves out"
        )
    return Site(site.layer, stated.kind)
