"""`Plan`: what a run will train, hold, write and take, before it starts; and what of it cannot be."""

import dataclasses
import glob
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from ..errors import EnvironmentProblemError
from ..training.config import KINDS
from ..training.memory import GIB
from ..training.spec import SAESpec
from .config import SuiteConfig
from .machine import Machine
from .measure import Measure, Stopwatch, narrowed
from .memory import CHECKPOINT, DEVICE, DISK, HOST, TOKEN_BYTES, ModelSizes, Needs, needs
from .model import Loaded
from .selection import listing

# Of what is free: allocators waste some, and forwards are estimated.
USABLE = 0.95
READ_IN_VAIN = 0.05  # of the tokens that the model reads, worth a note


class Rows(Protocol):
    """Of `TokenRows`, what a plan reads."""

    @property
    def context(self) -> int: ...

    @property
    def n_train(self) -> int: ...

    @property
    def n_held_out(self) -> int: ...


@dataclass(frozen=True)
class Seconds:
    """What the whole run takes, as far as it was measured."""

    forward: float
    steps: float

    @property
    def total(self) -> float:
        return self.forward + self.steps


@dataclass(frozen=True)
class Plan:
    """A run before it starts."""

    config: SuiteConfig
    name: str
    """Of the model."""
    identity: dict[str, Any]
    model: ModelSizes
    specs: tuple[SAESpec, ...]
    machine: Machine
    ring: str
    """Where it will be: `memory.DEVICE` or `memory.HOST`, which on a CPU are one."""
    needs: Needs
    seconds: Seconds | None
    """None where nothing was measured: without weights, and where something does not fit."""
    rows: Rows | None
    problems: tuple[str, ...]
    """What does not fit, each with its arithmetic."""
    advice: tuple[str, ...]
    """Changes of one setting each after which everything would fit; where there are problems."""

    @property
    def parameters(self) -> int:
        """Of all SAEs."""
        return sum(_parameters(spec, self.model) for spec in self.specs)

    @property
    def tokens(self) -> int:
        """That are trained on."""
        return self.config.steps * self.config.suite.batch_size

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.seconds is None else self.tokens / self.seconds.total

    @property
    def epochs(self) -> float | None:
        """Passes over the text; None where it is not tokenised yet."""
        if self.rows is None or self.rows.n_train == 0:
            return None
        return self.tokens / _trained_share(self.config) / (self.rows.n_train * self.rows.context)

    def refuse(self) -> None:
        """Raise EnvironmentProblemError where there are problems."""
        if self.problems:
            raise EnvironmentProblemError("; ".join([*self.problems, self._remedy()]))

    def _remedy(self) -> str:
        return f"what would fit: {', or '.join(self.advice)}" if self.advice else "nothing like it would fit here"

    def text(self) -> str:
        """All of it for people, in lines of plain text."""
        blocks = [
            self._facts(),
            self._saes(),
            *(_memory(self, where) for where in (DEVICE, HOST, DISK) if self.needs.at(where)),
            self._time(),
        ]
        notes = [f"note: {note}" for note in self.notes()]
        refusal = [f"does not fit: {problem}" for problem in self.problems]
        blocks += [notes, [*refusal, self._remedy()] if refusal else []]
        return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"

    def _facts(self) -> list[str]:
        config, identity = self.config, self.identity
        commit = f", revision {identity['revision'][:12]}" if identity.get("revision") else ""
        model = f"{self.name}, {self.model.layers} layers, {_count(self.model.parameters)} parameters"
        run = f"{identity.get('dtype', '')}, {config.model.attention} attention{commit}"
        text = ", ".join(config.text.files) if config.text.files else f"dataset {config.text.dataset}"
        steps = f"{config.steps:,} steps of {config.suite.batch_size:,}"
        return _aligned(
            [
                ("model", ", ".join(part for part in (model, run) if part)),
                ("text", f"{text}, rows of {config.text.context:,} tokens{self._rows()}"),
                ("SAEs", f"{len(self.specs):,} at {_sites(self.specs)}"),
                ("parameters", f"{_count(self.parameters)} in all SAEs"),
                ("tokens", f"{_count(self.tokens)}: {steps}{self._epochs()}"),
                ("recipe", self._recipe()),
                ("checkpoints", self._checkpoints()),
                ("folder", config.run.out),
            ]
        )

    def _rows(self) -> str:
        if self.rows is None:
            return ", not tokenised yet"
        return f": {self.rows.n_train:,} to train on, {self.rows.n_held_out:,} held out"

    def _epochs(self) -> str:
        return "" if self.epochs is None else f", {self.epochs:.3g} passes over the text"

    def _recipe(self) -> str:
        dtypes = sorted({spec.config.compute_dtype for spec in self.specs})
        drop = self.config.activations.drop_norm
        dropped = f", tokens above {drop:g} × the median norm left out" if drop is not None else ""
        return f"{self.config.suite.recipe}, products in {' and '.join(dtypes)}{dropped}"

    def _checkpoints(self) -> str:
        checkpoint = self.config.checkpoint
        size = next(item.nbytes for item in self.needs.items if item.what == CHECKPOINT)
        every = f"{checkpoint.steps:,} steps" if checkpoint.steps is not None else f"{checkpoint.minutes:g} minutes"
        if self.seconds is not None:
            of_a_step = self.seconds.total / self.config.steps
            if checkpoint.steps is not None:
                every += f" (about {_duration(checkpoint.steps * of_a_step)})"
            else:
                every += f" (about {max(1, round(checkpoint.minutes * 60 / of_a_step)):,} steps)"
        return f"every {every}, on a signal and at the end; {_bytes(size)} each, {checkpoint.keep} kept"

    def _saes(self) -> list[str]:
        """A line for each width of site and SAE."""
        groups: dict[tuple[int, int], list[SAESpec]] = {}
        for spec in self.specs:
            groups.setdefault((self.model.width(spec.site), spec.config.d_sae), []).append(spec)
        rows = [("width", "d_sae", "SAEs", "parameters", "aim", "sites")]
        for (width, d_sae), specs in sorted(groups.items()):
            parameters = sum(_parameters(spec, self.model) for spec in specs)
            sites = listing({spec.site for spec in specs})
            rows.append((f"{width:,}", f"{d_sae:,}", f"{len(specs):,}", _count(parameters), _aims(specs), sites))
        return _table(rows)

    def _time(self) -> list[str]:
        if self.seconds is None:
            return ["time: not measured"]
        total, forward, steps = self.seconds.total, self.seconds.forward, self.seconds.steps
        return _aligned(
            [
                ("time, measured here", _duration(total)),
                ("tokens a second", f"{self.tokens_per_second:,.0f}"),
                ("forwards of the model", f"{_duration(forward)}, {forward / total:.0%}"),
                ("steps of the SAEs", f"{_duration(steps)}, {steps / total:.0%}"),
            ]
        )

    def notes(self) -> Iterator[str]:
        """What is worth knowing, though nothing forbids it."""
        gpu = self.machine.device.type == "cuda"
        if gpu and any(spec.config.compute_dtype == "fp32" for spec in self.specs):
            yield 'products in fp32 take several times as long on a GPU as with compute_dtype = "bf16"'
        if gpu and self.ring == HOST and self.config.activations.ring == "auto":
            yield "the ring is on the host, since the device has no room for it besides the rest"
        if self.epochs is not None and self.epochs > 1:
            yield f"the text is read {self.epochs:.3g} times"
        yield from self._read_in_vain()

    def _read_in_vain(self) -> Iterator[str]:
        """A ring is always filled whole, for the last batch too."""
        config, batch = self.config, self.config.suite.batch_size
        each = _batches_of_a_superblock(config)
        whole, left = divmod(config.steps, each)
        if not left or not whole or (each - left) / (each * (whole + 1)) < READ_IN_VAIN:
            return
        per_row = (config.text.context - 1) * config.activations.least_kept
        rows = math.ceil(math.ceil(config.steps / whole) * batch / per_row)
        yield (
            f"the model fills the ring {whole + 1} times, the last time for {left:,} of {each:,} batches; with "
            f"suite.tokens = {whole * each * batch} or activations.ring_tokens = {rows * config.text.context} it "
            f"would do so {whole} times"
        )


