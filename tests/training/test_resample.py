"""Dead latents that begin anew: where, at what length, the others to the bit, and with the same bits after a resume."""

import copy

import pytest
import torch

from gemmascope.saes import GatedSAE, JumpReLUSAE
from gemmascope.training import SAETrainer, TrainConfig
from gemmascope.training import state as state_module
from gemmascope.training.memory import SuiteMemory
from gemmascope.training.resample import ENCODER_NORM, observe, resample, seed_of
from gemmascope.training.state import TrainState


def rows(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator) * torch.arange(1, 7) + 1


def state_of(cls, compute_dtype="fp32"):
    sae = cls(6, 9, generator=torch.Generator().manual_seed(1), input_scale=2.0)
    state = TrainState.start(sae, compute_dtype, resampled=True)
    with torch.no_grad():
        for name, tensor in state.tensors().items():
            if tensor.is_floating_point() and name not in ("no_threshold", "seen", "seen_keys"):
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(2)))
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        if isinstance(sae, JumpReLUSAE):
            sae.threshold.zero_()
    state.tokens_since_fired.fill_(100)
    return state


DEAD = torch.tensor([False, True, False, True, True, False, True, False, False])


@pytest.mark.parametrize("cls", [JumpReLUSAE, GatedSAE])
def test_dead_latents_are_put_on_tokens_and_the_others_stay(cls):
    state, x = state_of(cls), rows(40) / 2
    before, sae = copy.deepcopy(state).tensors(), state.sae
    alive = sae.W_enc.data[:, ~DEAD].norm(dim=0).mean()
    for number, part in enumerate(x.split(15)):
        observe(state, part, number)
    assert state.seen is not None
    assert state.seen.shape == (9, 6)  # no more than there are latents
    assert resample(state, DEAD) == 4
    centred = torch.nn.functional.normalize(x - sae.b_dec.detach(), dim=1)
    for j in torch.nonzero(DEAD)[:, 0]:
        assert ((centred - sae.W_dec[j]).norm(dim=1) < 1e-6).sum() == 1
        torch.testing.assert_close(sae.W_enc[:, j], ENCODER_NORM * alive * sae.W_dec[j])
    for name, tensor in state.tensors().items():
        if name in ("seen", "seen_keys"):
            continue
        if tensor.ndim and len(tensor) == 9:
            assert torch.equal(tensor[~DEAD], before[name][~DEAD]), name
            if name not in ("W_enc", "W_dec", "last"):
                assert not tensor[DEAD].any(), name
        else:
            assert torch.equal(tensor, before[name]), name


def silent(d, d_sae):
    """An SAE that makes 0 of everything."""
    sae = GatedSAE(d, d_sae, pre_encoder_bias=False)
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    return sae


def test_tokens_are_drawn_by_the_square_of_their_loss():
    """Of tokens whose errors are 1, 2 and 0 the second is 16 times as often the first to be drawn, over batches."""
    first, draws = 0, 3000
    state = TrainState.start(silent(2, 1), resampled=True)
    for seed in range(draws):
        with torch.no_grad():
            state.sae.b_enc.fill_(-1e3)
        observe(state, torch.tensor([[0.0, 2.0]]), 2 * seed)
        observe(state, torch.tensor([[0.0, 0.0], [1.0, 0.0]]), 2 * seed + 1)
        assert resample(state, torch.tensor([True])) == 1
        first += int(state.sae.W_dec[0, 0] == 1)
        assert torch.equal(state.sae.W_enc.T, ENCODER_NORM * state.sae.W_dec)  # none is alive
    expected = draws / 17
    assert abs(first - expected) < 4 * expected**0.5


def test_no_two_latents_begin_at_one_token():
    state, x = TrainState.start(silent(6, 50), resampled=True), rows(30)
    observe(state, x[:20], 0)
    observe(state, x[20:], 1)
    before = state.sae.W_dec.detach().clone()
    assert resample(state, torch.ones(50, dtype=torch.bool)) == 30
    begun_at = state.sae.W_dec.detach() @ torch.nn.functional.normalize(x, dim=1).T > 1 - 1e-6
    assert begun_at.sum(0).tolist() == [1] * 30
    assert torch.equal(state.sae.W_dec[30:], before[30:])  # there was no token for them
    assert resample(state, torch.ones(50, dtype=torch.bool)) == 0  # and they were used up


