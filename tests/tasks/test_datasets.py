"""Datasets as they are published, read by templates alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from layerpeel.config.reading import load_config
from layerpeel.losses.hidden_mse import HiddenMSE
from layerpeel.losses.kl import KL
from layerpeel.losses.loss_sum import LossSum
from layerpeel.tasks.registry import make_tasks
from tests.tasks.conftest import score_of, task_of

PAPER = Path(__file__).parents[2] / "configs" / "paper-qwen2.5-3b.yaml"

ON_DISK: dict[str, dict[str, Any]] = {
    "piqa/plain_text": {"prompt": "{goal}", "choices": ["{sol1}", "{sol2}"], "answer": "label"},
    "sciq/none": {
        "prompt": "{support}\n{question}",
        "choices": ["{distractor1}", "{distractor2}", "{distractor3}", "{correct_answer}"],
        "answer": "correct_answer",
    },
    "openbookqa/main": {
        "prompt": "{question_stem}",
        "choices": [f"{{choices[text][{index}]}}" for index in range(4)],
        "answer": "answerKey",
    },
    "super_glue/cb": {
        "prompt": "{premise}\nQuestion: {hypothesis}. True, False, or Neither?\nAnswer:",
        "choices": ["True", "False", "Neither"],
        "answer": "label",
    },
    "super_glue/copa": {"prompt": "{premise}", "choices": ["{choice1}", "{choice2}"], "answer": "label"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_DISK)
def test_published_datasets_are_choices(kit: Path, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    folder = kit / "eval" / "hf_datasets" / name / "validation"
    task = task_of(kind="choice", data=str(folder), **ON_DISK[name])
    task.check()
    rows = datasets.load_from_disk(str(folder))
    width = len(ON_DISK[name]["choices"])
    assert [len(sample.requests) for sample in task.samples(tokenizer)] == [width] * len(rows)
    score = score_of(
        task, tokenizer, [-float(index % width) for index in range(width * len(rows))]
    )  # always the first choice
    column = rows[ON_DISK[name]["answer"]]
    first = {"openbookqa/main": "A", "sciq/none": None}.get(name, 0)
    if first is not None:
        assert score.value == pytest.approx(sum(value == first for value in column) / len(rows))


MMLU = {"question": "2 + 2?", "subject": "math", "choices": ["3", "4", "5", "6"], "answer": 1}
M_MMLU = {"instruction": "2 + 2?", "option_a": "3", "option_b": "4", "option_c": "5", "option_d": "6", "answer": "B"}
NEWS = {"article": "It rained all day.", "highlights": "Rain .\nAll day .", "id": "0"}
WMT = {"translation": {"en": "A cat", "ru": "Кот"}}
FORMATS = {
    "cais/mmlu": ("question", MMLU, ("dev", "test")),
    "alexandrainst/m_mmlu": ("instruction", M_MMLU, ("train", "test")),
    "abisee/cnn_dailymail": ("article", NEWS, ("validation", "test")),
    "wmt/wmt16": ("translation", WMT, ("validation", "test")),
}


def save(folder: Path, column: str, row: dict[str, Any], splits: tuple[str, ...]) -> str:
    """A dataset of that form, six rows a split, no two alike."""

    def numbered(text: Any, number: str) -> Any:
        return (
            {key: f"{value} {number}" for key, value in text.items()} if isinstance(text, dict) else f"{text} {number}"
        )

    saved = {
        split: datasets.Dataset.from_list([row | {column: numbered(row[column], f"{split}{i}")} for i in range(6)])
        for split in splits
    }
    datasets.DatasetDict(saved).save_to_disk(folder)
    return str(folder)


def test_the_papers_config_reads_its_datasets(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = load_config(PAPER)
    assert (config.teacher, config.stop.target_layers, len(config.tasks)) == ("Qwen/Qwen2.5-3B", 24, 7)
    saved = {name: save(tmp_path / name, *form) for name, form in FORMATS.items()}
    for task in config.tasks:
        assert task.model_extra is not None
        task.model_extra["data"] = saved[task.model_extra["data"]]
    for task in make_tasks(config.tasks):
        task.check()
        requests = task.requests(tokenizer)
        assert len(task.rows) == 6
        assert len(requests) == (24 if task.kind == "choice" else 6)
        prompt = getattr(requests[0], "context", None) or requests[0].prompt
        assert tokenizer.decode(prompt).count("\n\n") == 5


def test_the_papers_settings() -> None:
    distill = load_config(PAPER).distill
    settings = (distill.train, distill.radius, distill.learning_rate, distill.weight_decay, distill.warmup_steps)
    assert settings == ("neighbours", 1, 1e-4, 0.05, 8)
    assert (distill.tokens_per_step, distill.sequence_length, distill.max_grad_norm) == (8 * 2048, 2048, 0.3)
    losses = LossSum(distill.losses).losses
    assert losses == {"kl": KL(reduction="sum/100"), "hidden_mse": HiddenMSE(relative=False)}
