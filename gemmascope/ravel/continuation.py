"""`Continuation`: what a language model answers when the stream at a prompt's entity is another one.

Prompts of one template begin with the same tokens. Keys and values of these are made once a template; a forward runs
what follows, from the entity on, and where a stream is given only the layers behind the site. Everything after the
entity sees the change through those layers, as in the whole model; nothing before it can.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..errors import EnvironmentProblemError
from ..sites import Site
from ..sites.beginning import without_layers
from ..sites.decoder import find_decoder, refuse_attention_without_cap

_MLP_NORM = "post_feedforward_layernorm"
# Logits of the same tokens by two ways differ by rounding only.
_SAME = 1e-2


class Tokens(NamedTuple):
    """A prompt as the model reads it: ids, BOS included where there is one, and the index of the entity's last."""

    ids: tuple[int, ...]
    position: int


@dataclass(frozen=True)
class Stack:
    """The decoder layers of a model, and what is around them."""

    text_model: nn.Module
    layers: tuple[nn.Module, ...]
    width: int
    is_gemma: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of the stream."""
        return next(self.layers[0].parameters()).dtype


def stack_of(model: nn.Module) -> Stack:
    """Of a Gemma 2 or 3, or a GPT-2, of transformers. Raises as `find_decoder` for any other model."""
    inner = getattr(model, "transformer", None)
    if isinstance(inner, nn.Module) and isinstance(blocks := getattr(inner, "h", None), nn.ModuleList):
        return Stack(inner, tuple(blocks), cast(Any, inner).config.hidden_size, False)
    decoder = find_decoder(model)
    refuse_attention_without_cap(decoder.config)
    return Stack(decoder.text_model, decoder.layers, decoder.config.hidden_size, True)


@dataclass(frozen=True)
class Template:
    """The prompts of a template: their common beginning, run, and how far it goes.

    keys, values: of each layer [1, heads, start, head_dim]; none where nothing is common.
    """

    start: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class Streams(NamedTuple):
    """Clean activations of some prompts of one template, from the end of the common beginning on.

    stream: [n, seq, width], the residual after the layer of the site; behind the end of a prompt it means nothing.
    vectors: [n, width], the activation of the site at the entity's last token. positions, ends: int64 [n], the indices
    of the entity's last token and of the last token in ``stream``.
    """

    stream: Tensor
    vectors: Tensor
    positions: Tensor
    ends: Tensor


class Continuation:
    """Forwards of ``model``, a causal Gemma 2 or 3 or GPT-2 of transformers in evaluation mode, without gradients to
    its weights.

    Raises as `stack_of`, and EnvironmentProblemError for a model whose logits are not those of its head.
    """

    def __init__(self, model: nn.Module):
        self.stack = stack_of(model)
        self._model: Any = model
        self._head = self._model.get_output_embeddings()
        config = self.stack.text_model.config
        self._cap = getattr(config, "final_logit_softcapping", None)
        self.device = self._head.weight.device
        self._check_head()

    # ---- forwards

    @torch.no_grad()
    def template(self, prompts: Sequence[Tokens]) -> Template:
        """The common beginning of these prompts, none of whose entities it may end in."""
        most = min(prompt.position for prompt in prompts)
        first = prompts[0].ids
        start = 0
        while start < most and all(prompt.ids[start] == first[start] for prompt in prompts):
            start += 1
        if start == 0:
            return Template(0, (), ())
        cache = _new_cache()
        self._run(torch.tensor([first[:start]], device=self.device), past_key_values=cache, use_cache=True)
        return Template(
            start, tuple(layer.keys for layer in cache.layers), tuple(layer.values for layer in cache.layers)
        )

    @torch.no_grad()
    def streams(
        self, template: Template, prompts: Sequence[Tokens], sites: Sequence[Site]
    ) -> tuple[Tensor, dict[Site, Streams]]:
        """One forward of all ``prompts`` of a template: logits of what comes after each, [n, vocabulary], and what is
        at ``sites``, of kinds resid and mlp."""
        ids, positions, ends = self._rows(template, prompts)
        with self._recording(sites) as found:
            hidden = self._run(ids, **self._past(template, len(ids)))
        rows = torch.arange(len(ids), device=self.device)
        made = {}
        for site in sites:
            stream = found["resid", site.layer]
            at_site = stream if site.kind == "resid" else found["mlp", site.layer]
            made[site] = Streams(stream, at_site[rows, positions], positions, ends)
        return self.logits(hidden[rows, ends]), made

    def continued(self, template: Template, site: Site, streams: Streams, new: Tensor) -> Tensor:
        """What the last layer leaves [n, width] at the ends of prompts of a template whose activation at the entity's
        last token is ``new`` [n, width] instead. Differentiable in ``new``. `logits` says what comes after."""
        stream = self._changed(site, streams, new)
        ids = torch.zeros(stream.shape[:2], dtype=torch.int64, device=self.device)  # never embedded into anything
        with without_layers(self.stack.layers[: site.layer + 1], stream):
            hidden = self._run(ids, **self._past(template, len(ids)))
        return hidden[torch.arange(len(ids), device=self.device), streams.ends]

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, vocabulary] of what the last layer leaves, fp32 or fp64. Most of a small model's weights are read here:
        once is better than once a template."""
        logits = self._head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    @torch.no_grad()
    def generated(
        self,
        template: Template,
        prompts: Sequence[Tokens],
        count: int,
        site: Site | None = None,
        new: Tensor | None = None,
    ) -> Tensor:
        """``count`` tokens that the model goes on with, greedily: int64 [n, count]. With ``new`` [n, width] in the
        place of the activation of ``site`` at the entity's last token."""
        ids, positions, ends = self._rows(template, prompts)
        ids = torch.cat([ids, ids.new_zeros(len(ids), count)], 1)
        rows, found = torch.arange(len(ids), device=self.device), []
        for _ in range(count):
            with self._replacing(site, positions, new):
                hidden = self._run(ids, **self._past(template, len(ids)))
            found.append(self.logits(hidden[rows, ends]).argmax(1))
            ends = ends + 1
            ids[rows, ends] = found[-1]
        return torch.stack(found, 1)

    # ---- parts

    def _check_head(self) -> None:
        ids = torch.tensor([[0, 1]], device=self.device)
        with torch.no_grad():
            expected = self._model(input_ids=ids, use_cache=False).logits[:, -1].float()
            found = self.logits(self._run(ids)[:, -1])
        if not (found - expected).abs().max() <= _SAME * expected.abs().max().clamp(min=1):
            raise EnvironmentProblemError("model: expected logits of its output embeddings alone, found others")

    def _run(self, ids: Tensor, **options: Any) -> Tensor:
        options.setdefault("use_cache", False)
        return self.stack.text_model(input_ids=ids, **options).last_hidden_state

    def _rows(self, template: Template, prompts: Sequence[Tokens]) -> tuple[Tensor, Tensor, Tensor]:
        longest = max(len(prompt.ids) for prompt in prompts) - template.start
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64, device="cpu")
        for row, prompt in enumerate(prompts):
            own = prompt.ids[template.start :]
            ids[row, : len(own)] = torch.tensor(own, dtype=torch.int64, device="cpu")
        positions = torch.tensor([prompt.position - template.start for prompt in prompts], device="cpu")
        ends = torch.tensor([len(prompt.ids) - 1 - template.start for prompt in prompts], device="cpu")
        return ids.to(self.device), positions.to(self.device), ends.to(self.device)

    def _past(self, template: Template, rows: int) -> dict[str, Any]:
        """Arguments of a forward that goes on behind the common beginning. A cache of its own each time: it grows."""
        if template.start == 0:
            return {}
        cache = _new_cache()
        for index, (keys, values) in enumerate(zip(template.keys, template.values, strict=True)):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
        return {"past_key_values": cache, "use_cache": True}

    def _changed(self, site: Site, streams: Streams, new: Tensor) -> Tensor:
        """What the MLP adds to the stream is in the stream: another one changes it by the difference."""
        rows = torch.arange(len(new), device=self.device)
        at = streams.stream[rows, streams.positions]
        vector = new.to(at.dtype) if site.kind == "resid" else at + (new - streams.vectors).to(at.dtype)
        stream = streams.stream.clone()
        stream[rows, streams.positions] = vector
        return stream

    @contextmanager
    def _recording(self, sites: Sequence[Site]) -> Iterator[Mapping[tuple[str, int], Tensor]]:
        found: dict[tuple[str, int], Tensor] = {}
        handles = []
        for site in dict.fromkeys(sites):
            places = {"resid": self.stack.layers[site.layer]}
            if site.kind == "mlp":
                places["mlp"] = self.stack.layers[site.layer].get_submodule(_MLP_NORM)
            for kind, module in places.items():
                key = (kind, site.layer)
                handles.append(module.register_forward_hook(_recorder(found, key)))
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _replacing(self, site: Site | None, positions: Tensor, new: Tensor | None) -> Iterator[None]:
        if site is None or new is None:
            yield
            return
        module = self.stack.layers[site.layer]
        rows = torch.arange(len(new), device=self.device)

        def replace(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
            out = out.clone()
            out[rows, positions] = new.to(out.dtype)
            return out

        handle = (module if site.kind == "resid" else module.get_submodule(_MLP_NORM)).register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()


def _recorder(found: dict[tuple[str, int], Tensor], key: tuple[str, int]) -> Callable[..., None]:
    def record(module: nn.Module, inputs: Any, out: Tensor) -> None:
        found[key] = out

    return record


def _new_cache() -> Any:
    """One that keeps every token, so that what it holds can be given again; the masks say what a layer sees."""
    import transformers

    return cast(Any, transformers).DynamicCache()
