"""Gemma Scope's protocol (arXiv 2408.05147 §3.4) as sums over tokens, a block of rows at a time.

A batch of rows runs through the model once as it is. From this one forward come the activations of all sites, the clean
losses, and what every SAE makes of its site. Then the model runs with one activation after another replaced: by zero,
by the mean of the site, and by each reconstruction, where the set of tokens says so (`token_sets`); each time from the
layer of the site on, for the layers before do what they did. No activation outlives its batch. All sums are fp64, and
of each document by itself, so that documents can be drawn anew (`bootstrap`).
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels import density
from ..saes import Transcoder
from ..saes.base import BaseSAE
from ..sites import Capture, Site, attach, evaluating
from ..sites.beginning import beginning_at
from ..sites.decoder import eagerly, input_device
from .language_model import cross_entropy, log_probabilities, logits_of, losses_and_divergences, rows_of_a_forward
from .site_moments import SiteMoments
from .token_sets import SETS, MarkedText
from .variance import by_token

# Summed over the tokens of a document, of each set.
TERMS = ("tokens", "l0", "error", "spread", "about_zero", "square", "product", "cosine", "norm_ratio", "explained")
# Likewise over its predictions.
LOSSES = ("loss", "divergence")
# What takes the place of an activation besides reconstructions.
ABLATIONS = ("zero", "mean")

Sums = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Subject:
    """An SAE or a transcoder: where it reads and where what it makes belongs, the same site for an SAE."""

    name: str
    reads: Site
    writes: Site
    sae: BaseSAE | Transcoder

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of x [n, width]: x̂ in the dtype of the weights, L0 [n], and the entries' (token, latent) [2, entries]."""
        x = x.to(self.sae.W_dec)
        code = self.sae.encode_sparse(x)
        entries = torch.stack([code.token_indices(), code.indices.long()])
        f = code if density.is_sparse(code) else code.to_dense()
        x_hat = self.sae.decode(f, x) if isinstance(self.sae, Transcoder) else self.sae.decode(f)
        return x_hat, code.l0(), entries


class _Fixed:
    """Reconstructs everything as ``value``, of the activation's shape, or a vector of its width."""

    def __init__(self, value: Tensor):
        self.value = value

    def __call__(self, x: Tensor) -> Tensor:
        return self.value.to(x).expand(x.shape)


@torch.no_grad()
def measure(
    model: nn.Module,
    text: MarkedText,
    subjects: Sequence[Subject],
    moments: Mapping[Site, SiteMoments],
    *,
    ablations: Sequence[Site] | None = None,
    sets: Sequence[str] = SETS,
) -> Sums:
    """The sums of ``text`` over its documents, fp64 and on the CPU, by name:

        documents                  [documents]                their numbers, ascending
        clean                      [documents, 2]             predictions, and the sum of their losses
        NAME/tokens                [documents, sets, terms]   of the SAE, by set, `TERMS`
        NAME/losses                [documents, sets, 2]       `LOSSES` with it spliced in at the tokens of the set
        NAME/fired                 [d_sae]                    tokens of the text that each latent fires on
        SITE/zero, SITE/mean       [documents, sets, 2]       likewise with zero or the set's mean in the place

    A prediction is of the document of the token that is predicted. moments: of every site that is written to.
    ablations: the sites that are ablated, by default all those. sets: of `SETS`, those that figures are wanted of. The
    model runs eagerly, in evaluation mode, and is left in its mode. Raises as `attach` and `Capture`.
    """
    written = list(dict.fromkeys(subject.writes for subject in subjects))
    ablated = written if ablations is None else list(ablations)
    read = [*(subject.reads for subject in subjects), *written, *ablated]
    read = list(dict.fromkeys([*read, *filter(None, map(_before, read))]))
    present = text.documents[text.documents >= 0]
    documents = present.unique()
    sums = _Tables(documents)
    rows = rows_of_a_forward(model, text.tokens.shape[1])
    with evaluating(model), eagerly(model):
        for start in range(0, len(text.tokens), rows):
            batch = _Batch(model, text.rows(slice(start, start + rows)), read, sums)
            for site in dict.fromkeys([*written, *ablated]):
                replacing = _Replacing(batch, site, moments[site], sets)
                if site in ablated:
                    replacing.ablate()
                for subject in subjects:
                    if subject.writes == site:
                        replacing.judge(subject)
    return sums.found()


class _Tables:
    """Sums by document, made when they are first added to."""

    def __init__(self, documents: Tensor):
        self.documents = documents
        self._tables: Sums = {}

    def add(self, name: str, owners: Tensor, values: Tensor) -> None:
        """Add ``values`` [n, …] to the rows of the documents ``owners`` [n]; on the CPU, in order."""
        values = values.double().cpu()
        if name not in self._tables:
            self._tables[name] = torch.zeros(len(self.documents), *values.shape[1:], dtype=torch.float64, device="cpu")
        self._tables[name].index_add_(0, torch.searchsorted(self.documents, owners), values)

    def count(self, name: str, counts: Tensor) -> None:
        counts = counts.double().cpu()
        self._tables[name] = self._tables[name] + counts if name in self._tables else counts

    def found(self) -> Sums:
        return {"documents": self.documents.double(), **self._tables}