def make_plan(
    config: SuiteConfig,
    loaded: Loaded,
    rows: Rows | None = None,
    *,
    machine: Machine | None = None,
    measure: Measure | None = None,
    measured: bool = True,
) -> Plan:
    """The plan of a run of ``config`` on the model, which may be on meta (`load_architecture`): then it has no times.

    rows: its tokens, if they are there. machine: by default this one now. measure: by default runs the model and a
    step of an SAE of each shape for a second or two; not where ``measured`` is False.

    Raises ValueError as `SuiteConfig.specs`. What does not fit is in ``problems``; `Plan.refuse` raises it.
    """
    model = ModelSizes.of(loaded)
    specs = config.specs(loaded.sites)
    if machine is None:
        machine = Machine.here(config.run.device, config.run.out, None if loaded.is_meta else loaded.model)
    budget = _Budget(config, specs, model, machine, _text_bytes(config, rows))
    ring = budget.ring()
    problems = tuple(budget.problems(ring))
    seconds = None
    if measured and not (loaded.is_meta or problems):
        seconds = _measured(config, loaded, specs, model, machine, measure or Stopwatch())
    return Plan(
        config=config,
        name=loaded.name,
        identity=loaded.identity,
        model=model,
        specs=specs,
        machine=machine,
        ring=ring,
        needs=budget.needs(ring),
        seconds=seconds,
        rows=rows,
        problems=problems,
        advice=tuple(budget.alternatives(ring)) if problems else (),
    )


