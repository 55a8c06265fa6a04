"""Rows of tokens in memory, and superblocks that need no model."""

import torch
from torch import Tensor

from gemmascope.activations.outliers import norms_of
from gemmascope.activations.ring import Ring
from gemmascope.sites import Site
from tests.tiny_models import BOS, PAD, VOCAB


class FakeRows:
    """`TokenRows` in memory: BOS, then text, with a BOS before a second document and padding after the last."""

    def __init__(self, n_train: int = 10, context: int = 9, seed: int = 0, content: str = "text"):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, VOCAB - 1, (n_train, context), generator=generator)
        self.ids[:, 0] = BOS
        self.ids[1::3, 4:5] = BOS
        self.ids[-1, 5:] = PAD
        self.context, self.n_train, self.content = context, n_train, content
        self.read: list[int] = []

    def train(self, rows: Tensor) -> Tensor:
        assert rows.dtype == torch.int64
        self.read += rows.tolist()
        return self.ids[rows]


class FakeSource:
    """Superblocks of normal noise, each token's activations a function of (superblock, token)."""

    content = "noise"

    def __init__(self, n: int = 40, widths: dict[Site, int] | None = None, scale: dict[int, float] | None = None):
        self.widths = {Site(0, "resid"): 5, Site(1, "mlp"): 3} if widths is None else widths
        self.capacity, self.n = n + 3, n
        self.scale = scale or {}
        self.filled: list[int] = []

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.widths)

    def x(self, block: int, site: Site) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * block + site.layer)
        x = 1 + torch.randn(self.n, self.widths[site], generator=generator, dtype=torch.float32, device="cpu")
        for token, factor in self.scale.items():
            x[token] *= factor
        return x

    def fill(self, block: int, ring: Ring) -> None:
        self.filled.append(block)
        tokens = torch.arange(self.n, device="cpu")
        place = ring.add(tokens + block * self.n, tokens % 7)
        for site in self.sites:
            ring.activations[site][place] = self.x(block, site).to(ring.dtype)
            ring.norms[site][place] = norms_of(ring.activations[site][place])
