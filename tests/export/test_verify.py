"""`layerpeel verify`: what is right passes, and each kind of fault is caught and named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from layerpeel.errors import InputError
from layerpeel.export.verify.answers import NEVER, Answers, Question, pack_top
from layerpeel.export.verify.causes import cause_of_error
from layerpeel.export.verify.comparison import coarse_kl, first_difference
from layerpeel.export.verify.limits import PRECISIONS, precision_of
from layerpeel.export.verify.reference import Reference
from layerpeel.export.verify.text import compared_positions, make_question, read_text
from layerpeel.export.workers.exchange import top_of
from tests.export.conftest import WINDOW, Call, changed

pytestmark = pytest.mark.usefixtures("in_process")


def test_the_same_checkpoint_is_right(student: Path, command: Call) -> None:
    code, out, err = command("verify", student, "--against", student)
    assert code == 0, err
    assert "verdict      right" in out and "token ids    the same" in out and "greedy text  the same" in out
    code, out, _ = command("verify", student, "--against", student, "--json", "--tokens", "100")
    (said,) = json.loads(out)
    assert code == 0 and said["right"] and said["mean_kl"] < 1e-9 and said["positions"] == list(range(99))


def test_a_wrong_rope_base_is_named(student: Path, tmp_path: Path, command: Call) -> None:
    """As where a reader knows `rope_parameters` not, and takes a default; its config says so, and so does its error."""
    other = changed(student, tmp_path / "other", rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    code, out, _ = command("verify", student, "--against", other, "--json")
    (said,) = json.loads(out)
    assert code == 1 and not said["right"] and said["same_token_ids"]
    assert said["causes"][0] == "rope base (rope_theta): 10000 in the student, 1e+06 there"
    assert said["causes"][1].startswith("rope base: the error grows with position")
    assert said["kl"][0] < 1e-9 and said["mean_kl"] > 0.1
    _, out, _ = command("verify", student, "--against", other)
    assert "WRONG: KL" in out and "likely       rope base" in out


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"sliding_window": WINDOW // 2}, "window pattern: the error begins at token"),
        ({"sliding_window": 2 * WINDOW}, f"window pattern: the error begins beyond the window of {WINDOW} tokens"),
        (
            {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
            f"window pattern: the error begins beyond the window of {WINDOW} tokens",
        ),
    ],
)
def test_a_wrong_window_is_named(
    fields: dict[str, object], cause: str, windowed: Path, tmp_path: Path, command: Call
) -> None:
    other = changed(windowed, tmp_path / "other", **fields)
    code, out, _ = command("verify", windowed, "--against", other, "--json")
    (said,) = json.loads(out)
    assert code == 1 and said["causes"][-1].startswith(cause)
    assert max(kl for place, kl in zip(said["positions"], said["kl"], strict=True) if place < WINDOW // 2) < 1e-9


def test_a_text_within_the_window_is_said_not_to_show_it(windowed: Path, command: Call) -> None:
    code, out, _ = command("verify", windowed, "--against", windowed, "--tokens", str(WINDOW))
    assert code == 0 and f"not more than the window of {WINDOW}: an error of the window would not show" in out


def test_a_wrong_head_beside_tied_embeddings_is_named(student: Path, tmp_path: Path, command: Call) -> None:
    other = changed(student, tmp_path / "other", tie_word_embeddings=False)
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 0.1 * torch.randn(606, 64)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    code, out, _ = command("verify", student, "--against", other, "--json")
    (said,) = json.loads(out)
    assert code == 1
    assert said["causes"][0] == "head: the embedding's weights in the student, with weights of its own there"
    assert said["causes"][1].startswith("head: the error is there from the first token on and the same at all")


def test_a_head_that_is_only_written_twice_is_a_note(student: Path, tmp_path: Path, command: Call) -> None:
    other = changed(student, tmp_path / "other", tie_word_embeddings=False)
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    code, out, _ = command("verify", student, "--against", other)
    assert code == 0 and "with weights of its own there: it computes the same, in a larger file" in out


def test_a_foreign_tokenizer_is_named(student: Path, tmp_path: Path, command: Call) -> None:
    """The text is compared on the student's ids all the same, and the model is right on them."""
    other = changed(student, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-100]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, out, _ = command("verify", student, "--against", other, "--json")
    (said,) = json.loads(out)
    assert code == 1 and not said["same_token_ids"] and said["mean_kl"] < 1e-9
    assert said["causes"] == ["tokenizer: it gives other token ids for the same text, so the model reads another text"]
    ids = Tokenizer.from_file(str(student / "tokenizer.json")).encode(read_text(None)).ids
    theirs_too = Tokenizer.from_file(str(other / "tokenizer.json")).encode(read_text(None)).ids
    assert ids[: said["first_other_token"]] == theirs_too[: said["first_other_token"]]
    assert ids[said["first_other_token"]] != theirs_too[said["first_other_token"]]


