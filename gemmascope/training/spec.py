"""`SAESpec`: one SAE of a suite, before it is trained."""

from dataclasses import dataclass

from ..checks import check_type
from ..sites import Site
from .config import TrainConfig


@dataclass(frozen=True)
class SAESpec:
    """Which SAE to train: at which site, by which recipe, under which name.

    Raises TypeError for fields of other kinds and ValueError for an empty name.
    """

    name: str
    """Unique in its suite, such as ``layer_9/resid/width_2560/target_l0_40``."""
    site: Site
    config: TrainConfig
    init_from: str | None = None
    """A file or folder of an SAE, folded or not, to go on from; or ``REPOSITORY:PATH`` on the Hugging Face hub."""

    def __post_init__(self):
        check_type("name", self.name, str)
        check_type("site", self.site, Site)
        check_type("config", self.config, TrainConfig)
        if self.init_from is not None:
            check_type("init_from", self.init_from, str)
        if not self.name:
            raise ValueError("name: expected one, got an empty one")