def _measured(
    config: SuiteConfig,
    loaded: Loaded,
    specs: Sequence[SAESpec],
    model: ModelSizes,
    machine: Machine,
    measure: Measure,
) -> Seconds:
    """One measurement for each shape of SAE; a CPU trains as many side by side as it has threads,
    each by one of them. A transcoder counts as an SAE of its larger width."""
    rows, context = config.activations.forward_rows, config.text.context
    sites = sorted({site for spec in specs for site in spec.sites})
    forward = measure.forward(loaded.model, sites, rows, context)
    tokens = config.steps * config.suite.batch_size / _trained_share(config)
    on_gpu = machine.device.type == "cuda"
    side_by_side = 1 if on_gpu else min(machine.threads, len(specs))
    found: dict[tuple[Any, ...], float] = {}
    total = 0.0
    for spec in specs:
        width, recipe = max(model.width(site) for site in spec.sites), spec.config.changed(skip=False)
        of_kind = recipe.kind, recipe.k, recipe.prefixes, recipe.aux_k, recipe.aux_coefficient
        shape = (width, recipe.d_sae, recipe.compute_dtype, recipe.route, recipe.loss.target_l0, *of_kind)
        if shape not in found:
            found[shape] = measure.step(recipe, width, machine.device, config.run.impl, threads=1)
        total += found[shape] * recipe.steps
    return Seconds(forward * tokens / (rows * context), total / side_by_side)


def _trained_share(config: SuiteConfig) -> float:
    """Of the tokens that the model reads, those trained on: neither the BOS of each row, nor those left over where a
    superblock ends."""
    return _batches_of_a_superblock(config) * config.suite.batch_size / (config.rows_per_block * config.text.context)


