"""Sampled text: drawn from the model's own distribution, by random numbers that nothing else has a part in."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import GenerationConfig

from layerpeel.inference.budget import Budget
from layerpeel.inference.degeneration import loops, signs_of
from layerpeel.inference.finite import NotFiniteError
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.sampling import Sampler, invert, nucleus, uniform_numbers
from tests.families import VOCABULARY, tiny_model, tiny_tokenizer
from tests.inference.test_engine import RECURRENT

BEGINNINGS = [(1,), (1, 9, 8), (5, 6, 7, 8, 9), (4,)] * 3
CACHED = ["llama", "gemma3", "gpt2", "gpt_neox", "qwen2"]


def sampler(family: str = "llama", length: int = 20, rows: int | None = None, **options: float) -> Sampler:
    """Of a tiny model; with a budget for so many rows of a batch."""
    layerwise = LayerwiseModel(tiny_model(family))
    budget = Budget(2**30, layerwise.device)
    if rows:
        budget.bytes = rows * length * (budget.bytes // budget.tokens(layerwise, 1))
    return Sampler(layerwise, tiny_tokenizer(), length, budget=budget, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", [*CACHED, *RECURRENT])
def test_near_temperature_zero_sampling_is_greedy(family: str) -> None:
    sampled = sampler(family, temperature=1e-4)
    model = sampled.layerwise.model
    for beginning, document in zip(BEGINNINGS, sampled.sample(BEGINNINGS, range(12)), strict=True):
        expected = list(beginning)
        while len(expected) < 20 and (expected[-1] != 2 or len(expected) == len(beginning)):
            with torch.no_grad():
                expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
        assert document == expected


@pytest.mark.parametrize("family", ["llama", "gemma3", "mamba2", "lfm2"])
def test_tokens_are_as_frequent_as_the_model_says(family: str) -> None:
    sampled = sampler(family, length=3)
    count = 4000
    documents = sampled.sample([(1,)] * count, range(count))
    with torch.no_grad():
        first = sampled.layerwise.model(torch.tensor([[1]])).logits[0, -1].double().softmax(-1)
    observed = torch.zeros(VOCABULARY).double()
    for document in documents:
        observed[document[1]] += 1
    chi_square = ((observed - count * first).square() / (count * first)).sum()
    assert chi_square < 63 + 4 * (2 * 63) ** 0.5  # of 63 degrees of freedom: mean, and four standard deviations
    before, _ = Counter(document[1] for document in documents if document[1] != 2).most_common(1)[0]
    seconds = [document[2] for document in documents if document[1] == before]
    with torch.no_grad():
        second = sampled.layerwise.model(torch.tensor([[1, before]])).logits[0, -1].double().softmax(-1)
    likely = int(second.argmax())
    error = (second[likely] * (1 - second[likely]) / len(seconds)).sqrt()
    assert abs(seconds.count(likely) / len(seconds) - second[likely]) < 4 * error


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mamba2"])
def test_text_does_not_depend_on_the_size_of_a_batch(family: str) -> None:
    together = sampler(family).sample(BEGINNINGS, range(12))
    assert len({*map(tuple, together)}) == 12 and all(len(document) <= 20 for document in together)
    for rows in (1, 3, 5):  # those of one row, and others that join while some are being written
        assert sampler(family, rows=rows).sample(BEGINNINGS, range(12)) == together
    assert sampler(family).sample(BEGINNINGS[7:9], [7, 8]) == together[7:9]


def test_documents_end_at_an_end_of_text_or_at_the_length() -> None:
    sampled = sampler(length=40)
    sampled.ends = (2, 17)
    documents = sampled.sample([(1,)] * 60, range(60))
    assert {document[-1] for document in documents if len(document) < 40} == {2, 17}
    assert not any({2, 17} & {*document[:-1]} for document in documents)
    assert any(len(document) == 40 and document[-1] not in (2, 17) for document in documents)


def test_a_longer_limit_only_goes_on_with_what_was_cut() -> None:
    short, long = (sampler(length=length).sample([(1,)] * 20, range(20)) for length in (10, 30))
    assert [document[:10] for document in long] == short


def test_nothing_of_the_generation_config_changes_the_text() -> None:
    plain, hostile = sampler(), sampler()
    hostile.layerwise.model.generation_config = GenerationConfig(
        repetition_penalty=9.0, suppress_tokens=[5, 6], temperature=0.1, top_k=1, num_beams=4, min_new_tokens=18
    )
    assert hostile.sample(BEGINNINGS, range(12)) == plain.sample(BEGINNINGS, range(12))


def test_a_nucleus_is_what_is_cut_by_hand() -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
    assert torch.equal(nucleus(probabilities, 0.6)[0], torch.tensor([0, 0.4, 0, 0.3]))
    assert torch.equal(nucleus(probabilities, 0.75)[0], torch.tensor([0, 0.4, 0.2, 0.3]))
    assert torch.equal(nucleus(probabilities, 0.3)[0], torch.tensor([0, 0.4, 0, 0]))
    assert int((nucleus(probabilities, 0.5)[1] > 0).sum()) == 2
    drawn = {
        token for document in sampler(top_p=0.3, length=3).sample([(1,)] * 200, range(200)) for token in document[1:2]
    }
    with torch.no_grad():
        first = sampler().layerwise.model(torch.tensor([[1]])).logits[0, -1].softmax(-1)
    most = first.sort(descending=True)
    kept = int((most.values.cumsum(0) - most.values < 0.3).sum())
    assert drawn <= {*most.indices[:kept].tolist()} and len(drawn) > kept / 2


def test_the_inverse_of_a_distribution_is_found_by_counting() -> None:
    generator = torch.Generator().manual_seed(3)
    probabilities = torch.rand(50, 1000, generator=generator).square()
    probabilities[:, ::3] = 0
    uniforms = torch.rand(50, generator=generator, dtype=torch.float64)
    uniforms[:3] = torch.tensor([0.0, 1 - 2**-53, 0.5])
    drawn = invert(probabilities, uniforms)
    for row, uniform, token in zip(probabilities.double().tolist(), uniforms.tolist(), drawn, strict=True):
        target, total = uniform * sum(row), 0.0
        expected = next(index for index, value in enumerate(row) if (total := total + value) > target or index == 999)
        assert abs(int(token) - expected) <= 1 and row[int(token)] > 0


def test_random_numbers_are_those_of_seed_and_document() -> None:
    numbers = uniform_numbers(7, 3, 100)
    assert list(uniform_numbers(7, 3, 40)) == list(numbers[:40])
    assert len({float(uniform_numbers(seed, document, 1)[0]) for seed in range(9) for document in range(99)}) == 891
    assert numbers.min() >= 0 and numbers.max() < 1


def test_numbers_that_are_not_finite_are_no_text() -> None:
    sampled = sampler()
    with torch.no_grad():
        sampled.layerwise.model.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(NotFiniteError):
        sampled.sample([(1,)], [0])


def test_memory_that_runs_out_halves_the_batch_and_changes_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, sampled = sampler().sample(BEGINNINGS, range(12)), sampler()
    generate, calls = sampled.layerwise.model.generate, []

    def scarce(input_ids: torch.Tensor, **options: object) -> object:
        calls.append(len(input_ids))
        if len(calls) == 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return generate(input_ids, **options)

    monkeypatch.setattr(sampled.layerwise.model, "generate", scarce)
    assert sampled.sample(BEGINNINGS, range(12)) == expected and sampled.budget.halved == 1


def test_signs_of_degenerate_text() -> None:
    loop, ended = [*range(10), *[3, 4] * 30], [*range(40), 2]
    assert loops(loop) and not loops(ended) and not loops([5] * 20)
    copied = [*range(40), *range(40)]  # said twice is no loop
    assert not loops(copied)
    signs = signs_of([loop, ended, ended, [2]], {2})
    assert (signs.looping, signs.ended, signs.empty) == (0.25, 0.75, 0.25)
    assert signs.alike == pytest.approx(2 / 3)
    assert signs_of([], {2}).ended == 0