def test_the_sample_is_bounded_whatever_is_seen(monkeypatch):
    """And the best of all: what one observation would keep, several do."""
    monkeypatch.setattr(state_module, "RESERVOIR", 16)
    state = TrainState.start(silent(6, 50), resampled=True)
    batches = [rows(40, seed) for seed in range(5)]
    keys, tokens = [], torch.cat(batches)
    for seed, x in enumerate(batches):
        observe(state, x, seed)
        drawn = torch.rand(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        keys.append((1 - drawn).log() / x.double().square().sum(1).square())
    order = torch.cat(keys).argsort(descending=True)[:16]
    assert state.seen is not None
    assert state.seen_keys is not None
    assert torch.equal(state.seen, tokens[order])
    torch.testing.assert_close(state.seen_keys, torch.cat(keys)[order])


@pytest.mark.parametrize("what", ["none dead", "nan", "no error", "nothing seen"])
def test_where_the_errors_say_nothing_no_bit_changes(what):
    state, x, dead = state_of(GatedSAE), rows(40) / 2, DEAD
    if what == "none dead":
        dead = torch.zeros_like(DEAD)
    elif what == "nan":
        x[:, 3] = torch.nan
    elif what == "no error":
        with torch.no_grad():
            state.sae.b_enc.fill_(-1e6)
        x = state.sae.b_dec.detach().expand(4, 6).clone()
    before = copy.deepcopy(state).tensors()
    if what != "nothing seen":
        observe(state, x, 5)
    assert resample(state, dead) == 0
    for name, tensor in state.tensors().items():
        assert name == "seen" or torch.equal(tensor, before[name]), name


def test_a_token_without_a_finite_error_is_left_out():
    state, x = TrainState.start(silent(6, 50), resampled=True), rows(4)
    x[1, 2], x[3] = torch.inf, 0
    observe(state, x, 0)
    assert state.seen is not None
    assert state.seen_keys is not None
    assert (state.seen_keys > -torch.inf).sum() == 2
    assert state.seen[:2].isfinite().all()


def test_seeds_of_steps_differ_and_fit():
    assert len({seed_of(2**63 - 1, step) for step in range(1000)}) == 1000
    assert max(seed_of(2**63 - 1, step) for step in range(1000)) < 2**63


def recipe(kind, **changes):
    options = {"d_sae": 24, "steps": 60, "dead_after_tokens": 40, "batch_size": 16, "resample_tokens": 100}
    return TrainConfig.short(kind=kind, resample_steps=[12, 30], **options | changes)


def begun(config):
    """With three latents that never fire."""
    trainer = SAETrainer(config, rows(64))
    with torch.no_grad():
        trainer.sae.b_enc[:3] = -100
    return trainer


def bits(trainer):
    return {name: tensor.clone() for name, tensor in trainer.snapshot()[0].items()}


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["relu", "gated"])
def test_a_training_resamples_and_resumes_with_the_same_bits(kind, compute_dtype):
    config = recipe(kind, compute_dtype=compute_dtype)
    straight, plain, before, after = (
        begun(each) for each in (config, config.changed(resample_steps=()), config, config)
    )
    dead = []
    for seed in range(20):
        dead.append((straight.state.tokens_since_fired >= 40).sum().item())
        for each in (straight, plain):
            each.update(rows(16, seed))
        if seed < 10:
            before.update(rows(16, seed))
    assert dead[12] >= 3
    assert dead[13] == 0
    kept = bits(before)
    assert (kept["seen_keys"] > -torch.inf).sum() == 24  # of four of the seven batches, 6 to 12
    after.restore(kept, before.snapshot()[1])
    for seed in range(10, 20):
        after.update(rows(16, seed))
    ours, other = bits(straight), bits(after)
    for name, tensor in ours.items():
        assert torch.equal(tensor, other[name]), name
    assert not torch.equal(ours["W_dec"], bits(plain)["W_dec"])
    assert straight.report()["skipped"] == 0
    if compute_dtype == "bf16":
        assert torch.equal(ours["W_dec_low"], ours["W_dec"].bfloat16())


def test_which_batches_are_drawn_from():
    assert [step for step in range(60) if recipe("gated").observes(step)] == [*range(6, 13), *range(24, 31)]
    everything = recipe("gated", resample_tokens=10**6)
    assert [step for step in range(60) if everything.observes(step)] == list(range(31))
    assert not any(recipe("gated").changed(resample_steps=()).observes(step) for step in range(60))


def test_the_tokens_kept_are_counted():
    for d_sae in (24, 3 * state_module.RESERVOIR):
        trainer = SAETrainer(recipe("gated", d_sae=d_sae), rows(64))
        assert trainer.state.seen is not None
        memory = SAETrainer.memory(trainer.config, 6)
        assert memory.kept_tokens == trainer.state.seen.nbytes
        assert SuiteMemory.of([memory], 1).lasting == memory.weights + memory.second_moments + memory.kept_tokens
        plain = SAETrainer.memory(trainer.config.changed(resample_steps=()), 6)
        assert memory.total - plain.total == memory.kept_tokens


def test_the_learning_rate_warms_up_again():
    config, plain = recipe("gated", lr_decay_steps=0, lr_warmup_steps=10), recipe("gated", lr_decay_steps=0)
    rates = [config.learning_rate_at(step) for step in range(60)]
    assert rates[12:22] == rates[30:40] == rates[:10]
    assert rates[10:12] == rates[22:24] == [plain.learning_rate] * 2
    assert rates[0] == pytest.approx(0.1 * config.learning_rate)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample_steps": (3, 3)}, r"resample_steps: expected numbers that ascend, got \[3, 3\]"),
        ({"resample_tokens": 0}, r"resample_tokens: expected "),
        ({"resample_steps": (60,)}, r"resample_steps\[0\]: expected "),
        ({"kind": "jumprelu"}, r"resample_steps: expected none with kind='jumprelu', got \[12, 30\]"),
    ],
)
def test_messages(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe("gated").changed(
            **{"sparsity": "l1", **changes} if "kind" not in changes else {**changes, "sparsity": "l0"}
        )
