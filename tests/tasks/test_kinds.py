"""Each kind of task against scores worked out by hand."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from layerpeel.inference.requests import Generation, LogLikelihood
from layerpeel.tasks.generate import text_score
from tests.families import tiny_tokenizer
from tests.tasks.conftest import MakeTask, input_error, score_of, task_of

Bytes = PreTrainedTokenizerFast
LLAMA = "models/stories260K-hf"


def row(**changes: Any) -> dict[str, Any]:
    return {"context": "Sky is", "choices": ["blue", "green now"], "answer": 0} | changes


def test_choice_asks_for_every_choice(make: MakeTask, tokenizer: Bytes) -> None:
    (sample,) = make("choice", [row()]).samples(tokenizer)
    assert sample.requests == [
        LogLikelihood(tuple(tokenizer.encode("Sky is")), tuple(tokenizer.encode(choice)))
        for choice in (" blue", " green now")
    ]


@pytest.mark.parametrize(
    ("normalize", "correct"),
    [("none", 1.0), ("bytes", 0.0), ("tokens", 0.0)],  # -2 > -3; -2/4 < -3/9; -2/5 < -3/10
)
def test_choice_by_length(make: MakeTask, tokenizer: Bytes, normalize: str, correct: float) -> None:
    task = make("choice", [row()], normalize=normalize)
    assert score_of(task, tokenizer, [-2.0, -3.0]).value == correct


def test_bytes_are_not_letters(make: MakeTask, tokenizer: Bytes) -> None:
    task = make("choice", [row(choices=["да", "yes!"])], normalize="bytes")  # four bytes each
    assert score_of(task, tokenizer, [-2.0, -2.1]).value == 1.0


@pytest.mark.parametrize("answer", [1, "1", "B", "green now"])
def test_choice_answers_in_every_form(make: MakeTask, tokenizer: Bytes, answer: int | str) -> None:
    task = make("choice", [row(answer=answer), row(answer=answer)])
    score = score_of(task, tokenizer, [-2.0, -1.0, -1.0, -2.0])
    assert (score.value, score.stderr, score.n) == (0.5, pytest.approx(0.5), 2)


def test_choices_from_templates(make: MakeTask, tokenizer: Bytes) -> None:
    rows = [{"q": "Who?", "wrong": "Linnaeus", "right": "darwin"}]
    task = make("choice", rows, prompt="{q}", choices=["{wrong}", "{right}"], answer="right")
    assert [tokenizer.decode(r.continuation) for r in task.requests(tokenizer)] == [" Linnaeus", " darwin"]
    assert score_of(task, tokenizer, [-2.0, -1.0]).value == 1.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"answer": 2}, "column 'answer' holds 2, expected which of the 2 choices is right"),
        ({"answer": "C"}, "column 'answer' holds 'C', expected which of the 2 choices is right"),
        ({"answer": -1}, "column 'answer' holds -1, expected which of the 2 choices is right"),
        ({"choices": "blue"}, "column 'choices' holds 'blue', expected a list of choices"),
        ({"choices": ["blue"]}, "column 'choices' holds \"['blue']\", expected a list of choices"),
    ],
)
def test_what_is_said_of_choices(make: MakeTask, tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    message, _ = input_error(make("choice", [row(**changes)]).check)
    assert message == f"task t: {tmp_path / 'rows.jsonl'}, line 1: {expected}"


def test_a_choice_without_a_token_is_refused(kit: Path, make: MakeTask) -> None:
    merging = AutoTokenizer.from_pretrained(kit / "tokenizers" / "tok_qwen2")  # "abcdef" is one of its tokens
    task = make("choice", [row(context="abc", choices=["def", "xyz"])], delimiter="")
    assert input_error(lambda: task.requests(merging))[0].endswith(
        "choice 'def' has no token of its own after its prompt"
    )


def test_an_empty_choice_is_refused_with_any_tokenizer(kit: Path, make: MakeTask, tokenizer: Bytes) -> None:
    task = make("choice", [row(choices=["blue", " "])])
    for each in (tokenizer, *(AutoTokenizer.from_pretrained(kit / name) for name in ("tokenizers/tok_qwen2", LLAMA))):
        message, hint = input_error(lambda each=each: task.requests(each))
        assert message.endswith("line 1: choice ' ' has no token of its own after its prompt")
        assert hint.startswith("leave empty choices out")


def test_of_equal_choices_each_is_right(make: MakeTask, tokenizer: Bytes) -> None:
    task = make("choice", [row(choices=["grey", "blue", "blue"], answer=2)])
    assert score_of(task, tokenizer, [-2.0, -1.0, -1.0]).value == 1.0


def test_pairs(make: MakeTask, tokenizer: Bytes) -> None:
    rows = [{"sentence_good": f"good {i}", "sentence_bad": f"bad {i}"} for i in range(3)]
    task = make("pairs", rows)
    requests = task.requests(tokenizer)
    assert [tokenizer.decode(r.continuation) for r in requests[:3]] == ["good 0", "bad 0", "good 1"]
    assert {r.context for r in requests} == {(tokenizer.eos_token_id,)}
    score = score_of(task, tokenizer, [-1.0, -2.0, -2.0, -1.0, -1.0, -1.0])  # right, wrong, a tie is not right
    assert (score.value, score.n) == (pytest.approx(1 / 3), 3)


def test_limit_is_for_each_file(tmp_path: Path) -> None:
    for name in "ba":
        rows = [{"sentence_good": f"{name}{i}", "sentence_bad": "x"} for i in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = task_of(kind="pairs", data=str(tmp_path / "*.jsonl"), limit=2)
    assert [r["sentence_good"] for r in task.rows] == ["a0", "a1", "b0", "b1"]


def test_what_is_said_of_pairs(make: MakeTask, tmp_path: Path) -> None:
    where = f"task t: {tmp_path / 'rows.jsonl'}"
    assert input_error(make("pairs", [{"good": "a"}]).check) == (
        f"{where}, line 1: no column 'sentence_good'",
        "columns there: good",
    )
    nothing = make("pairs", [{"sentence_good": None, "sentence_bad": "b"}])
    assert input_error(nothing.check)[0] == f"{where}, line 1: column 'sentence_good' holds NoneType, expected text"


def test_a_sentence_without_a_token_is_refused(make: MakeTask, tokenizer: Bytes) -> None:
    for text in ("", "<end>"):  # as probable as can be
        task = make(
            "pairs", [{"sentence_good": "a", "sentence_bad": "b"}, {"sentence_good": text, "sentence_bad": "b"}]
        )
        assert input_error(lambda task=task: task.requests(tokenizer))[0].endswith(
            "line 2: column 'sentence_good' holds a sentence without a token, which is as probable as can be"
        )


def test_generate_asks_for_room_enough(make: MakeTask, tokenizer: Bytes) -> None:
    rows = [{"prompt": "Say: hi", "target": " hi"}, {"prompt": "Say: hello", "target": " hello"}]
    first = make("generate", rows).requests(tokenizer)[0]
    assert first == Generation(tuple(tokenizer.encode("Say: hi")), len(" hello") + 8, ("\n",), needed=len(" hi") + 8)
    assert make("generate", rows, max_new_tokens=3, stop=["\n", "."]).requests(tokenizer)[1] == Generation(
        tuple(tokenizer.encode("Say: hello")), 3, ("\n", ".")
    )


def test_generate_scores_stripped_text(make: MakeTask, tokenizer: Bytes) -> None:
    task = make("generate", [{"prompt": "p", "target": " hi"}, {"prompt": "p", "target": " hello"}])
    assert score_of(task, tokenizer, ["hi ", "Hello"]).value == 0.5


def test_generate_shows_solved_rows(make: MakeTask, tokenizer: Bytes) -> None:
    rows = [{"prompt": f"Copy {i}:", "target": f" {i}"} for i in range(2)]
    (request,) = make("generate", rows, num_fewshot=1).requests(tokenizer)
    assert tokenizer.decode(request.prompt) == "Copy 1: 1\n\nCopy 0:"


def test_an_empty_prompt_is_the_start_of_text(make: MakeTask, tokenizer: Bytes) -> None:
    (request,) = make("generate", [{"prompt": "", "target": "a"}]).requests(tokenizer)
    assert request.prompt == (tokenizer.eos_token_id,)


def test_special_tokens_of_a_target_are_left_out_as_they_are_of_answers(make: MakeTask) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<sep>", special=True)])  # special, though no role is known of it
    task = make("generate", [{"prompt": "w4", "target": "w5 w6</s>"}, {"prompt": "w4", "target": "<s>w5<sep> w6"}])
    assert [sample.reference for sample in task.samples(tokenizer)] == ["w5 w6", "w5 w6"]
    assert score_of(task, tokenizer, ["w5 w6", "w5 w6 w7"]).value == 0.5
    nothing = make("generate", [{"prompt": "w4", "target": "w5"}, {"prompt": "w4", "target": "<s></s>"}])
    message, hint = input_error(lambda: nothing.requests(tokenizer))
    assert message.endswith(
        "line 2: its target, '<s></s>', holds nothing but special tokens, which are left out of generated text"
    )
    assert hint == "leave such rows out, or give targets of text"


def test_a_target_beyond_its_stop_is_refused_where_it_has_to_be_the_same(
    make: MakeTask, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "p", "target": " one\n"}, {"prompt": "p", "target": "one\ntwo"}]
    message, hint = input_error(make("generate", rows).check)
    assert "line 2: its target holds '\\n', and text ends before the first of those (stop), so no answer" in message
    assert hint == "set stop to what ends an answer, or shorten the target"
    make("generate", rows, stop=["###"]).check()
    make("generate", rows, metric="rougeL").check()
    assert "what comes after is not written" in " ".join(capsys.readouterr().err.split())


def test_an_empty_stop_is_refused(make: MakeTask) -> None:
    assert input_error(lambda: make("generate", [], stop=[""]))[0].startswith(
        "task t: stop.0: string should have at least 1"
    )


def longest_common(a: list[str], b: list[str]) -> int:
    """By definition."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common(a[1:], b[1:])
    return max(longest_common(a[1:], b), longest_common(a, b[1:]))


