"""`SAESpec`: one SAE or transcoder of a suite, before it is trained."""

from dataclasses import dataclass

from ..checks import check_type
from ..sites import INPUT_KINDS, KINDS, Site
from .config import TrainConfig


@dataclass(frozen=True)
class SAESpec:
    """Which SAE to train: at which site, by which recipe, under which name.

    Raises TypeError for fields of other kinds and ValueError for an empty name, for a target that is the site itself, a
    ``skip`` without target, and ``init_from`` or ``resample_steps`` with one.
    """

    name: str
    """Unique in its suite, such as ``layer_9/resid/width_2560/target_l0_40``."""
    site: Site
    config: TrainConfig
    init_from: str | None = None
    """A file or folder of an SAE, folded or not, to go on from; or ``REPOSITORY:PATH`` on the Hugging Face hub."""
    target: Site | None = None
    """Where what a transcoder gives belongs, whose input is ``site``; None for an SAE."""

    def __post_init__(self):
        check_type("name", self.name, str)
        check_type("site", self.site, Site)
        check_type("config", self.config, TrainConfig)
        if self.init_from is not None:
            check_type("init_from", self.init_from, str)
        if not self.name:
            raise ValueError("name: expected one, got an empty one")
        if self.target is None:
            if self.config.skip:
                raise ValueError(f"skip: expected a target with skip=True, got none for {self.site}")
            return
        check_type("target", self.target, Site)
        if self.target == self.site:
            raise ValueError(f"target: expected another site than {self.site} itself, which an SAE reconstructs")
        if self.target.kind in INPUT_KINDS:
            raise ValueError(
                f"target: expected one of {', '.join(KINDS)}, where something is written, got {self.target}"
            )
        if self.init_from is not None:
            raise ValueError(f"init_from: expected none with a target, got {self.init_from!r}")
        if self.config.resample_steps:
            found = list(self.config.resample_steps)
            raise ValueError(f"resample_steps: expected none with a target, got {found}")

    @property
    def sites(self) -> tuple[Site, ...]:
        """Those whose activations it is trained on: one, or that of its target too."""
        return (self.site,) if self.target is None else (self.site, self.target)
