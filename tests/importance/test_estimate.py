"""The announced seconds are those of the device's work, not of asking for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from layerpeel.importance import estimate
from layerpeel.inference.layerwise import LayerwiseModel
from tests.families import tiny_model


def test_a_layer_is_timed_until_the_device_has_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0, asked=0.0)
    layer = LayerwiseModel.layer

    def asked(*args, **kwargs):
        clock.asked += 512.0  # seconds of work for 512 tokens
        return layer(*args, **kwargs)

    def wait(device) -> None:
        clock.now, clock.asked = clock.now + clock.asked, 0.0

    monkeypatch.setattr(LayerwiseModel, "layer", asked)
    monkeypatch.setattr(estimate, "synchronize", wait)
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    per_layer, per_logit = estimate._seconds_per_token(LayerwiseModel(tiny_model("llama", max_position_embeddings=256)))
    assert (per_layer, per_logit) == (1.0, 0.0)


def test_a_model_of_a_short_context_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    per_layer, per_logit = estimate._seconds_per_token(LayerwiseModel(tiny_model("gpt2", n_positions=32)))
    assert per_layer > 0 and per_logit > 0
