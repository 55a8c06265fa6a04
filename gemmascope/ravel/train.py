"""The training of an intervention: a mask over features, directions, or both, by Adam on the model's own loss."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .continuation import Continuation, Streams, Template
from .features import Features, orthonormal
from .knowledge import Activations
from .pairs import Pair
from .presets import Protocol

Tick = Callable[[int], Any]
Exchange = Callable[[Tensor, Tensor], Tensor]


class Interchange:
    """A model, a site of it and clean activations: what an intervention is tried on."""

    def __init__(self, model: Continuation, activations: Activations):
        self.model, self.activations = model, activations
        self._of_prompt = {index: name for name, (_, indices, _) in activations.templates.items() for index in indices}

    def groups(self, pairs: Sequence[Pair]) -> Iterator[tuple[list[int], Template, Streams]]:
        """The pairs whose bases are of one template, by their places in ``pairs``, with the streams of the bases."""
        of_template: dict[str, list[int]] = {}
        for place, pair in enumerate(pairs):
            of_template.setdefault(self._of_prompt[pair.base], []).append(place)
        for name, places in of_template.items():
            template, _, streams = self.activations.templates[name]
            rows = [self.activations.row[pairs[place].base] for place in places]
            few = Streams(*(each[torch.tensor(rows, device=each.device)] for each in streams))
            longest = int(few.ends.max()) + 1
            yield places, template, few._replace(stream=few.stream[:, :longest])

    def ends(self, pairs: Sequence[Pair], places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Bases and sources of the pairs at ``places``: int64 [n] each."""
        columns = zip(*((pairs[place].base, pairs[place].source) for place in places), strict=True)
        base, source = (torch.tensor(column, device=self.model.device) for column in columns)
        return base, source

    def logits(self, pairs: Sequence[Pair], exchange: Exchange) -> tuple[Tensor, Tensor]:
        """Of what comes after each base with ``exchange`` made, [n, vocabulary], and the places [n] in ``pairs`` that
        they are of: templates come after one another."""
        hidden, order = [], []
        for places, template, streams in self.groups(pairs):
            base, source = self.ends(pairs, places)
            hidden.append(self.model.continued(template, self.activations.site, streams, exchange(base, source)))
            order += places
        return self.model.logits(torch.cat(hidden)), torch.tensor(order, device=self.model.device)


@dataclass(frozen=True)
class Trained:
    """An intervention. exchange: (base, source) → activations [n, width], as in `Features.exchanged`. count: how many
    features or directions it exchanges. tensors: what was learnt."""

    exchange: Exchange
    count: int
    tensors: dict[str, Tensor]


def mask_at(m: Tensor, temperature: float) -> Tensor:
    """σ(m/T)."""
    return torch.sigmoid(m / temperature)


def final_mask(m: Tensor, protocol: Protocol) -> Tensor:
    """What the test uses: 1 where m > 0 and 0 elsewhere, or σ(m/T) at the last temperature."""
    return (m > 0).to(m) if protocol.mask == "hard" else mask_at(m, protocol.temperature_end)


def train_mask(
    on: Interchange, features: Features, pairs: Sequence[Pair], protocol: Protocol, seed: int, tick: Tick
) -> Trained:
    """m [size] from 0, x' of the mask σ(m/T), T falling (Differential Binary Masking, arXiv 2402.17700 §3.3)."""
    m = torch.zeros(features.size, dtype=torch.float32, device=on.model.device, requires_grad=True)
    optimiser = torch.optim.Adam([m], lr=protocol.lr)

    def exchange(base: Tensor, source: Tensor, temperature: float) -> Tensor:
        return features.exchanged(base, source, mask_at(m, temperature))

    for temperature, batch in _batches(pairs, protocol, protocol.epochs, seed, tick):
        _step(on, batch, temperature, exchange, m, optimiser, protocol)
    learnt = m.detach()
    mask = final_mask(learnt, protocol)
    return Trained(lambda b, s: features.exchanged(b, s, mask), int((learnt > 0).sum()), {"mask": learnt})


