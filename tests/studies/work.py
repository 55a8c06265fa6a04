"""A `studies.Work` that measures everything at once, on models in fp64."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gemmascope.evaluation.bootstrap import Bootstrap
from gemmascope.evaluation.figures import Figures, plain
from gemmascope.evaluation.protocol import Subject, Sums, measure
from gemmascope.evaluation.site_moments import site_moments
from gemmascope.evaluation.token_sets import MarkedText
from gemmascope.sites import Site
from gemmascope.studies import Listed
from gemmascope.studies.common import Conversations
from gemmascope.studies.uniformity import attribution_sums
from tests import tiny_models as tiny


class PlainWork:
    """sources: of each document. second: the other model."""

    model, second_model = "tiny", "second"

    def __init__(self, model: nn.Module, text: MarkedText, subjects: list[Subject], **others: Any):
        self.models = {"model": model, "second": others.get("second", model)}
        self.text, self.subjects = text, subjects
        self.of_sources: Mapping[int, str] = others.get("sources", {})
        self.spoken: Conversations | None = others.get("spoken")
        self.frequency: Mapping[str, torch.Tensor] = {}
        self.saes = [
            Listed(each.name, each.writes.kind, each.writes.layer, each.sae.d_sae, "jumprelu", each.writes)
            for each in subjects
        ]

    def sources(self) -> Mapping[int, str]:
        return self.of_sources

    def bootstrap(self, documents: int) -> Bootstrap:
        return Bootstrap(documents, draws=20, seed=0)

    def moments(self, on: str = "model", text: MarkedText | None = None):
        sites = list(dict.fromkeys(each.writes for each in self.subjects))
        return site_moments(self.models[on], tiny.tokens(6, 9, seed=1), text or self.text, sites, 5.0)

    def sums(self, name: str, text: MarkedText | None = None, *, on="model", sae_dtype=None) -> Sums:
        which = on if on in self.models else "model"
        text = self.text if text is None else text
        return measure(self.models[which], text, self.subjects, self.moments(which, text), sets=("text",))

    def evaluation(self) -> dict[str, dict[str, Any]]:
        sums = measure(self.models["model"], self.text, self.subjects, self.moments())
        figures = Figures(sums, self.bootstrap(len(sums["documents"])))
        found = {each.name: plain(figures.of(each.name, each.writes)) for each in self.subjects}
        self.frequency = {each.name: figures.frequency(each.name).float() for each in self.subjects}
        return {name: row | {"pca_fvu": 0.5, "control_tokens": 10} for name, row in found.items()}

    def frequencies(self) -> Mapping[str, torch.Tensor]:
        return self.frequency

    def attributions(self, name: str, columns: torch.Tensor) -> Sums:
        return attribution_sums(self.models["model"], self.text, columns, self.subjects)

    def conversations(self) -> Conversations:
        return self.spoken or Conversations(self.text, torch.zeros_like(self.text.tokens), ("text",))


class GivenWork(PlainWork):
    """One whose evaluation and frequencies are given, of SAEs at one site. figures: of each SAE, by name; ``width`` and
    ``kind`` are not of the evaluation."""

    def __init__(self, figures: Mapping[str, Mapping[str, Any]], frequency: Mapping[str, torch.Tensor] | None = None):
        self.figures, self.frequency, site = figures, frequency or {}, Site(1, "resid")
        self.saes = [
            Listed(name, "resid", 1, each.get("width", 4), each.get("kind", "jumprelu"), site)
            for name, each in figures.items()
        ]

    def evaluation(self) -> dict[str, dict[str, Any]]:
        return {name: dict(each) for name, each in self.figures.items()}