@pytest.mark.parametrize(
    ("text", "target"),
    [("a b c", "a b c"), ("a x c", "a b c"), ("", "a b"), ("c b a", "a b c"), ("кот спит", "кот тихо спит дома")],
)
def test_copy_is_the_longest_common_subsequence_of_words(text: str, target: str) -> None:
    a, b = text.split(), target.split()
    assert text_score("copy", text, target) == pytest.approx(longest_common(a, b) / max(len(a), len(b)))


def test_rouge_counts_russian() -> None:
    text, target = "Кот спит дома", "кот тихо спит, дома!"
    assert text_score("rouge1", text, target) == pytest.approx(2 * 1 * 0.75 / 1.75)  # 3 of 3 words, 3 of 4
    assert text_score("rouge2", text, target) == pytest.approx(2 * 0.5 * (1 / 3) / (0.5 + 1 / 3))  # "спит дома"
    assert text_score("rougeL", text, target) == pytest.approx(2 * 1 * 0.75 / 1.75)
    assert text_score("rougeL", "дома спит кот", "кот спит дома") == pytest.approx(1 / 3)
    assert text_score("rouge1", "", target) == 0


def test_perplexity_by_hand(make: MakeTask, tokenizer: Bytes) -> None:
    task = make("perplexity", [{"text": "abcdefg"}, {"text": "hij"}], sequence_length=4)
    requests = task.requests(tokenizer)
    assert [tokenizer.decode(r.continuation) for r in requests] == ["abcd", "efg", "hij"]
    assert {r.context for r in requests} == {(tokenizer.eos_token_id,)}
    score = score_of(task, tokenizer, [-4.0, -5.0, -6.0])  # losses 9 and 6 over 7 and 3 tokens
    assert score.value == pytest.approx(math.exp(1.5))
    spread = (9 - 1.5 * 7) ** 2 + (6 - 1.5 * 3) ** 2  # over n - 1 = 1
    assert score.stderr == pytest.approx(math.exp(1.5) * math.sqrt(spread / 2) / 5)
    assert score.lower_is_better and score.n == 2