def test_limits_are_those_of_the_precision(student: Path, tmp_path: Path, command: Call) -> None:
    """Weights rounded to few bits are above the limits of float32, and within those of the precision named."""
    other = changed(student, tmp_path / "other")
    weights = {
        name: (tensor * (1 + 0.02 * torch.randn_like(tensor))) if tensor.ndim == 2 else tensor
        for name, tensor in load_file(other / "model.safetensors").items()
    }
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert command("verify", student, "--against", other, "--tokens", "64")[0] == 1
    code, out, _ = command("verify", student, "--against", other, "--tokens", "64", "--precision", "4-bit")
    assert code == 0 and f"{PRECISIONS['4-bit'].kl:.1e}" in out


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--against", "nowhere"], "--against nowhere: there is no such file or folder", "a .gguf file"),
        (["--against", "empty"], "it holds none of model.onnx, openvino_model.xml, config.json", "optimum"),
        (["--against", "empty", "--runtime", "vlm"], "there is no such runtime; did you mean 'vllm'?", ""),
        (["--against", "empty", "--precision", "5-bit"], "--precision 5-bit: there are no limits for it", ""),
        (["--against", "empty", "--text", "none.txt"], "--text none.txt: it cannot be read", "UTF-8"),
        (["--against", "empty", "--text", "blank.txt"], "--text blank.txt: it is empty", "some hundred words"),
        (["--against", "http://127.0.0.1:9"], "does not answer as an OpenAI-compatible server", "the address of"),
    ],
)
def test_bad_input_is_told(
    arguments: list[str],
    message: str,
    hint: str,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Call,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("blank.txt").write_text(" \n")
    code, out, err = command("verify", student, *arguments)
    assert code == 2 and not out and message in err and hint in err


def test_kl_over_some_tokens_and_the_rest() -> None:
    """By hand: of (1/2, 1/4, 1/8, 1/8) against the uniform, first exactly, then over one token and the rest."""
    student = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    uniform = torch.full((1, 4), 0.25, dtype=torch.float64).log()
    exact = 0.5 * np.log(2) + 2 * 0.125 * np.log(0.5)
    assert coarse_kl(student, torch.arange(4)[None], uniform).item() == pytest.approx(exact, abs=1e-5)
    coarse = 0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)
    assert coarse_kl(student, torch.tensor([[0]]), uniform[:, :1]).item() == pytest.approx(coarse, abs=1e-5)
    unused = torch.tensor([[0, -1, 700]])
    assert coarse_kl(student, unused, uniform[:, :3]).item() == pytest.approx(coarse, abs=1e-5)


def test_kl_over_some_tokens_is_never_above_the_exact_one() -> None:
    one, other = torch.randn(2, 50, 200).log_softmax(-1)
    exact = (one.exp() * (one - other)).sum(-1)
    for count in (1, 10, 100):
        given, ids = other.topk(count)
        assert (coarse_kl(one, ids, given.double()) <= exact + 1e-5).all()


