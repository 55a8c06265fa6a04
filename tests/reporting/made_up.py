"""Dashboards made up for tests of what is shown: an overview in a folder, with tokens that mean a page harm."""

from pathlib import Path

import torch
from torch import Tensor

from gemmascope.dashboards.overview import Overview, TableOf, Text, Vocabulary, table_path, write_overview
from gemmascope.dashboards.table import Examples, LatentTable, Sizes, window_start
from gemmascope.sites import Site

HOSTILE = (
    *(
        "<script>alert(1)</script>",
        "</script>",
        '"><img src=x onerror=alert(1)>',
        "&amp;",
        "\\u003c",
        "'",
        "`${alert(1)}`",
    ),
    *("\u202eesrever", "\u200b", "\x00", "\x1b[31m", "\n", "\t", "  ", "", "\u2028", "\ufeff", "\u0301", "--><!--"),
    *("שלום", " العربية", "日本語", "한국", "👩\u200d💻", "\ufffd", "__proto__", "constructor", "a" * 300),
)
WORDS = (
    " the", " of", " and", " to", " in", " is", " that", " for", " it", " as", " was", " on", " be", " by",
    " with", " at", " from", " his", " an", " were", " are", " which", " this", " also", " had", " not", " have",
    " one", " but", " been", " their", " more", " has", " first", " who", " would", " when", " where", " there",
    " two", " some", " can", " its", " out", " other", " into", " time",
)  # fmt: skip
STRINGS = (*HOSTILE, *WORDS)
SIZES = Sizes(top=6, strata=3, of_stratum=2, window=16, bins=32, logits=7, related=4)


def examples_of(codes: Tensor, at: Tensor, sizes: Sizes, shape: tuple[int, ...]) -> Examples:
    """Of the tokens ``at`` [F, slots] of codes [rows, context, F], −1 where there is none."""
    _, context, d_sae = codes.shape
    row, position = (at // context).where(at >= 0, -1), (at % context).where(at >= 0, -1)
    starts = window_start(position, context, sizes)
    offsets = starts[..., None] + torch.arange(sizes.window)
    latents = torch.arange(d_sae)[:, None, None]
    window = codes[row.clamp(min=0)[..., None], offsets, latents].where((at >= 0)[..., None], 0)
    value = codes.flatten(0, 1).T.gather(1, at.clamp(min=0)).where(at >= 0, 0)
    found = Examples(row.int(), position.int(), value, window)
    return Examples(*(part.reshape(d_sae, *shape, *part.shape[2:]) for part in found))


def make_table(codes: Tensor, n_vocabulary: int, seed: int, sizes: Sizes = SIZES) -> LatentTable:
    """A table of dense codes [rows, context, F] whose logits, neighbours and weights are made up."""
    generator = torch.Generator().manual_seed(seed)
    d_sae = codes.shape[2]
    flat = codes.flatten(0, 1).T
    fired = (flat > 0).sum(1)
    largest = flat.amax(1)
    end = torch.where(largest > 0, 2.0 ** (largest.clamp(min=1e-9).log2().floor() + 1), 0)
    histogram = torch.zeros(d_sae, sizes.bins, dtype=torch.int64)
    at_bin = (flat / end.clamp(min=1e-9)[:, None] * sizes.bins).long()
    histogram.scatter_add_(1, at_bin, (flat > 0).long())
    best = flat.argsort(dim=1, descending=True, stable=True)[:, : sizes.top]
    top = torch.where(flat.gather(1, best) > 0, best, -1)
    strata, cells = [], []
    for stratum in range(sizes.strata):
        low, high = end / 2 ** (stratum + 1), end / 2**stratum
        inside = (flat > 0) & (flat < high[:, None])
        if stratum < sizes.strata - 1:
            inside &= flat >= low[:, None]
        first = (~inside).int().argsort(dim=1, stable=True)[:, : sizes.of_stratum]
        strata.append(torch.where(inside.gather(1, first), first, -1))
        cells.append(inside.sum(1))
    related = torch.stack([torch.randperm(d_sae, generator=generator)[: sizes.related] for _ in range(d_sae)]).int()
    both = torch.randint(1, 9, related.shape, generator=generator)

    def ids() -> Tensor:
        return torch.randint(n_vocabulary, (d_sae, sizes.logits), generator=generator).int()

    def logits() -> Tensor:
        return torch.rand(d_sae, sizes.logits, generator=generator).sort(1, descending=True)[0]

    return LatentTable(
        fired=fired,
        total=flat.double().sum(1),
        largest=largest,
        histogram=histogram,
        histogram_end=end,
        top=examples_of(codes, top, sizes, (sizes.top,)),
        strata=examples_of(codes, torch.cat(strata, 1), sizes, (sizes.strata, sizes.of_stratum)),
        stratum_cells=torch.stack(cells, 1),
        promoted=ids(),
        promoted_logit=logits(),
        suppressed=ids(),
        suppressed_logit=-logits(),
        near=related,
        near_cosine=torch.rand(related.shape, generator=generator),
        together=related.flip(1),
        together_tokens=both,
        sampled=fired.clamp(min=10),
        decoder_norm=torch.ones(d_sae),
        encoder_norm=torch.rand(d_sae, generator=generator) + 1,
        encoder_bias=-torch.rand(d_sae, generator=generator),
        alignment=torch.full((d_sae,), float("nan")) if seed % 2 else torch.rand(d_sae, generator=generator),
        threshold=torch.rand(d_sae, generator=generator) + 0.1,
        n_tokens=codes.shape[0] * codes.shape[1],
        n_sampled=codes.shape[0] * codes.shape[1],
    )


def make_codes(tokens: Tensor, d_sae: int, seed: int) -> Tensor:
    """[rows, context, F]: latent i fires on token i mod the vocabulary, less on the next one; a tenth never does."""
    generator = torch.Generator().manual_seed(seed)
    liked = torch.arange(d_sae) % len(STRINGS)
    strength = torch.rand(*tokens.shape, d_sae, generator=generator) + 0.5
    codes = strength * ((tokens[..., None] == liked) * 4.0 + (tokens[..., None] == (liked + 1) % len(STRINGS)) * 0.5)
    codes[..., ::10] = 0
    return codes


def write_dashboards(
    folder: Path, names: tuple[str, ...] = ("layer_1/resid", "layer_2/mlp 20"), d_sae: int = 300, rows: int = 12
) -> Overview:
    """SAEs of these names; every third token of the text is a hostile one."""
    generator = torch.Generator().manual_seed(0)
    context = 32
    tokens = torch.randint(len(HOSTILE), len(STRINGS), (rows, context), generator=generator)
    harm = torch.randint(0, len(HOSTILE), (rows, context), generator=generator)
    tokens = torch.where(torch.arange(context) % 3 == 0, harm, tokens)
    saes = []
    for number, name in enumerate(names):
        table = make_table(make_codes(tokens, d_sae, number), len(STRINGS), number)
        site = Site(number + 1, ("resid", "mlp", "att")[number % 3])
        of = TableOf(name, site, site, "jumprelu", d_sae, table.n_sampled, {})
        saes.append((of, table.save(table_path(folder, number))))
    return write_overview(
        folder,
        model="a <b>model</b>",
        what="made-up text & more",
        seed=3,
        sizes=SIZES,
        text=Text(tokens.int(), torch.ones_like(tokens, dtype=torch.bool)),
        vocabulary=Vocabulary(dict(enumerate(STRINGS))),
        n_vocabulary=len(STRINGS),
        saes=saes,
    )