def train_rotation(
    on: Interchange,
    pairs: Sequence[Pair],
    protocol: Protocol,
    seed: int,
    tick: Tick,
    directions: int | None = None,
) -> Trained:
    """Orthonormal directions R, learnt; QR puts them back after each step (Distributed Alignment Search).

    directions: so many of them, all exchanged (DAS), from random ones; None: as many as there are coordinates, from
    these, with a mask over them (MDAS; what arXiv 2409.04478 calls DAS).
    """
    x = on.activations.vectors.float()
    width = x.shape[1]
    if directions is None:
        R = torch.eye(width, dtype=torch.float32, device=x.device)
    else:
        generator = torch.Generator("cpu").manual_seed(seed)
        R = orthonormal(torch.randn(width, directions, generator=generator, dtype=torch.float32, device="cpu"))
    R = R.to(x.device).requires_grad_()
    m = None if directions is not None else R.new_zeros(width).requires_grad_()
    groups = [{"params": [R], "lr": protocol.rotation_lr}, *([] if m is None else [{"params": [m], "lr": protocol.lr}])]
    optimiser = torch.optim.Adam(groups)

    def mixed(base: Tensor, source: Tensor, rotation: Tensor, mask: Tensor | None) -> Tensor:
        coordinates = (x[source] - x[base]) @ rotation
        return x[base] + (coordinates if mask is None else coordinates * mask) @ rotation.T

    def exchange(base: Tensor, source: Tensor, temperature: float) -> Tensor:
        return mixed(base, source, R, None if m is None else mask_at(m, temperature))

    for temperature, batch in _batches(pairs, protocol, protocol.rotation_epochs, seed, tick):
        _step(on, batch, temperature, exchange, m, optimiser, protocol)
        with torch.no_grad():
            R.copy_(orthonormal(R))
    learnt = R.detach()
    if m is None:
        return Trained(lambda b, s: mixed(b, s, learnt, None), learnt.shape[1], {"rotation": learnt})
    mask = final_mask(m.detach(), protocol)
    tensors = {"rotation": learnt, "mask": m.detach()}
    return Trained(lambda b, s: mixed(b, s, learnt, mask), int((m > 0).sum()), tensors)


def steps_of(pairs: int, protocol: Protocol, epochs: int) -> int:
    """Of a training on so many pairs."""
    return epochs * math.ceil(pairs / protocol.batch_size)


def _batches(
    pairs: Sequence[Pair], protocol: Protocol, epochs: int, seed: int, tick: Tick
) -> Iterator[tuple[float, list[Pair]]]:
    """Temperatures and batches: all pairs once an epoch, in an order by ``seed``."""
    generator = torch.Generator("cpu").manual_seed(seed)
    step, steps = 0, steps_of(len(pairs), protocol, epochs)
    for _ in range(epochs):
        order = torch.randperm(len(pairs), generator=generator, device="cpu").tolist()
        for start in range(0, len(order), protocol.batch_size):
            yield (
                protocol.temperature(step, steps),
                [pairs[each] for each in order[start : start + protocol.batch_size]],
            )
            step += 1
            tick(step)


def _step(
    on: Interchange,
    batch: Sequence[Pair],
    temperature: float,
    exchange: Callable[[Tensor, Tensor, float], Tensor],
    m: Tensor | None,
    optimiser: torch.optim.Optimizer,
    protocol: Protocol,
) -> None:
    """One of Adam on the mean cross-entropy of the batch; one that is not finite is refused."""
    optimiser.zero_grad()
    logits, order = on.logits(batch, lambda base, source: exchange(base, source, temperature))
    tokens = torch.tensor([pair.token for pair in batch], device=order.device)
    loss = cross_entropy(logits, tokens[order])
    if protocol.l1 and m is not None:
        loss = loss + protocol.l1 * mask_at(m, temperature).sum()
    if not math.isfinite(loss.item()):
        raise ValueError(f"pairs: expected a finite loss of the model, got {loss.item()}")
    loss.backward()
    optimiser.step()
