"""Parts of a pipeline's time do not overlap, core calls and planning are told apart, and memory."""

from __future__ import annotations

import platform
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models as models
import torch
from torch import nn

import dit_sparse
from dit_sparse import stopwatch
from dit_sparse.stopwatch import CallTimer, PeakMemory, Stopwatch


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: self.now)

    def takes(self, seconds: float, then: Any = None) -> Any:
        def call(*_: Any, **__: Any) -> torch.Tensor:
            self.now += seconds
            return torch.zeros(()) if then is None else then()

        return call


class Part(nn.Module):
    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call

    def forward(self) -> Any:
        return self.call()


def test_parts_of_a_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two transformers are one part, as are two text encoders; what is nobody's is in no part."""
    clock = Clock(monkeypatch)

    class Autoencoder:
        encode, decode = clock.takes(1), clock.takes(2)

    vae = Autoencoder()
    parts = {
        "transformer": Part(clock.takes(10)),
        "transformer_2": Part(clock.takes(20)),
        "text_encoder": Part(clock.takes(3)),
        "text_encoder_2": Part(clock.takes(4)),
        "image_encoder": None,
        "tokenizer": object(),
    }
    pipe = SimpleNamespace(components={**parts, "vae": vae}, _execution_device=torch.device("cpu"))
    with Stopwatch(pipe) as watch:
        for name in ("text_encoder", "text_encoder_2", "transformer", "transformer_2", "transformer"):
            parts[name]()
        clock.now += 100
        pipe.components["vae"].decode()
    assert watch.seconds == {"text_encoder": 7, "transformer": 40, "vae_decode": 2}
    parts["transformer"]()
    vae.encode()
    assert watch.seconds == {"text_encoder": 7, "transformer": 40, "vae_decode": 2}
    assert vae.encode() is not None


def test_calls_of_a_real_model_are_timed_and_left_as_they_were() -> None:
    model, inputs = models.wan(), models.wan_inputs()
    with torch.no_grad():
        stock = model(**inputs)[0]
        with dit_sparse.apply(model, "draft", pool=(2, 2), schedule="always") as session:
            pipe = SimpleNamespace(_execution_device=torch.device("cpu"))
            sparse = model(**inputs)[0]
            with CallTimer(pipe, session) as timer:
                timed = model(**inputs)[0]
            assert torch.equal(timed, sparse)
            layers = sum(len(part.layers) for part in session.parts)
            assert len(timer.attention) == len(timer.choosing) == layers
            seconds = timer.seconds()
            assert 0 < seconds["planning"] < seconds["attention"]
            model(**inputs)
            assert len(timer.attention) == layers  # it has left
        assert torch.equal(model(**inputs)[0], stock)


def test_planning_within_planning_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pipe = SimpleNamespace(_execution_device=torch.device("cpu"))
    timer = CallTimer(pipe, SimpleNamespace(parts=[], watches=[]))  # type: ignore[arg-type]
    inner = clock.takes(1)
    timer.planning(clock.takes(2, then=lambda: timer.planning(inner)))  # a method around another
    timer.planning(inner)
    assert timer.seconds() == {"attention": 0, "planning": 4}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads Linux's /proc and trims glibc's heap")
def test_peak_memory_of_the_process() -> None:
    with PeakMemory("cpu") as memory:
        large = torch.ones(100 << 18)
        del large
    assert memory.before_mib is not None
    assert memory.peak_mib is not None
    assert memory.peak_mib - memory.before_mib == pytest.approx(100, abs=6)
    with PeakMemory("cpu") as memory:
        pass
    assert memory.peak_mib - memory.before_mib < 6  # the peak before it is not its own


def test_memory_that_cannot_be_known_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with PeakMemory("cpu") as memory:
        pass
    assert memory.peak_mib is None
    assert "known on Linux with glibc only" in memory.why
