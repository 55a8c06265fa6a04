"""A small overview: two SAEs of three latents, whose activations, logits and neighbours are made up by hand."""

from pathlib import Path

import torch

from gemmascope.dashboards.collect import Collector
from gemmascope.dashboards.overview import Overview, TableOf, Text, Vocabulary, table_path, write_overview
from gemmascope.dashboards.table import LatentTable, Sizes
from gemmascope.kernels import SparseCode
from gemmascope.sites import Site

SIZES = Sizes(top=2, strata=2, of_stratum=1, window=4, bins=4, logits=2, related=1)
STRINGS = {0: "<bos>", 1: " the", 2: "<script>", 3: "\n", 4: "日本", 5: "", 6: "\u202e", 7: '"'}
TOKENS = torch.tensor([[0, 1, 2, 3, 4, 1], [0, 4, 4, 2, 1, 0]], dtype=torch.int32)
COUNTED = TOKENS != 0
# Latent 1 fires on two tokens of one cell and one of another row; latent 2 never does.
F = torch.zeros(2, 6, 3)
F[0, 1, 0], F[0, 2, 1], F[0, 3, 1], F[1, 3, 1] = 0.5, 3.0, 1.25, 0.75


def table(f: torch.Tensor = F) -> LatentTable:
    collector = Collector(3, 6, SIZES)
    collector.add(SparseCode.from_dense(f[COUNTED]), COUNTED, 0)
    found = collector.found()._asdict()
    together = found.pop("together")
    ones = torch.ones(3)
    return LatentTable(
        **found,
        **together._asdict(),
        promoted=torch.tensor([[2, 1], [7, 6], [4, -1]], dtype=torch.int32),
        promoted_logit=torch.tensor([[1.5, 0.123456789], [2.0, 1.0], [0.25, 0.0]]),
        suppressed=torch.tensor([[5, 3], [0, 1], [3, -1]], dtype=torch.int32),
        suppressed_logit=torch.tensor([[-1.0, -0.5], [-2.0, -1.0], [-0.25, 0.0]]),
        near=torch.tensor([[1], [0], [-1]], dtype=torch.int32),
        near_cosine=torch.tensor([[0.875], [0.875], [0.0]]),
        decoder_norm=ones,
        encoder_norm=2 * ones,
        encoder_bias=-ones,
        alignment=torch.tensor([1.0, 0.5, torch.nan]),
        threshold=ones / 4,
    )


def write(folder: Path, strings: dict[int, str] | None = None, scale: float = 1.0) -> Overview:
    saes = []
    for number, (layer, kind) in enumerate([(1, "resid"), (2, "resid")]):
        entry = table(F * scale).save(table_path(folder, number))
        site = Site(layer, kind)
        of = TableOf(f"layer_{layer}/{kind}/width_3", site, site, "jumprelu", 3, int(COUNTED.sum()), {"l0": 0.5})
        saes.append((of, entry))
    return write_overview(
        folder,
        model="made/tiny-it",
        what="two rows",
        seed=0,
        sizes=SIZES,
        text=Text(TOKENS, COUNTED),
        vocabulary=Vocabulary(STRINGS if strings is None else strings),
        n_vocabulary=8,
        saes=saes,
    )