def _before(site: Site) -> Site | None:
    """Where the stream is that the layer of ``site`` reads; None of the first layer."""
    return Site(site.layer - 1, "resid") if site.layer else None


class _Batch:
    """One forward of the model as it is, and what came of it."""

    def __init__(self, model: nn.Module, text: MarkedText, sites: Sequence[Site], sums: _Tables):
        self.model, self.text, self.sums = model, text, sums
        self.device = input_device(model)
        self.scored = text.is_scored
        self.owners = text.documents[:, 1:][self.scored]
        self.targets = text.tokens[:, 1:][self.scored]
        with Capture(model, sites) as capture:
            logits = self._logits()
        self.activations = {site: capture[site] for site in capture.sites}
        self.log_p = log_probabilities(logits, self.scored)
        loss = cross_entropy(self.log_p, self.targets).double().cpu()
        sums.add("clean", self.owners, torch.stack([torch.ones_like(loss), loss], 1))

    def _logits(self) -> Tensor:
        return logits_of(self.model, self.text.tokens, None, self.device)

    def losses_with(self, site: Site, value: Tensor, mask: Tensor) -> Tensor:
        """`LOSSES` of each prediction [n, 2], fp64, with ``value`` in the place of the activations in ``mask``."""
        before = _before(site)
        shared = nullcontext() if before is None else beginning_at(self.model, site.layer, self.activations[before])
        with shared, attach(self.model, {site: _Fixed(value)}, (), positions=mask):
            logits = self._logits()
        return losses_and_divergences(self.log_p, logits, self.scored, self.targets).cpu()


class _Replacing:
    """What can take the place of the activations of a site in a batch."""

    def __init__(self, batch: _Batch, site: Site, moments: SiteMoments, sets: Sequence[str]):
        self.batch, self.site, self.moments, self.sets = batch, site, moments, tuple(sets)
        self.y = batch.activations[site]
        self.masks = batch.text.masks(self.y, moments.max_norm)
        present = self.masks["every"]
        self.owners = batch.text.documents[present]
        self.rows = self.y[present.to(self.y.device)]
        # Of the rows, which are in each set: [n, sets].
        self.members = torch.stack([self.masks[name][present] for name in self.sets], 1)
        self.present = present

    def _measure(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Run the model with ``values`` by set; where nothing differs from an earlier set, its losses are the same."""
        found: dict[str, Tensor] = {}
        for index, each in enumerate(self.sets):
            same = (
                other
                for other in self.sets[:index]
                if torch.equal(self.masks[each], self.masks[other]) and torch.equal(values[each], values[other])
            )
            before = next(same, None)
            if before is None:
                found[each] = self.batch.losses_with(self.site, values[each], self.masks[each])
            else:
                found[each] = found[before]
        self.batch.sums.add(name, self.batch.owners, torch.stack([found[each] for each in self.sets], 1))

    def ablate(self) -> None:
        nothing = self.y.new_zeros(self.y.shape[-1])
        self._measure(f"{self.site}/zero", dict.fromkeys(self.sets, nothing))
        self._measure(f"{self.site}/mean", self.moments.means)

    def judge(self, subject: Subject) -> None:
        present = self.present
        given = self.batch.activations[subject.reads]
        x = given[present.to(given.device)]
        x_hat, l0, (token, latent) = subject.reconstruct(x)
        terms = self._terms(x_hat.to(self.rows.device), l0)
        self.batch.sums.add(f"{subject.name}/tokens", self.owners, terms)
        of_text = self.masks["text"][present].to(token.device)[token]
        fired = torch.bincount(latent[of_text], minlength=subject.sae.d_sae)
        self.batch.sums.count(f"{subject.name}/fired", fired)
        whole = self.y.clone()
        whole[present.to(whole.device)] = x_hat.to(whole)
        self._measure(f"{subject.name}/losses", dict.fromkeys(self.sets, whole))

    def _terms(self, x_hat: Tensor, l0: Tensor) -> Tensor:
        """`TERMS` of each token, by set, 0 where it is not in it: fp64 [n, sets, terms]."""
        rows = self.rows
        tiny = torch.finfo(torch.float64).tiny
        about_zero = rows.double().square().sum(1)
        found = []
        for index, name in enumerate(self.sets):
            each = by_token(rows, x_hat, self.moments.means[name].to(rows.device))
            norms, x_norms = each.square.sqrt(), about_zero.sqrt()
            share = torch.where(each.error == 0, each.error, each.error / each.spread)
            terms = {
                "tokens": torch.ones_like(each.error),
                "l0": l0.to(each.error),
                "error": each.error,
                "spread": each.spread,
                "about_zero": about_zero,
                "square": each.square,
                "product": each.product,
                "cosine": each.product / (norms * x_norms).clamp(min=tiny),
                "norm_ratio": norms / x_norms.clamp(min=tiny),
                "explained": 1 - share,
            }
            stacked = torch.stack([terms[term] for term in TERMS], 1)
            member = self.members[:, index].to(stacked.device)[:, None]
            found.append(torch.where(member, stacked, torch.zeros_like(stacked)))
        return torch.stack(found, 1)
