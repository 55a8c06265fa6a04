"""Transcoders of which k latents fire: gradients against autograd, routes, the threshold that files hold."""

import pytest
import torch

from gemmascope import Transcoder
from gemmascope.evaluation import evaluate_transcoder
from gemmascope.kernels import Rule
from gemmascope.saes.scaled_transcoder import ScaledTranscoder
from gemmascope.saes.topk_transcoder import SkipTopKTranscoder, TopKTranscoder
from gemmascope.training import SAETrainer, TrainConfig, calibrate_threshold
from gemmascope.training.kinds import new_transcoder
from gemmascope.training.state import TrainState
from gemmascope.training.topk import topk_loss_and_gradients, topk_step
from tests.kernels.native import needs_native
from tests.training.test_step import DEVICE, needs_triton
from tests.training.test_topk import F, K, config_of, relative, sae_of, seldom
from tests.training.test_transcoder import pairs

D_IN, D_OUT, N = 7, 11, 12
KINDS = ("topk", "batchtopk", "matryoshka")
kinds = pytest.mark.parametrize("kind", KINDS)
skips = pytest.mark.parametrize("skip", [False, True])
RULE = Rule(2e-3, 0.99, 1e-8, True)


def make(config, dtype=torch.float64, impl="reference", d_in=D_IN, d_out=D_OUT):
    generator = torch.Generator().manual_seed(0)
    sae = new_transcoder(config, d_in, d_out, generator=generator, impl=impl)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "b_dec", *sae.OTHERS):
            parameter = getattr(sae, name)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        sae.b_enc[::5] = -0.4  # seldom among the largest
    sae = sae.to(dtype)
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    return sae


def loss_by_autograd(sae, x, y, config, dead):
    positive = torch.relu(x @ sae.W_enc + sae.b_enc)
    if config.kind == "topk":
        top = positive.topk(config.k, dim=1)
        f = torch.zeros_like(positive).scatter(1, top.indices, top.values)
    else:
        top = positive.flatten().topk(config.k * len(x))
        f = torch.zeros_like(positive.flatten()).scatter(0, top.indices, top.values).view_as(positive)
    loss = 0.0
    for m in config.prefixes or (config.d_sae,):
        y_hat = f[:, :m] @ sae.W_dec[:m] + sae.b_dec
        if config.skip:
            y_hat = y_hat + x @ sae.W_skip.T
        loss = loss + (y - y_hat).square().sum(1).mean()
    if dead is not None:
        e = (y - y_hat).detach()
        top = torch.where(dead, positive, 0).topk(min(config.aux_k, int(dead.sum())), dim=1)
        e_hat = torch.zeros_like(positive).scatter(1, top.indices, top.values) @ sae.W_dec
        loss = loss + config.aux_coefficient * (e - e_hat).square().sum() / (e - e.mean(0)).square().sum()
    return loss


@kinds
@skips
@pytest.mark.parametrize("with_aux", [False, True])
def test_gradients_are_those_of_autograd(kind, skip, with_aux):
    config = config_of(kind, skip=skip)
    sae, (x, y), dead = make(config), pairs(N), seldom() if with_aux else None
    assert isinstance(sae, SkipTopKTranscoder if skip else TopKTranscoder)
    loss = loss_by_autograd(sae, x, y, config, dead)
    loss.backward()
    out = topk_loss_and_gradients(sae, x, config, dead, y)
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-13, atol=0)
    ours = out.gradients._asdict() | dict(out.others)
    assert ("W_skip" in ours) == skip
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", *sae.OTHERS):
        theirs = getattr(sae, name).grad
        assert theirs.abs().max() > 0.01
        torch.testing.assert_close(ours[name], theirs, rtol=1e-12, atol=1e-14)
        if name != "b_dec":
            assert out.bound >= ours[name].abs().max()


def take(route, state, config, batches, dead):
    config, figures = config.changed(route=route), []
    for x, y in batches:
        rows = [t.to(state.b_dec_v) for t in (x, y)]
        dead = None if dead is None else dead.to(state.b_dec_v.device)
        figures.append(topk_step(state, rows[0], config, RULE, dead, rows[1]).packed)
    state.settle(0.99)
    return torch.stack(figures)