def _batches_of_a_superblock(config: SuiteConfig) -> int:
    tokens = int(config.rows_per_block * (config.text.context - 1) * config.activations.least_kept)
    return max(1, tokens // config.suite.batch_size)


def _text_bytes(config: SuiteConfig, rows: Rows | None) -> int:
    """Of the token shards. Before there are any: a token for four bytes of text, and of a dataset what is asked for."""
    if rows is not None:
        return TOKEN_BYTES * rows.context * (rows.n_train + rows.n_held_out)
    most = config.text.max_tokens
    if config.text.files:
        paths = {path for pattern in config.text.files for path in glob.iglob(pattern, recursive=True)}
        found = sum(os.path.getsize(path) for path in paths if os.path.isfile(path)) * TOKEN_BYTES // 4
        return found if most is None else min(found, TOKEN_BYTES * most)
    return TOKEN_BYTES * (config.suite.tokens if most is None else most)


@dataclass(frozen=True)
class _Budget:
    """The needs of a run and of those that would be smaller, against what the machine has."""

    config: SuiteConfig
    specs: tuple[SAESpec, ...]
    model: ModelSizes
    machine: Machine
    text_bytes: int

    def needs(self, ring: str) -> Needs:
        threads = self.machine.threads
        parts = (self.config, self.specs, self.model)
        return needs(*parts, device=self.machine.device, ring=ring, threads=threads, text_bytes=self.text_bytes)

    def limit(self, where: str) -> int | None:
        found = {DEVICE: self.machine.device_bytes, HOST: self.machine.host_bytes, DISK: self.machine.disk_bytes}[where]
        return None if found is None else int(USABLE * found)

    def fits(self, where: str, ring: str) -> bool:
        limit = self.limit(where)
        return limit is None or self._most_held(where, ring) <= limit

    def _most_held(self, where: str, ring: str) -> int:
        """In training, or when the SAEs are judged afterwards."""
        held = self.needs(ring)
        judging = held.evaluation if where == (DEVICE if self.machine.device.type == "cuda" else HOST) else 0
        return max(held.total(where), judging)

    def ring(self) -> str:
        """Where it will be. ``auto`` is the device if it fits there, else the host."""
        if self.machine.device.type != "cuda":
            return HOST
        asked = self.config.activations.ring
        if asked != "auto":
            return DEVICE if asked == "device" else HOST
        return DEVICE if self.fits(DEVICE, DEVICE) else HOST

    def problems(self, ring: str) -> Iterator[str]:
        places = {
            DEVICE: str(self.machine.device),
            HOST: "memory of the host",
            DISK: f"the disk of {self.config.run.out}",
        }
        for where, place in places.items():
            if self.fits(where, ring):
                continue
            held, limit = self.needs(ring), cast(int, self.limit(where))
            got = f"{_bytes(self._most_held(where, ring))}"
            if held.total(where) > limit:
                items = sorted(held.at(where), key=lambda item: -item.nbytes)
                got += " = " + " + ".join(f"{_bytes(item.nbytes)} {item.what}" for item in items)
            else:
                got += " when the SAEs are judged, most of it logits of the model"
            yield f"{place}: expected at most {_bytes(limit)}, {USABLE:.0%} of what is free, got {got}"

    def alternatives(self, ring: str) -> Iterator[str]:
        """Changes of one setting each, after which everything fits."""
        context = self.config.text.context
        if ring == DEVICE and self._all_fit(HOST):
            yield 'activations.ring = "host"'
        for rows in _halves(self.config.rows_per_block):
            if rows * (context - 1) < self.config.suite.batch_size:
                break
            if self._with(activations={"ring_tokens": rows * context})._all_fit(ring):
                yield f"activations.ring_tokens = {rows * context}"
                break
        for rows in _halves(self.config.activations.forward_rows):
            if self._with(activations={"forward_rows": rows})._all_fit(ring):
                yield f"activations.forward_rows = {rows}"
                break
        for d_sae in _halves(max(spec.config.d_sae for spec in self.specs)):
            smaller = self._narrowed(d_sae)
            if smaller is None or smaller._all_fit(ring):
                if smaller is not None:
                    yield f"d_sae of at most {d_sae}"
                break
        if count := self._most(ring):
            yield f"the first {count:,} of {len(self.specs):,} SAEs, at {_sites(self.specs[:count])}"

    def _all_fit(self, ring: str) -> bool:
        return all(self.fits(where, ring) for where in (DEVICE, HOST, DISK))

    def _with(self, activations: Mapping[str, Any]) -> "_Budget":
        changed = dataclasses.replace(self.config.activations, **activations)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, activations=changed))

    def _narrowed(self, d_sae: int) -> "_Budget | None":
        """With no SAE wider than that; None where one could not reach its target L0, or its k."""
        specs = []
        for spec in self.specs:
            aim = spec.config.loss.target_l0 or spec.config.k
            if aim is not None and aim > d_sae:
                return None
            specs.append(dataclasses.replace(spec, config=narrowed(spec.config, min(d_sae, spec.config.d_sae))))
        return dataclasses.replace(self, specs=tuple(specs))

    def _most(self, ring: str) -> int:
        """How many of the SAEs, from the first on, would fit."""

        def fit(count: int) -> bool:
            return dataclasses.replace(self, specs=self.specs[:count])._all_fit(ring)

        low, high = 0, len(self.specs) - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fit(middle) else (low, middle - 1)
        return low


