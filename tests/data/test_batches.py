"""Rows of tokens, documents kept apart in them, and batches that resume and are shared out."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from layerpeel.config.distill import Packing
from layerpeel.config.fields import TextConfig
from layerpeel.data.batches import load_rows, micro_batches, step_rows
from layerpeel.data.rows import Rows, labels_within, positions_of
from layerpeel.data.tokenizing import encode_text, start_tokens
from layerpeel.errors import InputError
from layerpeel.processes.progress import print_once
from tests.families import tiny_tokenizer

MakeSource = Callable[..., TextConfig]


def read_back(rows: Rows) -> list[list[list[int]]]:
    """The documents of each row, by a reading of their numbers that shares no code with ours."""
    documents = []
    for ids, mask, document in zip(rows.input_ids.tolist(), rows.mask.tolist(), rows.document.tolist(), strict=True):
        real = [(number, token) for number, token, is_real in zip(document, ids, mask, strict=True) if is_real]
        assert mask == sorted(mask, reverse=True) and document == sorted(document)
        documents.append([[token for _, token in group] for _, group in groupby(real, key=lambda pair: pair[0])])
    return documents


def test_the_digest_of_rows_tells_tokens_padding_documents_and_order() -> None:
    def rows(*documents: list[list[int]], length: int = 3) -> Rows:
        return Rows.of([[torch.tensor(ids) for ids in row] for row in documents], length, padding=0)

    first = rows([[1], [2]], [[3, 4, 5]])
    assert first.digest() == rows([[1], [2]], [[3, 4, 5]]).digest()
    others = [
        rows([[1, 2]], [[3, 4, 5]]),  # documents joined
        rows([[3, 4, 5]], [[1], [2]]),
        rows([[1], [2, 0]], [[3, 4, 5]]),  # a real token in place of padding
        rows([[1], [2]], [[3, 4, 6]]),
        rows([[1], [2]], [[3, 4, 5]], length=4),
    ]
    assert len({each.digest() for each in (first, *others)}) == 6


def test_packed_rows_hold_whole_documents(make_source: MakeSource, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["hello", "a much longer document", "x", "ab", "end"]
    rows = load_rows([make_source(texts)], tokenizer, sequence_length=8)
    end = tokenizer.eos_token_id
    ids = [[*tokenizer.encode(text), end] for text in texts]
    assert rows.input_ids.shape == rows.mask.shape == rows.document.shape
    # hello leaves 2 of 8, of which x takes both; the long one is cut, and ab fills up what is left of it best.
    assert read_back(rows) == [[ids[0], ids[2]], [ids[1][:8]], [ids[1][8:16]], [ids[1][16:]], [ids[3], ids[4]]]
    assert rows.document[0].tolist() == [0] * 6 + [1] * 2
    assert rows.document[4].tolist() == [0] * 3 + [1] * 5  # padding goes with the last


def test_packing_loses_nothing_and_leaves_little_room(
    make_source: MakeSource, tokenizer: PreTrainedTokenizerFast
) -> None:
    lengths = random.Random(0)
    texts = ["".join(lengths.choices("abcdef", k=lengths.randint(1, 60))) for _ in range(3000)]
    rows = load_rows([make_source(texts)], tokenizer, sequence_length=64)
    documents = [document for row in read_back(rows) for document in row]
    assert sorted(documents) == sorted([*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts)
    assert rows.mask.float().mean() > 0.95


def test_the_first_rows_are_no_choice_of_long_documents(
    make_source: MakeSource, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = ["long" * 4 if i % 2 else "s" for i in range(2000)]
    rows = load_rows([make_source(texts)], tokenizer, sequence_length=17, max_tokens=17 * 50)
    counts = [len(document) for row in read_back(rows) for document in row]
    assert counts.count(17) == pytest.approx(counts.count(2), rel=0.2)


def beginning(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """The tokenizer, setting ! before (or ~ after) a text as the template says."""
    inner = copy.deepcopy(tokenizer.backend_tokenizer)
    special = [(token, inner.token_to_id(token)) for token in "!~"]
    inner.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="!", eos_token="<end>")


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("! $A", "a", "!a<end>"),
        ("! $A", "!a", "!a<end>"),  # rendered by a chat template: no second beginning
        ("! $A", "!a<end>", "!a<end>"),  # nor a second end
        ("! ~ $A", "a", "!~a<end>"),  # as GLM's [gMASK]<sop>
        ("! ~ $A", "!~a", "!~a<end>"),
        ("! $A ~", "a", "!a<end>"),
        ("$A", "!a", "!a<end>"),
        ("$A !", "a", "a<end>"),
    ],
)
def test_documents_begin_once_as_the_tokenizer_begins_them(
    make_source: MakeSource, tokenizer: PreTrainedTokenizerFast, template: str, text: str, expected: str
) -> None:
    wrapped = beginning(tokenizer, template)
    rows = load_rows([make_source([text, text])], wrapped, sequence_length=16)
    assert wrapped.decode(rows.input_ids[0][rows.mask[0]]) == 2 * expected
    assert wrapped.decode(encode_text(wrapped, text)) == expected.removesuffix("<end>") + "<end>" * text.count("<end>")


def test_text_that_the_tokenizer_does_not_know_is_said_once(
    make_source: MakeSource, capsys: pytest.CaptureFixture[str]
) -> None:
    known = tiny_tokenizer()
    known.unk_token = "w3"
    load_rows([make_source(["w5 w6", "жила была w5", "кошка"])], known, sequence_length=16)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("the tokenizer does not know at least half of this text") == 1 and "line 2: " in said


@pytest.mark.parametrize(
    ("texts", "line"),
    [
        (["ab ко", "a b"], 0),  # half of it is there
        (["кошка спит", "a b", "собака"], 1),
        (["a b", "собака и кошка спят"], 2),
        (["a b a b", "b a"], 0),
    ],
)
def test_text_that_a_tokenizer_without_an_unknown_token_drops_is_said_once(
    make_source: MakeSource, capsys: pytest.CaptureFixture[str], texts: list[str], line: int
) -> None:
    inner = Tokenizer(BPE({"a": 0, "b": 1, "<end>": 2}, []))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    assert tokenizer.unk_token_id is None and tokenizer.encode("a кошка b") == [0, 1]
    print_once.cache_clear()
    load_rows([make_source(texts)], tokenizer, sequence_length=16)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("the tokenizer drops at least half of this text") == bool(line)
    assert not line or f"line {line}: " in said


def test_text_that_a_tokenizer_without_an_unknown_token_cannot_read_is_refused(make_source: MakeSource) -> None:
    inner = Tokenizer(WordLevel({"a": 0, "b": 1, "<end>": 2}))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    with pytest.raises(InputError, match=r"line 1: the tokenizer cannot read this text .*Missing \[UNK\]") as caught:
        load_rows([make_source(["a b", "кошка"])], tokenizer, sequence_length=16)
    assert "unk_token" in str(caught.value.hint)


def test_unpacked_rows_are_documents(make_source: MakeSource, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = load_rows([make_source(["ab", "a longer one"])], tokenizer, sequence_length=5, packing="none")
    end = tokenizer.eos_token_id
    first, *pieces = rows.input_ids.tolist()
    assert first == [*tokenizer.encode("ab"), end, end, end]
    assert pieces == [tokenizer.encode("a lon"), tokenizer.encode("ger o"), [*tokenizer.encode("ne"), end, end, end]]
    assert rows.mask.sum(1).tolist() == [3, 5, 5, 3]
    batch = rows.take(torch.tensor([0]))
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0]]
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert positions_of(batch["document"]) is None
    packed = load_rows([make_source(["ab", "cd", "e"])], tokenizer, sequence_length=8)
    apart = load_rows([make_source(["ab", "cd", "e"])], tokenizer, sequence_length=8, packing="none")
    assert read_back(packed.unpacked()) == read_back(apart) and len(packed) == 1


def test_a_corpus_without_separators_is_used_to_its_end(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = "".join(random.Random(0).choices("abcdef \n", k=20_000)).strip()
    (tmp_path / "corpus.txt").write_text(text)
    source = TextConfig(path=str(tmp_path / "corpus.txt"))
    rows = load_rows([source], tokenizer, sequence_length=64, packing="none")
    assert tokenizer.decode(rows.input_ids[rows.mask]) == text + "<end>"
    second = load_rows([source], tokenizer, sequence_length=64, packing="none", max_tokens=640, skip_tokens=640)
    assert tokenizer.decode(second.input_ids[second.mask]) == text[640:1280]  # a round goes on in the document


def test_positions_and_labels_by_hand() -> None:
    document = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0]])
    mask = torch.tensor([[True] * 7 + [False], [True] * 3 + [False] * 5])
    positions = positions_of(document)
    assert positions is not None
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], list(range(8))]
    assert labels_within(document, mask).int().tolist() == [[1, 1, 0, 1, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert positions_of(document[1:]) is None


def test_tokens_asked_for_are_real_ones(make_source: MakeSource, tokenizer: PreTrainedTokenizerFast) -> None:
    source = make_source(["x" * 100])
    assert len(load_rows([source], tokenizer, sequence_length=8, max_tokens=40)) == 5
    assert len(load_rows([source], tokenizer, sequence_length=8, max_tokens=41)) == 6
    assert len(load_rows([source], tokenizer, sequence_length=8, max_tokens=1)) == 1
    short = make_source(["ab"] * 30)  # 3 tokens with the end of text, in rows of 8
    assert len(load_rows([short], tokenizer, sequence_length=8, packing="none", max_tokens=12)) == 4
    assert load_rows([short], tokenizer, sequence_length=8, packing="bfd", max_tokens=12).tokens == 12


PACKINGS: list[Packing] = ["wrapped", "bfd", "none"]


@pytest.mark.parametrize("packing", PACKINGS)
def test_rounds_go_on_where_the_last_one_stopped(
    make_source: MakeSource, tokenizer: PreTrainedTokenizerFast, packing: Packing
) -> None:
    sources = [make_source([letter * (i % 9 + 1) for i in range(40)], shuffle=10) for letter in "ab"]

    def load(tokens: int | None, skip: int = 0) -> Rows:
        return load_rows(
            sources, tokenizer, sequence_length=8, packing=packing, max_tokens=tokens, skip_tokens=skip, seed=3
        )

    rows = load(None)
    all_ids, ends = rows.input_ids.tolist(), [0, *rows.lengths.cumsum(0).tolist()]
    assert len(all_ids) > 40
    endless = all_ids * 4
    for skip in (0, 7, len(all_ids) - 5, len(all_ids), 2 * len(all_ids) + 3):
        passes, rest = divmod(skip, len(all_ids))
        taken = load(80, passes * ends[-1] + ends[rest])
        assert taken.input_ids.tolist() == endless[skip : skip + len(taken)]
        assert 80 <= taken.tokens < 80 + 8
    assert load(9999, ends[7]).input_ids.tolist() == endless[7 : 7 + len(all_ids)]  # no row twice
    assert load(None, ends[7]).input_ids.tolist() == endless[7 : 7 + len(all_ids)]
    assert load(16, ends[7] + 1).input_ids.tolist()[0] == all_ids[8]  # of a row that was begun, nothing again


@pytest.mark.parametrize("packing", PACKINGS)
def test_another_packing_goes_on_at_about_the_same_place(
    make_source: MakeSource, tokenizer: PreTrainedTokenizerFast, packing: Packing
) -> None:
    texts = [chr(ord("a") + i % 26) * 4 + f"{i:04}" for i in range(400)]
    first = load_rows([make_source(texts)], tokenizer, sequence_length=30, packing=packing, max_tokens=900)
    for other in PACKINGS:
        rows = load_rows(
            [make_source(texts)],
            tokenizer,
            sequence_length=20,
            packing=other,
            max_tokens=200,
            skip_tokens=first.tokens,
        )
        number = re.search("[0-9]{4}", tokenizer.decode(rows.input_ids[rows.mask]))
        assert number and abs(int(number[0]) - 100) <= 5


def test_no_source_at_all(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="no text: no source is given"):
        load_rows([], tokenizer, sequence_length=8)


def of_lengths(lengths: Sequence[int]) -> Rows:
    """Rows of so many tokens; all of a row are its number."""
    return Rows.of([[torch.full((length,), i)] for i, length in enumerate(lengths)], max(lengths), 0)


def seen(lengths: Sequence[int], **options: int) -> list[list[int]]:
    """The rows of each step."""
    return [chosen.tolist() for chosen in step_rows(of_lengths(lengths), **options)]


def test_steps_show_every_row_as_often() -> None:
    flat = [row for step in seen([1] * 6, seed=3, steps=6, tokens=12) for row in step]
    assert sorted(flat[:6]) == sorted(flat[6:]) == list(range(6))
    assert flat[:6] != flat[6:]
    assert seen([1] * 6, seed=3, steps=6, tokens=12) == seen([1] * 6, seed=3, steps=6, tokens=12)
    assert seen([1] * 6, seed=3, steps=6, tokens=12) != seen([1] * 6, seed=4, steps=6, tokens=12)
    assert [len(step) for step in seen([1] * 6, seed=0, steps=5, tokens=20)] == [4] * 5


def test_the_rows_of_steps_by_hand() -> None:
    lengths = [4, 1, 1, 1, 1, 4, 2, 2]
    steps = seen(lengths, seed=0, steps=4, tokens=16)
    counts = [sum(lengths[row] for row in step) for step in steps]
    assert sorted(row for step in steps for row in step) == list(range(8)) and sum(counts) == 16
    assert all(abs(sum(counts[:n]) - 4 * n) <= 2 for n in range(1, 5))  # half of the longest row
    assert [len(step) for step in seen([9, 9], seed=0, steps=3, tokens=2)] == [1, 1, 1]  # at least a row each


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=30)


@given(LENGTHS, st.integers(1, 300), st.integers(1, 99), st.integers(0, 99))
def test_steps_spend_their_tokens_to_within_a_row(lengths: list[int], tokens: int, wanted: int, seed: int) -> None:
    wanted = max(wanted, max(lengths))  # as a config has to say
    steps = max(1, round(tokens / wanted))
    shares = seen(lengths, seed=seed, steps=steps, tokens=tokens)
    counts = [sum(lengths[row] for row in step) for step in shares]
    assert len(shares) == steps and min(map(len, shares)) >= 1
    assert abs(sum(counts) - max(tokens, sum(lengths))) <= max(lengths)


@given(LENGTHS, st.integers(1, 6), st.integers(1, 4))
def test_micro_batches_hold_each_row_once_in_as_many_calls(lengths: list[int], most: int, world: int) -> None:
    rows, chosen = of_lengths(lengths), torch.randperm(len(lengths))
    shares = [micro_batches(rows, chosen, most, rank=rank, world=world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1  # or processes would wait for each other
    batches = [batch for share in shares for batch in share]
    assert all(1 <= len(batch["input_ids"]) <= most for batch in batches)
    counted = [
        int(ids[0])
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        if mask.any()
    ]
    assert sorted(counted) == list(range(len(lengths)))
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == rows.tokens


def test_storage_is_small(make_source: MakeSource, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = load_rows([make_source(["abc"] * 50)], tokenizer, sequence_length=8)
    assert sum(t.element_size() for t in (rows.input_ids, rows.mask, rows.document)) <= 9  # bytes a token


def test_a_tokenizer_without_an_unknown_token_need_not_know_a_letter() -> None:
    words = Tokenizer(WordLevel({"hello": 0, "world": 1, "<s>": 2}))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
    assert encode_text(tokenizer, "hello world") == [0, 1] and start_tokens(tokenizer) == []
