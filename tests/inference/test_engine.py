"""Requests answered for all candidates at once: what each shorter model would answer alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from layerpeel.inference.budget import Budget, bytes_of_token
from layerpeel.inference.decoding import Decoder
from layerpeel.inference.engine import Engine
from layerpeel.inference.finite import NotFiniteError
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.likelihoods import DEFAULT_WINDOW, window_length
from layerpeel.inference.requests import Generation, LogLikelihood, Request, fitted, is_cut
from layerpeel.model.config_check import unremovable_layers
from layerpeel.model.surgery import remove_layers
from tests.families import RECURRENT, tiny_model, tiny_tokenizer


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


# Of which layers keep a state in place of, or beside, all keys and values.
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox", *RECURRENT])
def test_generation_for_all_candidates_is_that_of_each_model_alone(family: str) -> None:
    tokenizer = tiny_tokenizer()
    prompts = [(3, 4, 5), (9,), (8, 7, 6, 5, 4)]
    requests = [Generation(prompt, 6, ("w20",)) for prompt in prompts]
    candidates = [layer for layer in (1, 2, 4) if layer not in unremovable_layers(tiny_model(family))]
    answers = answer_requests(LayerwiseModel(tiny_model(family)), tokenizer, requests, candidates)
    for branch, removed in zip(answers, ([], *([layer] for layer in candidates)), strict=True):
        alone = remove_layers(tiny_model(family), removed)
        for prompt, answer in zip(prompts, branch, strict=True):
            ids = torch.tensor([prompt])
            for _ in range(6):  # no cache, no generate
                with torch.no_grad():
                    logits = alone(ids, use_cache=False).logits
                ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
            new = ids[0, len(prompt) :].tolist()
            new = new[: new.index(2)] if 2 in new else new
            assert answer == tokenizer.decode(new, skip_special_tokens=True).split("w20")[0]


HOSTILE: dict[str, Any] = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "num_beams": 3,
    "do_sample": True,
    "temperature": 3.0,
    "min_new_tokens": 4,
    "suppress_tokens": list(range(3, 40)),
    "cache_implementation": "static",
    "num_return_sequences": 2,
    "forced_eos_token_id": 7,
}


@pytest.mark.parametrize("option", HOSTILE)
def test_greedy_is_greedy_whatever_the_models_generation_config_says(option: str) -> None:
    tokenizer, requests = tiny_tokenizer(), [Generation((3, 4, 5), 6, ()), Generation((9,), 6, ())]
    expected = answer_requests(LayerwiseModel(tiny_model("llama")), tokenizer, requests, [1, 4])
    model = tiny_model("llama")
    setattr(model.generation_config, option, HOSTILE[option])
    assert answer_requests(LayerwiseModel(model), tokenizer, requests, [1, 4]) == expected
    assert getattr(model.generation_config, option) == HOSTILE[option]


@pytest.mark.parametrize("ends", [17, [2, 17]])
def test_text_ends_where_the_generation_config_or_the_tokenizer_says(ends: Any) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    ((endless,),) = answer_requests(LayerwiseModel(model), tokenizer, [Generation((3, 4, 5), 8, ())])
    words = endless.split()
    third = tokenizer.convert_tokens_to_ids(words[2])
    assert words.index(words[2]) == 2
    model.generation_config.eos_token_id = third if ends == 17 else [2, third]
    ((text,),) = answer_requests(LayerwiseModel(model), tokenizer, [Generation((3, 4, 5), 8, ())])
    assert text.split() == words[:2]


def test_without_an_end_of_text_any_token_may_be_written() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    tokenizer.eos_token, model.generation_config.eos_token_id = None, None
    with torch.no_grad():
        model.lm_head.weight.zero_()  # so that token 0 is always the likeliest
    assert Decoder(LayerwiseModel(model), tokenizer, ("w5 w9",), 4).decode([(3, 4, 5)], [None]) == [[0] * 4]


def test_a_row_that_needs_more_room_than_there_is_cuts_no_other_prompt() -> None:
    layerwise, tokenizer = LayerwiseModel(tiny_model("llama")), tiny_tokenizer()  # 64 positions
    prompt = tuple(3 + index % 60 for index in range(40))
    request = Generation(prompt, 60, (), needed=10)
    assert fitted(request, 64) == Generation(prompt, 24, (), needed=10) and not is_cut(request, 64)
    long = Generation(prompt + prompt, 60, (), needed=10)
    assert fitted(long, 64) == Generation((prompt + prompt)[-54:], 10, (), needed=10) and is_cut(long, 64)
    (together,) = answer_requests(layerwise, tokenizer, [request, long])
    (alone,) = answer_requests(layerwise, tokenizer, [Generation(prompt, 24, ())])
    assert together[0] == alone[0]


@pytest.mark.parametrize(
    ("family", "changes", "length"),
    [("gemma3", {}, 64), ("gpt2", {}, 64), ("mamba", {}, DEFAULT_WINDOW), ("bloom", {"seq_length": 48}, 48)],
)
def test_the_context_is_that_of_the_language_model(family: str, changes: dict[str, int], length: int) -> None:
    assert window_length(LayerwiseModel(tiny_model(family, **changes))) == length


def test_a_vocabulary_of_a_few_tokens_is_run_layer_by_layer() -> None:
    model = tiny_model("llama", vocab_size=5, bos_token_id=1, eos_token_id=2)
    layerwise = LayerwiseModel(model)
    ids = torch.tensor([[1, 4, 3, 0]])
    with torch.no_grad():
        expected = model(ids).logits
    assert torch.allclose(layerwise.logits(layerwise.forward_with_skips(ids)[0][0]), expected[0], atol=1e-5)


@pytest.mark.parametrize("position", [None, 0, 3])
def test_numbers_that_are_not_finite_are_named(position: int | None) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        if position is None:
            model.get_input_embeddings().weight[7] = float("nan")
        else:
            model.model.layers[position].mlp.down_proj.weight[0, 0] = float("inf")
    layerwise, tokenizer = LayerwiseModel(model), tiny_tokenizer()
    place = "what enters layer 0" if position is None else f"the output of layer {position}"
    requests: list[Request] = [LogLikelihood((3,), (4,)), LogLikelihood((7, 3), (4,))]
    with pytest.raises(
        NotFiniteError, match=f"is nan; the model first gives NaN or infinity in {place}, in float32"
    ) as e:
        answer_requests(layerwise, tokenizer, requests)
    assert e.value.request in ((1,) if position is None else (0, 1))
    with pytest.raises(
        NotFiniteError,
        match=f"logits are NaN or infinite while the model .*; the model first gives NaN or infinity in {place}",
    ) as e:
        answer_requests(layerwise, tokenizer, [Generation((3,), 3, ()), Generation((7, 3), 3, ())])
    assert e.value.request is not None


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


def test_the_untouched_model_writes_for_as_many_as_fit_on_its_one_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, candidates = tiny_model("llama", eos_token_id=None), tiny_tokenizer(), (1, 2, 4)
    requests = [Generation((3 + index, 9, 4), 6, ("w7",)) for index in range(12)]
    expected = Engine(LayerwiseModel(model), tokenizer, candidates).answer(requests)
    calls: list[tuple[int, bool]] = []
    decode = Decoder.decode

    def counted(decoder: Decoder, prompts: Any, skipped: Any, *rest: Any) -> Any:
        calls.append((len(prompts), skipped[0] is None))
        return decode(decoder, prompts, skipped, *rest)

    monkeypatch.setattr(Decoder, "decode", counted)
    row = bytes_of_token(4, 32, 4) * 9  # 3 tokens and 6 new ones, on four branches
    engine = Engine(LayerwiseModel(model), tokenizer, candidates, budget=Budget(3 * row, torch.device("cpu")))
    assert engine.answer([*requests, requests[0]]) == [[*answers, answers[0]] for answers in expected]
    assert [count for count, untouched in calls if untouched] == [12]  # the last prompt is the first again
    assert max(count for count, untouched in calls if not untouched) <= 9


def test_a_prompt_that_fails_in_a_batch_to_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama", eos_token_id=None), tiny_tokenizer()
    with torch.no_grad():
        model.get_input_embeddings().weight[60] = torch.nan
    requests = [Generation((5 + index, 9, 60 if index == 4 else 4), 6, ()) for index in range(6)]
    budget = Budget(2 * bytes_of_token(2, 32, 4) * 9, torch.device("cpu"))
    with pytest.raises(NotFiniteError) as caught:
        Engine(LayerwiseModel(model), tokenizer, (2,), budget=budget).answer(requests)
    assert caught.value.request == 4
