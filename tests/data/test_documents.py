"""Documents of one source, chats among them, and mixtures of several."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from layerpeel.config.fields import TextConfig
from layerpeel.data.batches import load_rows
from layerpeel.data.chats import write_chat
from layerpeel.data.documents import held_out_documents, mix_documents, read_documents
from layerpeel.errors import InputError

MakeSource = Callable[..., TextConfig]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'judge' %}{{ raise_exception('no judges') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
)


@pytest.fixture
def chatty(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerFast:
    """The tokenizer, with a chat template."""
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    return tokenizer


def input_error(source: TextConfig) -> tuple[str, str | None]:
    with pytest.raises(InputError) as caught:
        list(read_documents(source))
    return str(caught.value).removeprefix(source.path), caught.value.hint


def test_chats_are_found(make_source: MakeSource) -> None:
    rows: list[Any] = [{"messages": CHAT, "id": 1}, {"messages": []}, {"text": "a text", "messages": CHAT}]
    assert list(read_documents(make_source(rows))) == [CHAT, "a text"]
    assert list(read_documents(make_source(rows, messages="messages"))) == [CHAT, CHAT]
    assert input_error(make_source(rows, column="txt")) == (", line 1: no column 'txt'", "columns there: messages, id")
    assert input_error(make_source(rows, messages="chat")) == (
        ", line 1: no column 'chat'",
        "columns there: messages, id",
    )


def test_rows_without_text_are_left_out(make_source: MakeSource) -> None:
    assert list(read_documents(make_source([{"text": None}, "", " ", "a", {"text": None}]))) == ["a"]
    assert input_error(make_source([{"text": None}, ""]))[0] == ": no text in it"


def test_chats_from_a_table_have_no_keys_but_their_own(tmp_path: Any) -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "clock"}]}
    datasets.Dataset.from_list([{"messages": [CHAT[0], call]}]).to_parquet(tmp_path / "a.parquet")
    assert list(read_documents(TextConfig(path=str(tmp_path / "a.parquet")))) == [[CHAT[0], call]]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", ": column 'messages' holds str, expected a list of messages"),
        (
            [CHAT[0], {"from": "human", "text": "hi"}],
            ": column 'messages', message 2: expected a role and a content, both text; found a mapping of from, text",
        ),
        (
            [{"from": "observation", "value": "4"}],
            ": column 'messages', message 1: from 'observation', expected one of human, user, gpt, assistant, system",
        ),
        (
            [
                CHAT[0],
                {"role": "user", "content": [{"type": "text", "text": "See"}, {"type": "image_url", "url": "a"}]},
            ],
            ": column 'messages', message 2: a part of its content is of type 'image_url', and only text is read",
        ),
        (["hi"], ": column 'messages', message 1: expected a role and a content, both text; found str"),
        (
            [{"role": "user", "content": ["image"], "id": 1}],
            ": column 'messages', message 1: expected a role and a content, both text; "
            "found a mapping of role, content, id",
        ),
        (
            [{"role": "user"}],
            ": column 'messages', message 1: expected a role and a content, both text; found a mapping of role",
        ),
    ],
)
def test_what_is_said_of_a_chat(make_source: MakeSource, messages: Any, message: str) -> None:
    text, hint = input_error(make_source([{"messages": messages}]))
    assert text == f", line 1{message}"
    assert hint is not None and ('"role": "user"' in hint or "leave" in hint)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_chats_of_other_forms_are_the_same_chats(tmp_path: Path, kind: str) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    rows: list[dict[str, Any]] = [
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes?"}]},
        {"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]},
    ]
    in_parts = [{"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": [*parts]}]}]
    for name, table in (("a", rows[:1]), ("b", rows[1:]), ("c", in_parts)):
        path = tmp_path / f"{name}.{kind}"
        if kind == "parquet":
            datasets.Dataset.from_list(table).to_parquet(path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in table))
    assert list(read_documents(TextConfig(path=str(tmp_path / f"[ab].{kind}")))) == [CHAT, CHAT]
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}]
    assert list(read_documents(TextConfig(path=str(tmp_path / f"c.{kind}")))) == [said]


def test_a_chat_of_a_system_prompt_is_read_from_sharegpt(make_source: MakeSource) -> None:
    chat = [{"from": "system", "value": "be brief"}, {"from": "human", "value": "hi", "weight": 1}]
    expected = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert list(read_documents(make_source([{"conversations": chat}]))) == [expected]
    assert list(read_documents(make_source([{"messages": chat}]))) == [expected]


def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n\n{"text": 5}\n')
    (tmp_path / "c.json").write_text('[{"text": "a"}, {"story": "b"}]')
    folder = TextConfig(path=str(tmp_path))
    message = f", {tmp_path / 'b.jsonl'}, line 3: column 'text' holds int, expected text"
    assert input_error(folder)[0] == message
    assert input_error(TextConfig(path=str(tmp_path / "c.json")))[0] == ", row 2: no column 'text'"


def test_chats_are_written_by_the_template(make_source: MakeSource, chatty: PreTrainedTokenizerFast) -> None:
    rows = load_rows([make_source([{"messages": CHAT}, "a text"])], chatty, sequence_length=50, packing="none")
    written = [chatty.decode(ids[mask]) for ids, mask in zip(rows.input_ids, rows.mask, strict=True)]
    assert written == ["[user]hi<end>[assistant]yes?<end>", "a text<end>"]  # no second <end> after the template's
    assert rows.input_ids[0].tolist().count(chatty.eos_token_id) == 2 + 50 - int(rows.mask[0].sum())


def test_what_is_said_of_templates(tokenizer: PreTrainedTokenizerFast, make_source: MakeSource) -> None:
    source = make_source([{"messages": CHAT}])
    with pytest.raises(
        InputError, match=r"jsonl, line 1: it holds chats, and the tokenizer has no chat template"
    ) as caught:
        load_rows([source], tokenizer, sequence_length=8)
    assert caught.value.hint is not None and "chat template" in caught.value.hint


def test_what_is_said_of_a_chat_that_the_template_refuses(chatty: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"^here: .* refuses a chat of user, judge \(no judges\)$"):
        write_chat([CHAT[0], {"role": "judge", "content": "guilty"}], chatty, "here")


def test_mixing_is_fair_complete_and_repeatable(make_source: MakeSource) -> None:
    sources = [make_source([f"{name}{i}" for i in range(count)]) for name, count in (("a", 300), ("b", 100))]
    mixed = [str(text) for _, text in mix_documents(sources, seed=1)]
    assert sorted(mixed) == sorted([f"a{i}" for i in range(300)] + [f"b{i}" for i in range(100)])
    assert 15 <= sum(text.startswith("b") for text in mixed[:60]) <= 45
    assert [text for text in mixed if text[0] == "a"] == [f"a{i}" for i in range(300)]
    assert mixed == [text for _, text in mix_documents(sources, seed=1)]
    assert mixed != [text for _, text in mix_documents(sources, seed=2)]


def test_weights_hold_until_a_source_ends(make_source: MakeSource) -> None:
    sources = [make_source(["a"] * 2000, weight=6.0), make_source(["b"] * 2000, weight=3.0), make_source(["c"] * 100)]
    mixed = [str(text) for _, text in mix_documents(sources, seed=0)]
    end = max(place for place, text in enumerate(mixed) if text == "c")
    before, after = Counter(mixed[:end]), Counter(mixed[end + 1 : end + 901])
    assert before["a"] / end == pytest.approx(0.6, abs=0.05)  # three standard deviations at about 1000 documents
    assert before["b"] / end == pytest.approx(0.3, abs=0.05)
    assert after["a"] / 900 == pytest.approx(2 / 3, abs=0.05)
    assert Counter(mixed) == {"a": 2000, "b": 2000, "c": 100}


def test_a_shuffled_source_is_complete_and_mixes_what_it_holds(make_source: MakeSource) -> None:
    texts = [str(i) for i in range(400)]

    def first(count: int, seed: int = 0, **options: Any) -> list[int]:
        source = make_source(list(texts), **options)
        return [int(str(text)) for _, text in islice(mix_documents([source], seed), count)]

    shuffled = first(400, shuffle=100)
    assert sorted(shuffled) == list(range(400)) and shuffled == first(400, shuffle=100) != first(400, 1, shuffle=100)
    assert all(number <= place + 100 for place, number in enumerate(shuffled))  # it cannot know of later ones
    assert sum(first(50, shuffle=1000)) / 50 == pytest.approx(199.5, abs=50)  # a sorted file, all of it held
    assert first(400, shuffle=0) == list(range(400))


def test_no_more_is_read_than_asked_for(make_source: MakeSource, tokenizer: PreTrainedTokenizerFast) -> None:
    rows: list[Any] = ["x" * 50] * 1000 + [{"text": 5}]
    options: dict[str, Any] = {"sequence_length": 8, "max_tokens": 78}
    assert len(load_rows([make_source(rows, shuffle=400)], tokenizer, **options)) == 10
    with pytest.raises(InputError, match="holds int"):
        load_rows([make_source(rows, shuffle=1000)], tokenizer, **options)


def test_held_out_documents_are_in_no_training_text(tmp_path: Path) -> None:
    for file in range(2):  # of a folder, the documents of all files are counted on
        texts = [f"{file}{number}" for number in range(4)]
        (tmp_path / f"{file}.txt").write_text("\n<|endoftext|>\n".join(texts))
    source = TextConfig(path=str(tmp_path), hold_out=3)
    assert [document for _, document in held_out_documents(source)] == ["00", "03", "12"]
    assert list(read_documents(source)) == ["01", "02", "10", "11", "13"]
    assert sorted(document for _, document in mix_documents([source], 0)) == ["01", "02", "10", "11", "13"]
    everything = TextConfig(path=str(tmp_path))
    assert len(list(read_documents(everything))) == 8 and not list(held_out_documents(everything))


def test_nothing_is_left_of_one_document(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("one")
    assert input_error(TextConfig(path=str(tmp_path / "book.txt"), hold_out=5)) == (
        ": it holds one document, and hold_out leaves that out",
        "give more documents (in a .txt file, a line <|endoftext|> ends one), or no hold_out",
    )
