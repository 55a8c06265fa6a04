"""Dead latents that begin anew: where, at what length, the others to the bit, and with the same bits after a resume."""

import copy

import pytest
import torch

from gemmascope.saes import GatedSAE, JumpReLUSAE
from gemmascope.training import SAETrainer, TrainConfig
from gemmascope.training.resample import ENCODER_NORM, resample, seed_of
from gemmascope.training.state import TrainState


def rows(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator) * torch.arange(1, 7) + 1


def state_of(cls, compute_dtype="fp32"):
    sae = cls(6, 9, generator=torch.Generator().manual_seed(1), input_scale=2.0)
    state = TrainState.start(sae, compute_dtype)
    with torch.no_grad():
        for name, tensor in state.tensors().items():
            if tensor.is_floating_point() and name != "no_threshold":
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
    assert resample(state, x, DEAD, 5) == 4
    centred = torch.nn.functional.normalize(x - sae.b_dec.detach(), dim=1)
    for j in torch.nonzero(DEAD)[:, 0]:
        assert ((centred - sae.W_dec[j]).norm(dim=1) < 1e-6).sum() == 1
        torch.testing.assert_close(sae.W_enc[:, j], ENCODER_NORM * alive * sae.W_dec[j])
    for name, tensor in state.tensors().items():
        if tensor.ndim and len(tensor) == 9:
            assert torch.equal(tensor[~DEAD], before[name][~DEAD]), name
            if name not in ("W_enc", "W_dec", "last"):
                assert not tensor[DEAD].any(), name
        else:
            assert torch.equal(tensor, before[name]), name


def test_tokens_are_drawn_by_the_square_of_their_loss():
    """Of three tokens whose errors are 1, 2 and 0 the second is drawn 16 times as often as the first."""
    sae = GatedSAE(2, 3400, pre_encoder_bias=False)
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    state = TrainState.start(sae)
    assert resample(state, x, torch.ones(3400, dtype=torch.bool), 0) == 3400
    first = (sae.W_dec == x[0]).all(1).sum().item()
    assert (sae.W_dec == x[1] / 2).all(1).sum() == 3400 - first
    assert abs(first - 200) < 4 * 200**0.5
    torch.testing.assert_close(sae.W_enc.T, ENCODER_NORM * sae.W_dec)  # none is alive


@pytest.mark.parametrize("what", ["none dead", "nan", "no error"])
def test_where_the_errors_say_nothing_no_bit_changes(what):
    state, x, dead = state_of(GatedSAE), rows(40) / 2, DEAD
    if what == "none dead":
        dead = torch.zeros_like(DEAD)
    elif what == "nan":
        x[3, 3] = torch.nan
    else:
        with torch.no_grad():
            state.sae.b_enc.fill_(-1e6)
        x = state.sae.b_dec.detach().expand(4, 6).clone()
    before = copy.deepcopy(state).tensors()
    assert resample(state, x, dead, 5) == 0
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, before[name]), name


def test_seeds_of_steps_differ_and_fit():
    assert len({seed_of(2**63 - 1, step) for step in range(1000)}) == 1000
    assert max(seed_of(2**63 - 1, step) for step in range(1000)) < 2**63


def recipe(kind, **changes):
    options = {"d_sae": 24, "steps": 60, "dead_after_tokens": 40}
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
        if seed < 12:
            before.update(rows(16, seed))
    assert dead[12] >= 3
    assert dead[13] == 0
    after.restore(bits(before), before.snapshot()[1])
    for seed in range(12, 20):
        after.update(rows(16, seed))
    ours, other = bits(straight), bits(after)
    for name, tensor in ours.items():
        assert torch.equal(tensor, other[name]), name
    assert not torch.equal(ours["W_dec"], bits(plain)["W_dec"])
    assert straight.report()["skipped"] == 0
    if compute_dtype == "bf16":
        assert torch.equal(ours["W_dec_low"], ours["W_dec"].bfloat16())


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
        ({"resample_steps": (60,)}, r"resample_steps\[0\]: expected "),
        ({"kind": "jumprelu"}, r"resample_steps: expected none with kind='jumprelu', got \[12, 30\]"),
    ],
)
def test_messages(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe("gated").changed(
            **{"sparsity": "l1", **changes} if "kind" not in changes else {**changes, "sparsity": "l0"}
        )