@pytest.mark.parametrize("text", ["abcde", "!~abcde"], ids=["plain", "rendered by a chat template"])
def test_perplexity_starts_as_the_tokenizer_does(make: MakeTask, tokenizer: Bytes, text: str) -> None:
    inner = copy.deepcopy(tokenizer.backend_tokenizer)
    special = [(token, inner.token_to_id(token)) for token in "!~"]
    inner.post_processor = TemplateProcessing(single="! ~ $A", special_tokens=special)  # as GLM's [gMASK]<sop>
    twice = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    requests = make("perplexity", [{"text": text}], sequence_length=4).requests(twice)
    assert [(twice.decode(r.context), twice.decode(r.continuation)) for r in requests] == [("!~", "abcd"), ("!~", "e")]


def test_texts_of_special_tokens_alone_have_no_perplexity(make: MakeTask, tokenizer: Bytes, tmp_path: Path) -> None:
    task = make("perplexity", [{"text": "<end>"}])
    assert input_error(lambda: task.requests(tokenizer))[0] == (
        f"task t: {tmp_path / 'rows.jsonl'}: column 'text' holds no text but special tokens"
    )


def test_what_is_said_of_perplexity(make: MakeTask, tmp_path: Path) -> None:
    where = f"task t: {tmp_path / 'rows.jsonl'}"
    assert input_error(make("perplexity", [{"text": " "}]).check)[0] == f"{where}: column 'text' holds no text"
    assert input_error(make("perplexity", [{"story": "a"}]).check)[0] == f"{where}, line 1: no column 'text'"