def test_infinite_and_missing_log_probabilities_are_packed() -> None:
    ids, log_probs = pack_top([[(3, -0.5), (4, float("-inf"))], [(7, -1.0)]])
    assert ids.tolist() == [[3, 4], [7, -1]]
    assert log_probs.tolist() == [[-0.5, NEVER], [-1.0, NEVER]]


def test_the_most_likely_of_logits() -> None:
    logits = torch.randn(5, 40)
    ids, log_probs = top_of(logits.numpy(), 7)
    expected, places = logits.double().log_softmax(-1).topk(7)
    order = (-log_probs).argsort(1)
    assert np.take_along_axis(ids, order, 1).tolist() == places.tolist()
    assert np.allclose(np.take_along_axis(log_probs, order, 1), expected, atol=1e-6)


def test_where_token_ids_differ() -> None:
    question = Question("", [1, 2, 3], [0, 1])

    def place(ids: list[int] | None) -> int | None:
        return first_difference(question, Answers("", None, ids, np.empty((0, 0)), np.empty((0, 0))))

    assert [place(ids) for ids in ([1, 2, 3], None, [1, 9, 3], [1, 2], [1, 2, 3, 4], [0, 1, 2, 3])] == [
        None,
        None,
        1,
        2,
        3,
        0,
    ]


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("torch.float32", "fp32"),
        ("ALL_F32", "fp32"),
        ("bfloat16", "16-bit"),
        ("MOSTLY_BF16", "16-bit"),
        ("MOSTLY_F16", "16-bit"),
        ("MOSTLY_Q8_0", "8-bit"),
        ("MOSTLY_Q6_K", "8-bit"),
        ("int8", "8-bit"),
        ("MOSTLY_Q4_K_M", "4-bit"),
        ("MOSTLY_IQ4_XS", "4-bit"),
        ("MOSTLY_Q5_K_S", "4-bit"),
        ("4-bit", "4-bit"),
        ("MOSTLY_Q2_K", None),
        ("GUESSED", None),
    ],
)
def test_precisions_of_names(name: str, precision: str | None) -> None:
    assert precision_of(name) == precision


def test_the_text_is_longer_than_any_window(windowed: Path) -> None:
    reference = Reference(windowed)
    reference.config.sliding_window, reference.config.max_position_embeddings = 3000, 10_000
    question = make_question(read_text(None), reference.tokenizer, reference.config)
    assert 3200 < len(question.token_ids) <= 3256  # the bundled text, repeated
    assert reference.tokenizer(question.text)["input_ids"] == question.token_ids
    around = [place for place in question.positions if 2990 <= place < 3090]
    assert len(around) == 100 and len(question.positions) < 400
    reference.config.max_position_embeddings = 1000
    assert len(make_question(read_text(None), reference.tokenizer, reference.config).token_ids) <= 1000


def test_a_text_of_a_word_is_refused(student: Path) -> None:
    reference = Reference(student)
    with pytest.raises(InputError, match="--text: it has"):
        make_question("a", reference.tokenizer, reference.config, tokens=1)


def test_positions_that_are_compared() -> None:
    assert compared_positions(4, 0) == [0, 1, 2]
    assert compared_positions(512, 0)[:66] == [*range(64), 66, 69] and max(compared_positions(512, 0)) <= 510


def test_causes_of_patterns_with_noise() -> None:
    """The noise of four bits hides small errors, not these."""
    generator = np.random.default_rng(0)
    places = list(range(512))
    noise = 0.1 * generator.lognormal(0, 1, 512)

    def cause(error: np.ndarray, windows: list[int]) -> str:
        return (cause_of_error(places, list(error), 0.3, windows) or "none").split(":")[0]

    assert cause(noise, [256]) == "none"
    assert cause(noise + 2 * (np.arange(512) >= 256), [256]) == "window pattern"
    assert cause(noise + np.minimum(np.arange(512) / 100, 2), []) == "rope base"
    assert cause(noise + 1, []) == "head"