def _halves(number: int) -> Iterator[int]:
    while (number := number // 2) >= 1:
        yield number


# ---- for people


def _memory(plan: Plan, where: str) -> list[str]:
    machine = plan.machine
    on_cpu = machine.device.type != "cuda"
    heading, free = {
        DEVICE: (f"memory of {machine.device} ({machine.device_name})", machine.device_bytes),
        HOST: ("memory of the host" + (f" ({machine.device_name})" if on_cpu else ""), machine.host_bytes),
        DISK: ("disk", machine.disk_bytes),
    }[where]
    rows = [(item.what, _bytes(item.nbytes)) for item in plan.needs.at(where)]
    of = "" if free is None else f" of {_bytes(free)} free"
    return [heading, *_aligned([*rows, ("total", _bytes(plan.needs.total(where)) + of)], indent="  ")]


# Vectors of a number for each latent: biases, thresholds and, of gated SAEs, the scales of the magnitudes.
VECTORS = {"jumprelu": 2, "gated": 3}


def _parameters(spec: SAESpec, model: ModelSizes) -> int:
    d_in, d_sae = model.width(spec.site), spec.config.d_sae
    d_out = model.width(spec.target or spec.site)
    of_latents = (d_in + d_out + VECTORS.get(spec.config.kind, 1)) * d_sae
    return of_latents + d_out + spec.config.skip * d_in * d_out


def _aims(specs: Sequence[SAESpec]) -> str:
    """By kind: ``L0 20, 80; gated λ 0.1; topk k 20``."""
    found: dict[tuple[str, str], set[float]] = {}
    for spec in specs:
        config, loss = spec.config, spec.config.loss
        name, aim = ("k", config.k) if config.k is not None else ("L0", loss.target_l0)
        name, aim = (name, aim) if aim is not None else ("λ", loss.l0_coefficient)
        found.setdefault((config.kind, name), set()).add(aim)
    parts = []
    for kind, name in sorted(found, key=lambda each: (KINDS.index(each[0]), each[1])):
        aims = ", ".join(f"{aim:g}" for aim in sorted(found[kind, name]))
        parts.append(f"{name} {aims}" if kind == "jumprelu" else f"{kind} {name} {aims}")
    return "; ".join(parts)


def _aligned(rows: Sequence[tuple[str, str]], indent: str = "") -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"{indent}{name:<{width}}  {value}".rstrip() for name, value in rows]


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns of figures to the right, the last two to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    sides = [*">" * (len(widths) - 2), "<", "<"]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]


def _bytes(number: int) -> str:
    if number < GIB // 10:
        return f"{number / 2**20:.1f} MiB"
    size = number / GIB
    return f"{size:,.{2 if size < 100 else 1 if size < 1000 else 0}f} GiB"


def _sites(specs: Sequence[SAESpec]) -> str:
    """How many sites they are at."""
    n = len({spec.site for spec in specs})
    return f"{n:,} site{'' if n == 1 else 's'}"


def _count(number: float) -> str:
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}" if number < 1000 * size else f"{number / size:,.0f}{suffix}"
    return str(number)


def _duration(seconds: float) -> str:
    for size, unit in ((86400 * 2, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / (86400 if unit == 'days' else size):.1f} {unit}"
    return f"{seconds:.3g} s"