@kinds
@skips
@pytest.mark.parametrize("with_aux", [False, True])
@pytest.mark.parametrize("impl", ["reference", "pytorch"])
def test_fifty_sparse_steps_are_those_of_the_reference(kind, skip, with_aux, impl):
    config, dead = config_of(kind, skip=skip), seldom() if with_aux else None
    batches = [pairs(N, seed=seed) for seed in range(50)]
    states = [TrainState.start(make(config, impl=impl)) for _ in range(2)]
    figures = [
        take(route, state, config, batches, dead) for route, state in zip(("reference", "sparse"), states, strict=True)
    ]
    errors = relative(states[1], states[0].tensors())
    assert ("W_skip_v" in errors) == skip
    assert max(errors.values()) < 1e-11, errors
    torch.testing.assert_close(*figures, rtol=1e-10, atol=1e-13)
    assert states[1].updates == 50
    assert states[1].sae.threshold.max() == states[1].sae.threshold.min() > 0


@kinds
@pytest.mark.parametrize(
    ("impl", "compute_dtype"),
    [
        ("pytorch", "bf16"),
        pytest.param("cpu", "fp32", marks=needs_native),
        pytest.param("cpu", "bf16", marks=needs_native),
        pytest.param("triton", "fp32", marks=needs_triton),
    ],
)
def test_implementations_keep_to_the_error_of_plain_pytorch(kind, impl, compute_dtype):
    """Of five seeds' worst; two widths wherever they may be."""
    d_in, d_out = (6, 6) if impl == "triton" else (D_IN, D_OUT)
    config, dead, found = config_of(kind, skip=True), seldom(), []
    batches = [pairs(5, d_in, d_out, seed) for seed in range(3)]
    kept = (torch.float32, "reference", compute_dtype), (torch.float32, impl, compute_dtype)
    for dtype, by, low in ((torch.float64, "reference", "fp32"), *kept):
        sae = make(config, dtype, by, d_in, d_out).to(DEVICE if by == "triton" else "cpu")
        state = TrainState.start(sae, low)
        take("sparse", state, config, batches, dead)
        found.append(state)
    exact = {name: tensor.cpu() for name, tensor in found[0].tensors().items()}
    allowed, ours = (relative(state, exact) for state in found[1:])
    for name, error in ours.items():
        assert error <= 3 * allowed[name] + (2e-2 if compute_dtype == "bf16" else 1e-6), name


