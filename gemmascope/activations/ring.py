"""`Ring`: the activations of one superblock, in memory that is allocated once."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checks import check_choice, check_device, check_int, dtype_name
from ..errors import EnvironmentProblemError
from ..sites import Site

RING_DTYPES = (torch.bfloat16, torch.float32)
_SHOWN = 3
_PORTABLE = 1  # pinned for every GPU of the process


class Ring:
    """Room for ``capacity`` tokens at every site, row i of all of them the same token.

    It holds every token of a superblock that is not BOS, EOS or PAD. A `Source` fills it anew for each superblock;
    the tensors stay the same ones. On the CPU with ``pinned`` a GPU copies to and from it directly.

    Raises ValueError for a dtype other than bfloat16 and float32 and a device that is neither the CPU nor a GPU, and
    EnvironmentProblemError when there is no room.
    """

    def __init__(
        self,
        widths: Mapping[Site, int],
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        pinned: bool = False,
    ):
        check_int("capacity", capacity, 1)
        check_dtype("dtype", dtype)
        self.dtype, self.device, self.capacity = dtype, check_place("device", device), capacity
        self.pinned = pinned and self.device.type == "cpu"
        self.n = 0
        """Tokens held, in rows 0 … n − 1."""
        nbytes = ring_bytes(widths, capacity, dtype)
        try:
            self.activations = {
                site: torch.empty(capacity, width, dtype=dtype, device=self.device) for site, width in widths.items()
            }
            self.norms = {site: torch.empty(capacity, dtype=torch.float32, device=self.device) for site in widths}
        except RuntimeError as error:
            raise EnvironmentProblemError(
                f"ring: expected room for {nbytes} bytes on {self.device} ({capacity} tokens at {len(widths)} sites in "
                f"{dtype_name(dtype)}), found too little; take fewer tokens, fewer sites or bfloat16"
            ) from error
        tensors = [*self.activations.values(), *self.norms.values()]
        self._pins = list(map(_Pin, tensors)) if self.pinned else []
        self.row = torch.empty(capacity, dtype=torch.int64, device="cpu")
        """Which row of the text each token is in."""
        self.position = torch.empty(capacity, dtype=torch.int32, device="cpu")
        """Where in that row, from 0."""

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.activations)

    def add(self, row: Tensor, position: Tensor) -> slice:
        """Make room for the tokens at ``position`` [m] of ``row`` [m]: the rows of every site to write them to."""
        start, end = self.n, self.n + len(row)
        if end > self.capacity:
            raise ValueError(f"ring: expected at most {self.capacity} tokens, got {end}")
        self.row[start:end], self.position[start:end], self.n = row, position, end
        return slice(start, end)

    def fill(self, source: "Source", block: int) -> None:
        """Superblock ``block`` of ``source`` in place of what is held.

        Raises EnvironmentProblemError for activations that are not finite, naming the site and the token, and what
        the source raises; the ring is then empty.
        """
        self.n = 0
        try:
            source.fill(block, self)
            self._refuse_not_finite(block)
        except BaseException:
            self.n = 0
            raise

    def _refuse_not_finite(self, block: int) -> None:
        for site, x in self.activations.items():
            suspects = (~self.norms[site][: self.n].isfinite()).nonzero().flatten()
            if not len(suspects):
                continue
            bad = suspects[~x[suspects].isfinite().all(1)].cpu()  # a norm alone may be beyond fp32
            if len(bad):
                tokens = ", ".join(f"row {self.row[i]} position {self.position[i]}" for i in bad[:_SHOWN])
                raise EnvironmentProblemError(
                    f"site {site}: expected finite activations, found NaN or Inf in {len(bad)} of the {self.n} tokens "
                    f"of superblock {block}: {tokens}{', …' if len(bad) > _SHOWN else ''}; load the model in bfloat16 "
                    "or float32, and check its weights"
                )


class Source(Protocol):
    """Where superblocks come from: a `Harvester` or an `ActivationStore`."""

    @property
    def widths(self) -> Mapping[Site, int]: ...

    @property
    def sites(self) -> tuple[Site, ...]: ...

    @property
    def capacity(self) -> int:
        """The most tokens that a superblock can have."""
        ...

    @property
    def content(self) -> str:
        """A key of everything that the bits of every superblock depend on but the dtype of the ring."""
        ...

    def fill(self, block: int, ring: Ring) -> None:
        """Add the tokens of superblock ``block`` to ``ring``, which is empty, with activations and their norms."""
        ...


def ring_bytes(widths: Mapping[Site, int], capacity: int, dtype: torch.dtype) -> int:
    """Memory of a ring's activations and norms, bytes."""
    return capacity * sum(width * dtype.itemsize + torch.float32.itemsize for width in widths.values())


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless it is one that a ring may have."""
    check_choice(name, dtype, RING_DTYPES)


def check_place(name: str, device: torch.device | str) -> torch.device:
    """The CPU or a GPU, with its number. Raises as `check_device`, and ValueError for another device."""
    device = check_device(name, device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: expected the CPU or a GPU, got {device}")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class _Pin:
    """Keeps the pages of a CPU tensor in place. PyTorch's own pinned memory is rounded up to a power of two."""

    def __init__(self, tensor: Tensor):
        runtime: Any = torch.cuda.cudart()
        code = int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, _PORTABLE))
        if code != 0:
            raise EnvironmentProblemError(
                f"ring: expected to pin {tensor.nbytes} bytes of host memory for the GPU, found CUDA error {code}; "
                "take fewer tokens or fewer sites"
            )
        self._tensor, self._unregister = tensor, runtime.cudaHostUnregister  # the memory outlives its pin

    def __del__(self):
        if hasattr(self, "_tensor"):
            self._unregister(self._tensor.data_ptr())
