"""An SAE from a file that says itself which class it is of."""

import os

import torch

from ..errors import BadFileError
from ..formats import release
from ..formats.files import shown
from ..formats.stored import StoredSAE
from .base import check_placement
from .jumprelu import JumpReLUSAE
from .topk import TopKSAE

CLASSES = {cls.ARCHITECTURE: cls for cls in (JumpReLUSAE, TopKSAE)}


def load_sae(
    path: str | os.PathLike, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> JumpReLUSAE | TopKSAE:
    """The SAE in a file or folder of ours, of Gemma Scope, SAELens, sparsify or dictionary_learning.

        load_sae("layer_20/width_16k/average_l0_71")

    ReLU, gated and BatchTopK SAEs come out as the JumpReLU ones that they are. device, dtype: as for
    `JumpReLUSAE.load`. Raises BadFileError for what is none of these, see `gemmascope.formats.release.read`.
    """
    device, dtype = check_placement(device, dtype)
    return _from_stored(release.read(path), shown(path), device, dtype)


def load_pretrained_sae(
    repo: str | os.PathLike,
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> JumpReLUSAE | TopKSAE:
    """The same from a Hugging Face repository, or from a local folder: as `JumpReLUSAE.from_pretrained`."""
    device, dtype = check_placement(device, dtype)
    stored = release.read_pretrained(repo, path, revision=revision)
    return _from_stored(stored, f"{shown(repo)}/{shown(path)}", device, dtype)


def load_named(
    name: str | os.PathLike, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> JumpReLUSAE | TopKSAE:
    """As `load_sae` of a file or folder that is there, else as `load_pretrained_sae` of OWNER/NAME/PATH on the hub."""
    if os.path.lexists(name):
        return load_sae(name, device=device, dtype=dtype)
    owner, *rest = os.fspath(name).split("/", 2)
    if len(rest) < 2 or not all(rest) or owner in ("", ".", "..", "~"):
        raise BadFileError(f"{shown(name)}: expected a file, a folder or OWNER/NAME/PATH on the hub, found none")
    return load_pretrained_sae(f"{owner}/{rest[0]}", rest[1], device=device, dtype=dtype)


def _from_stored(
    stored: StoredSAE, name: str, device: torch.device, dtype: torch.dtype | None
) -> JumpReLUSAE | TopKSAE:
    return CLASSES[stored.config.architecture]._from_stored(stored, name, device, dtype)
