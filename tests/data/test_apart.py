"""Documents that share a row count in losses and metrics as they would in rows of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from layerpeel.config.distill import DistillConfig, LossConfig, Packing
from layerpeel.config.fields import TextConfig
from layerpeel.data.rows import Rows
from layerpeel.importance.base import ScoringInputs
from layerpeel.importance.metrics import make_metric
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.losses.loss_sum import LossSum
from layerpeel.training.forward import next_tokens, run_both
from layerpeel.training.rounds import distill
from layerpeel.training.student import Student
from tests.families import tiny_ids, tiny_model, tiny_tokenizer

LENGTHS = [[3, 9, 6], [14, 2], [1, 1, 13]]


def packed_rows() -> Rows:
    documents = iter(tiny_ids(8, 18).int())
    return Rows.of([[next(documents)[:length] for length in row] for row in LENGTHS], 18, 0)


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt2"])
def test_losses_and_gradients(family: str) -> None:
    student = Student(tiny_model(family))
    student.remove([3])
    student.add_trained(name for name in student.parameters() if student.layer_of(name) in (2, 4))
    layer = student.layer(4).requires_grad_(True)
    losses = LossSum({name: LossConfig() for name in ("kl", "hidden_mse", "cross_entropy")})
    results = []
    for rows in (packed_rows(), packed_rows().unpacked()):
        batch = rows.take(torch.arange(len(rows)))
        batch["labels"] = next_tokens(batch)
        tokens, labels = int(rows.mask.sum()), int((batch["labels"] >= 0).sum())
        loss, _ = losses(run_both(student, batch, [4], step_tokens=tokens, step_labels=labels))
        results.append((loss, torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(layer.parameters()))])))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["teacher_kl", "block_influence"])
def test_metrics(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(rows: Rows) -> list[float]:
        layerwise = LayerwiseModel(tiny_model("qwen2"))
        result = make_metric(name).score(ScoringInputs(layerwise, layerwise, tiny_tokenizer(), [1, 3, 4], rows))
        return list(result.importance.values())

    apart = score(packed_rows().unpacked())
    assert score(packed_rows()) == pytest.approx(apart, rel=1e-4)
    assert score(Rows(packed_rows().input_ids, packed_rows().mask)) != pytest.approx(apart, rel=1e-2)  # as if joined
    monkeypatch.setattr(LayerwiseModel, "runs_packed", False)  # as in a recurrent model
    assert score(packed_rows()) == pytest.approx(apart, rel=1e-4)


def test_a_model_that_cannot_is_trained_on_one_document_a_row(
    make_source: Callable[..., TextConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def curve(packing: Packing) -> list[dict[str, float]]:
        config = DistillConfig(
            text=[make_source(["w5 w9 w7", "w8 w3", "w4"] * 9)],
            tokens_per_round=100,
            tokens_per_step=24,
            sequence_length=12,
            packing=packing,
        )
        _, result = distill(tiny_model("llama"), tiny_tokenizer(), [2], config)
        return [{name: point[name] for name in ("loss", "tokens")} for point in result.curve]

    packed, unpacked, wrapped = curve("bfd"), curve("none"), curve("wrapped")
    assert packed != unpacked
    assert "cannot keep" not in capsys.readouterr().err
    monkeypatch.setattr(LayerwiseModel, "runs_packed", False)
    assert curve("wrapped") == wrapped  # documents of a row need not be kept apart
    assert "cannot keep" not in capsys.readouterr().err
    assert curve("bfd") == unpacked
    assert "distill.packing: this model cannot keep documents of a row apart; one document a row, padded" in " ".join(
        capsys.readouterr().err.split()
    )
