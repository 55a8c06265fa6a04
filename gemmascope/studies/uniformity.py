"""How evenly the active latents matter (arXiv 2408.05147, appendix C.3).

    y_i = f_i · ⟨W_dec,i, ∇L⟩        p = |y| / Σ|y|        r_L0 = exp(−Σ p log p) / L0

of one token: f its code, ∇L the gradient at its activation of L, the logit of the true next token less the mean of all
logits there. r is 1 where all active latents matter alike and 1/L0 where one does all. The gradient is of the token's
own prediction alone, not of those after it; therefore tokens are drawn, a few of each row. An SAE's output scale, which
is one for all its latents, cancels.

Control: the same codes with decoder directions drawn at random, of the same norms.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..evaluation.language_model import logits_of, rows_of_a_forward
from ..evaluation.protocol import Subject, Sums
from ..evaluation.token_sets import MarkedText
from ..sites import Capture, Site, attach, evaluating
from ..sites.decoder import eagerly, input_device
from .common import L0_AXIS, Axis, Finding, Plot, Row, Study, Work, between, counted, ratio, row_of

NAME = "uniformity"
FIGURE, RANDOM = "r_L0", "random directions"
OF_ROW = 4
# Summed over the drawn tokens of a document: those with a figure, Σ r, the same of the control, Σ L0 of them.
TERMS = ("tokens", "r", "random_r", "l0")


def columns_of(text: MarkedText, of_row: int = OF_ROW, seed: int = 0) -> Tensor:
    """Of each row some tokens whose next token is a prediction that counts, drawn by ``seed``: int64 [rows, of_row],
    ascending, −1 behind the last where a row has fewer."""
    scored = text.is_scored
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.rand(scored.shape, generator=generator, dtype=torch.float64, device="cpu")
    order = torch.where(scored.cpu(), order, torch.inf)
    least = order.topk(min(of_row, order.shape[1]), dim=1, largest=False)
    beyond = scored.shape[1]
    found = torch.where(least.values.isfinite(), least.indices, beyond).sort(1).values
    return torch.where(found < beyond, found, -1)


def uniformity(tokens: Tensor, effects: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """r_L0 of n tokens from the effects y [entries] of their active latents, and L0, each fp64 [n].

    tokens: int64 [entries], whose each is. NaN where no latent fires, or none has an effect.
    """
    size = effects.double().abs()
    l0 = torch.bincount(tokens, minlength=n).double()
    total = size.new_zeros(n).index_add_(0, tokens, size)
    p = size / total[tokens]
    terms = torch.where(size == 0, size, -p * p.log())
    entropy = size.new_zeros(n).index_add_(0, tokens, terms)
    return torch.where(total == 0, torch.nan, entropy.exp() / l0), l0


def attribution_sums(
    model: nn.Module, text: MarkedText, columns: Tensor, subjects: Sequence[Subject], seed: int = 0
) -> Sums:
    """By document, fp64 and on the CPU: ``documents``, and NAME/uniformity [documents, `TERMS`] of the tokens in
    ``columns`` [rows, k], −1 for none.

    One forward of the model for all SAEs, and k times a backward pass. The model runs as it is; no parameter's gradient
    is touched. seed: of the random directions.
    """
    writes = list(dict.fromkeys(subject.writes for subject in subjects))
    reads = list(dict.fromkeys(subject.reads for subject in subjects))
    numbers = text.documents[text.documents >= 0].unique()
    tables = {
        f"{subject.name}/uniformity": torch.zeros(len(numbers), len(TERMS), dtype=torch.float64, device="cpu")
        for subject in subjects
    }
    device = input_device(model)
    rows = rows_of_a_forward(model, text.tokens.shape[1])
    with evaluating(model), eagerly(model):
        for start in range(0, len(text.tokens), rows):
            part, chosen = text.rows(slice(start, start + rows)), columns[start : start + rows]
            for row, column, given, gradients in _gradients(model, part, chosen, reads, writes, device):
                owner = torch.searchsorted(numbers, part.documents[row, column])
                for subject in subjects:
                    found = _of_subject(subject, given[subject.reads], gradients[subject.writes], seed)
                    tables[f"{subject.name}/uniformity"].index_add_(0, owner, found)
    return {"documents": numbers.double(), **tables}


class _Watched:
    """A function that gives its activation back, as a part of the graph of what comes after."""

    def __init__(self) -> None:
        self.x: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        self.x = x if x.requires_grad else x.detach().requires_grad_()
        return self.x


def _gradients(model: nn.Module, text: MarkedText, columns: Tensor, reads, writes: Sequence[Site], device):
    """For each column: row and column of the tokens, and by site their activations and the gradients of L."""
    watched = {site: _Watched() for site in writes}
    with torch.enable_grad(), Capture(model, reads) as capture, attach(model, watched, ()):
        logits = logits_of(model, text.tokens, None, device)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    places = [watched[site].x for site in writes]
    drawn = [(each >= 0).nonzero()[:, 0] for each in columns.T]
    last = max((index for index, rows in enumerate(drawn) if len(rows)), default=-1)
    for index, rows in enumerate(drawn):
        if not len(rows):
            continue
        column = columns[rows, index]
        at = (rows.to(wide.device), column.to(wide.device))
        own = wide[at]
        target = text.tokens[rows, column + 1].to(wide.device)
        metric = (own.gather(1, target[:, None])[:, 0] - own.mean(1)).sum()
        found = torch.autograd.grad(
            metric, places, retain_graph=index < last, allow_unused=True, materialize_grads=True
        )
        gradients = {
            site: each[rows.to(each.device), column.to(each.device)] for site, each in zip(writes, found, strict=True)
        }
        given = {site: capture[site][rows.to(capture[site].device), column.to(capture[site].device)] for site in reads}
        yield rows, column, given, gradients


def _of_subject(subject: Subject, x: Tensor, gradient: Tensor, seed: int) -> Tensor:
    """`TERMS` of each of the tokens with activations x and gradients [n, width]: fp64 [n, terms]."""
    sae = subject.sae
    x = x.to(sae.W_dec)
    with torch.no_grad():
        code = sae.encode_sparse(x)
    token, latent = code.token_indices(), code.indices.long()
    values, g = code.values.detach().double(), gradient.to(sae.W_dec.device).double()
    rows = sae.W_dec.detach()
    chosen = rows[latent].double()
    generator = torch.Generator("cpu").manual_seed(seed)
    random = (
        torch.randn(rows.shape, generator=generator, dtype=torch.float32, device="cpu")[latent.cpu()]
        .to(rows.device)
        .double()
    )
    random *= (chosen.norm(dim=1) / random.norm(dim=1))[:, None]
    n = len(x)
    r, l0 = uniformity(token, values * (chosen * g[token]).sum(1), n)
    by_chance, _ = uniformity(token, values * (random * g[token]).sum(1), n)
    found = torch.stack([torch.ones_like(r), r, by_chance, l0], 1)
    return torch.where((r + by_chance).isfinite()[:, None], found, torch.zeros_like(found)).cpu()


def run(work: Work) -> Finding:
    text = work.text
    sums = work.attributions(NAME, columns_of(text))
    drawn = work.bootstrap(len(sums["documents"]))
    rows: list[Row] = []
    for sae in work.saes:
        tokens, r, by_chance, l0 = sums[f"{sae.name}/uniformity"].T
        at = {"l0": ratio(l0, tokens), "x": ratio(l0, tokens), "n": int(tokens.sum()), "figure": FIGURE}
        for series, each in (("SAE", r), (RANDOM, by_chance)):
            interval = drawn.ratio(each, tokens)
            rows.append(row_of(NAME, work, sae, y=ratio(each, tokens), series=series, interval=interval, **at))

    def of(series: str) -> str:
        return between([row["y"] for row in rows if row["series"] == series])

    n = max((row["n"] for row in rows), default=0)
    return Finding(
        rows,
        f"r_L0 {of('SAE')} at L0 {between([row['x'] for row in rows])} ({RANDOM}: {of(RANDOM)}; 1 is even), "
        f"on {counted(n, 'token')}",
    )


STUDY = Study(
    NAME,
    "How evenly do the active latents matter for the next token: exp(entropy of attributions) / L0?",
    "arXiv 2408.05147 appendix C.3, figure 16",
    Plot(
        "How evenly active latents matter",
        L0_AXIS,
        {FIGURE: Axis("r_L0: effective latents / active latents", range=(0.45, 0.7))},
        controls=(RANDOM,),
    ),
    run,
    of_all_tokens=True,
)
