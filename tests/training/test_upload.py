"""Activations from the host: what a GPU is asked for is pinned, and its copy is awaited by the right stream."""

from contextlib import contextmanager

import pytest
import torch

from gemmascope.training import trainer as trainer_module
from gemmascope.training import upload
from gemmascope.training.config import TrainConfig
from gemmascope.training.trainer import SAETrainer
from tests.helpers import normal


class OnSecondDevice(torch.Tensor):
    """A tensor that says it is on a second GPU."""

    is_cuda = True
    device = torch.device("cuda:1")

    def record_stream(self, stream):
        CALLS.append(("keeps its memory until the end of", stream.name))


class Pinned(torch.Tensor):
    def to(self, device, non_blocking=False):
        assert non_blocking
        CALLS.append(("copied to", device, "on", CURRENT[-1]))
        return self.as_subclass(torch.Tensor).clone().as_subclass(OnSecondDevice)


class Stream:
    def __init__(self, name):
        self.name = name

    def wait_stream(self, other):
        CALLS.append((self.name, "waits for", other.name))


CALLS, CURRENT = [], ["that of the steps"]


@pytest.fixture
def second_gpu(monkeypatch):
    CALLS.clear()
    empty = torch.empty

    @contextmanager
    def stream(entered):
        CURRENT.append(entered.name)
        yield
        CURRENT.pop()

    @contextmanager
    def current_device(device):
        assert device == torch.device("cuda:1")
        yield

    def pinned(*shape, pin_memory=False, **named):
        found = empty(*shape, **named)
        return found.as_subclass(Pinned) if pin_memory else found

    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(f"that of copies to {device}"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "device", current_device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("that of the steps"))
    upload._copies.cache_clear()
    yield normal(1).as_subclass(OnSecondDevice)
    upload._copies.cache_clear()


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_no_copy_from_pageable_memory(second_gpu, layout):
    x = normal(6, 4) if layout == "rows" else normal(4, 6).T
    before = x.clone()
    there = upload.uploaded(x, second_gpu)
    expected = [
        ("copied to", torch.device("cuda:1"), "on", "that of copies to cuda:1"),
        ("that of the steps", "waits for", "that of copies to cuda:1"),
        ("keeps its memory until the end of", "that of the steps"),
    ]
    assert expected == CALLS
    x.zero_()
    assert torch.equal(there.as_subclass(torch.Tensor), before)


def test_what_is_there_stays(second_gpu):
    x, there = normal(6, 4), normal(6, 4).as_subclass(OnSecondDevice)
    assert upload.uploaded(there, second_gpu) is there
    assert upload.uploaded(x, x) is x
    assert not CALLS


def test_every_update_goes_that_way(monkeypatch):
    given, rows = [], normal(64, 8)

    def uploaded(x, like):
        given.append((x.data_ptr(), like is trainer.state.b_dec_v))
        return x

    trainer = SAETrainer(TrainConfig.short(d_sae=16), rows)
    monkeypatch.setattr(trainer_module, "uploaded", uploaded)
    trainer.update(rows)
    assert given == [(rows.data_ptr(), True)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_caller_may_change_what_was_given(dtype):
    """Many batches in one buffer train as many of their own do."""
    rows, weights = normal(64 * 20, 256).to(dtype), []
    for where in ("cpu", "cuda"):
        trainer = SAETrainer(TrainConfig.short(d_sae=512, steps=20), rows, device="cuda")
        buffer = torch.empty(64, 256, dtype=dtype)
        for batch in rows.split(64):
            trainer.update(buffer.copy_(batch) if where == "cpu" else batch.to("cuda"))
        trainer.flush()
        weights.append(trainer.sae.W_dec.detach().cpu())
    assert torch.equal(*weights)
