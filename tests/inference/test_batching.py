"""Who answers which requests: every one is somebody's, and all have as much to do."""

from __future__ import annotations

import pytest

from layerpeel.inference.batching import batches_of, longest_first, share_of, shared_beginnings
from layerpeel.inference.requests import Generation, LogLikelihood, Request, len_of

FEWSHOT = tuple(range(100, 140))
REQUESTS: list[Request] = [
    *(LogLikelihood((*FEWSHOT, index % 7), (5, 6, *range(index % 11))) for index in range(90)),
    *(Generation(tuple(range(3, 5 + index)), 20, ("\n",)) for index in range(25)),
    *(Generation((3, 4), 50 + index, ()) for index in range(6)),  # of six kinds
]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_each_request_is_answered_by_one_process_and_all_have_as_much_to_do(world: int) -> None:
    shares = [share_of(REQUESTS, rank, world) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(len(REQUESTS)))
    for group in (range(90), range(90, 115)):
        tokens = [sum(len_of(REQUESTS[index]) for index in share if index in group) for share in shares]
        assert max(tokens) - min(tokens) <= 2 * max(len_of(REQUESTS[index]) for index in group)
    lonely = [sum(index >= 115 for index in share) for share in shares]
    assert max(lonely) <= -(-6 // world)  # single requests of a kind go to different processes


def test_fewer_requests_than_processes() -> None:
    assert [share_of(REQUESTS[:2], rank, 4) for rank in range(4)].count([]) == 2
    assert share_of([], 0, 2) == []


def test_neighbours_share_their_beginnings() -> None:
    shares = [share_of(REQUESTS[:90], rank, 3) for rank in range(3)]
    contexts = [{REQUESTS[index].context for index in share} for share in shares]  # type: ignore[union-attr]
    assert sum(map(len, contexts)) <= 7 + 2  # of seven contexts, those at the two borders are read twice


@pytest.mark.parametrize("order", [longest_first, shared_beginnings])
def test_batches_are_of_one_kind_and_within_the_budget(order) -> None:
    batches = batches_of(REQUESTS, 200, order)
    assert sorted(index for batch in batches for index in batch) == list(range(len(REQUESTS)))
    for batch in batches:
        kinds = {(type(REQUESTS[i]), getattr(REQUESTS[i], "max_new_tokens", 0)) for i in batch}
        assert len(kinds) == 1
        assert len(batch) == 1 or len(batch) * max(len_of(REQUESTS[i]) for i in batch) <= 200