@kinds
@pytest.mark.parametrize("route", ["reference", "sparse"])
def test_an_sae_whose_target_is_x_is_an_sae_to_the_bit(kind, route):
    config, states = config_of(kind, route=route), []
    for _ in range(2):
        states.append(TrainState.start(sae_of(config, torch.float32, pre_encoder_bias=False)))
    for seed in range(4):
        x = pairs(N, seed=seed, dtype=torch.float32)[0]
        for state, target in zip(states, (None, x.clone()), strict=True):
            assert topk_step(state, x, config, RULE, seldom(), target).made == 1
    for (name, one), other in zip(states[0].tensors().items(), states[1].tensors().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("route", ["reference", "sparse"])
def test_the_threshold_follows_what_fires(route):
    """Of a token's own k: the mean over the tokens of the smallest, of those on which any fires."""
    for kind in KINDS[:2]:
        config, (x, y) = config_of(kind, route=route, aux_coefficient=0.0), pairs(N)
        state = TrainState.start(make(config))
        with torch.no_grad():
            z = x @ state.sae.W_enc + state.sae.b_enc
            if kind == "topk":
                state.sae.b_enc -= 0.35  # on some tokens fewer than k are positive
                z -= 0.35
        topk_step(state, x, config, RULE, None, y)
        if kind == "topk":
            kept = [row[row > 0].topk(min(K, int((row > 0).sum()))).values for row in z]
            assert {len(each) for each in kept} > {K}
            expected = torch.stack([each[-1] for each in kept if len(each)]).mean()
        else:
            expected = z.flatten().topk(K * N).values[-1]
        torch.testing.assert_close(state.sae.threshold.data, expected.detach().expand(F))


@kinds
@skips
def test_what_is_released_has_the_l0_that_was_trained(kind, skip, tmp_path):
    x, y = pairs(3000, dtype=torch.float32)
    prefixes = {"prefixes": (24, 96)} if kind == "matryoshka" else {}
    config = TrainConfig.short(kind=kind, k=6, d_sae=96, steps=300, batch_size=256, skip=skip, **prefixes)
    trainer = SAETrainer(config, x, target=y, metadata={"site": "a"})
    for number in range(config.steps):
        rows = torch.randint(2000, (256,), generator=torch.Generator().manual_seed(number))
        trainer.update(x[rows], y[rows])
    report = trainer.report()
    assert 5 < report["l0"] < 6.01  # of TopK fewer fire where fewer are positive
    assert evaluate_transcoder(trainer.sae.released(), x[2000:], y[2000:]).l0 == pytest.approx(6, rel=0.45)
    assert isinstance(trainer.sae, TopKTranscoder)
    calibration = calibrate_threshold(trainer.sae, lambda: [x[:1000], x[1000:2000]])
    assert calibration.l0_after == pytest.approx(6, abs=0.01)
    released = trainer.sae.released()
    assert type(released) is Transcoder
    found = evaluate_transcoder(released, x[2000:], y[2000:])
    assert found.l0 == pytest.approx(6, rel=0.1)
    assert found.fvu < (0.15 if kind != "matryoshka" else 0.25)
    assert (released.W_skip is not None) == skip
    released.save(tmp_path / "saved")
    assert torch.equal(Transcoder.load(tmp_path / "saved").threshold, released.threshold)
    with pytest.raises(ValueError, match=r"^batches: expected shape \[n, 7\] each, got \[3000, 11\]"):
        calibrate_threshold(trainer.sae, lambda: [y])
    with pytest.raises(TypeError, match=r"^sae: expected "):
        calibrate_threshold(ScaledTranscoder(7, 11, 4), lambda: [x])  # pyright: ignore[reportArgumentType]


@kinds
def test_a_snapshot_goes_on_with_the_same_bits(kind):
    x, y = pairs(400, dtype=torch.float32)
    config = config_of(kind, skip=True, dead_after_tokens=30)

    def take(trainer, first, last):
        for number in range(first, last):
            rows = torch.randint(400, (N,), generator=torch.Generator().manual_seed(number))
            trainer.update(x[rows], y[rows])

    whole, first, second = (SAETrainer(config, x, target=y) for _ in range(3))
    take(whole, 0, 12)
    take(first, 0, 5)
    tensors, facts = first.snapshot()
    second.restore({name: tensor.clone() for name, tensor in tensors.items()}, facts)
    take(second, 5, 12)
    assert {"W_skip", "threshold", "smallest_kept"} <= tensors.keys()
    for name, tensor in whole.state.tensors().items():
        assert torch.equal(second.state.tensors()[name], tensor), name


def test_k_goes_with_the_state():
    sae, other = (TopKTranscoder(3, 4, 9, k=k) for k in (2, 5))
    other.load_state_dict(sae.state_dict())
    assert (other.k, "k=2" in repr(other)) == (2, True)
    with pytest.raises(RuntimeError, match="k: expected 1 to d_sae = 9, got 10"):
        other.load_state_dict(sae.state_dict() | {"k": torch.tensor(10)})
    with pytest.raises(ValueError, match="k: expected "):
        TopKTranscoder(3, 4, 9, k=10)


def test_memory_counts_the_width_of_the_target():
    wide, narrow = (SAETrainer.memory(config_of("topk", aux_k=None), 16, d_out=d_out) for d_out in (64, 16))
    assert (wide.n_entries, narrow.n_entries) == (2 * 11 * (K + min(32, F)), 2 * 11 * (K + 8))
