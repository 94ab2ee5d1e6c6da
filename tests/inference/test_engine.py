"""Requests answered for all candidates at once: what each shorter model would answer alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from layerpeel.inference.engine import Engine
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.requests import Generation, LogLikelihood, Request
from layerpeel.model.surgery import remove_layers
from tests.families import tiny_model, tiny_tokenizer


def answer_requests(
    layerwise: LayerwiseModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    candidates: Sequence[int] = (),
) -> list[list[Any]]:
    return Engine(layerwise, tokenizer, candidates).answer(requests)


def test_log_likelihoods_are_those_of_each_model_alone() -> None:
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    requests = [
        LogLikelihood((1,), (5, 6, 7)),
        LogLikelihood((9, 8, 7, 6), (5,)),
        LogLikelihood((3, 4), (4, 3)),
    ]
    answers = answer_requests(LayerwiseModel(model), tokenizer, requests, [2, 4])
    for branch, removed in zip(answers, ([], [2], [4]), strict=True):
        alone = remove_layers(tiny_model("qwen2"), removed)
        for request, answer in zip(requests, branch, strict=True):
            ids = torch.tensor([request.context + request.continuation])
            with torch.no_grad():
                logs = alone(ids).logits[0].double().log_softmax(-1)
            start = len(request.context) - 1
            expected = sum(logs[start + k, token].item() for k, token in enumerate(request.continuation))
            assert answer.log_probability == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox"])
def test_generation_for_all_candidates_is_that_of_each_model_alone(family: str) -> None:
    tokenizer = tiny_tokenizer()
    prompts = [(3, 4, 5), (9,), (8, 7, 6, 5, 4)]
    requests = [Generation(prompt, 6, ("w20",)) for prompt in prompts]
    answers = answer_requests(LayerwiseModel(tiny_model(family)), tokenizer, requests, [1, 2, 4])
    for branch, removed in zip(answers, ([], [1], [2], [4]), strict=True):
        alone = remove_layers(tiny_model(family), removed)
        for prompt, answer in zip(prompts, branch, strict=True):
            ids = torch.tensor([prompt])
            for _ in range(6):  # no cache, no generate
                with torch.no_grad():
                    ids = torch.cat([ids, alone(ids).logits[:, -1:].argmax(-1)], dim=1)
            new = ids[0, len(prompt) :].tolist()
            new = new[: new.index(2)] if 2 in new else new
            assert answer == tokenizer.decode(new, skip_special_tokens=True).split("w20")[0]


def test_a_context_too_long_loses_its_beginning() -> None:
    layerwise, tokenizer = LayerwiseModel(tiny_model("llama")), tiny_tokenizer()  # 64 positions
    context = tuple(3 + index % 60 for index in range(90))
    long, short = LogLikelihood(context, (7, 8)), LogLikelihood(context[-63:], (7, 8))
    (answers,) = answer_requests(layerwise, tokenizer, [long, short])
    assert answers[0].log_probability == pytest.approx(answers[1].log_probability, abs=1e-6)


def test_requests_of_both_kinds_come_back_in_their_order() -> None:
    layerwise, tokenizer = LayerwiseModel(tiny_model("llama")), tiny_tokenizer()
    requests = [Generation((3,), 3, ()), LogLikelihood((3,), (4,)), Generation((5, 6), 3, ())]
    (answers,) = answer_requests(layerwise, tokenizer, requests)
    alone = [answer_requests(layerwise, tokenizer, [request])[0][0] for request in requests]
    assert answers[0] == alone[0] and answers[2] == alone[2]
    assert answers[1].log_probability == pytest.approx(alone[1].log_probability, abs=1e-5)


def test_an_engine_may_answer_alone_among_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    layerwise, tokenizer = LayerwiseModel(tiny_model("llama")), tiny_tokenizer()
    requests = [Generation((3,), 3, ()), LogLikelihood((3,), (4,)), LogLikelihood((5, 6), (4,))]
    (expected,) = answer_requests(layerwise, tokenizer, requests)

    def processes_of(device: torch.device) -> Any:
        raise AssertionError("it asked for other processes")

    monkeypatch.setattr("layerpeel.inference.engine.processes_of", processes_of)
    assert Engine(layerwise, tokenizer, share_work=False).answer(requests) == [expected]
