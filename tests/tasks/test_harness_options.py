"""What a task's YAML, a tokenizer and a generation_config ask for: every answer is that of the harness's model class.

The harness runs beside it, one request at a time: in its batches, rows that have ended go on, and may show it.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel

from layerpeel.inference.engine import Engine
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.surgery import remove_layers
from layerpeel.tasks.evaluation import answer_samples, score_tasks
from tests.families import tiny_model, tiny_tokenizer
from tests.tasks.conftest import input_error, task_of

lm_eval = pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

ROWS = [{"q": f"w{5 + i} w{9 + i} w7", "a": f"w{4 + i}", "b": f"w{20 + i} w3", "gold": i % 2} for i in range(8)]
CHAT = (
    "{% for m in messages %}w5{{ m.role[0] | replace('u', '0') | replace('a', '1') | replace('s', '2') }} "
    "{{ m.content }} {% endfor %}{% if add_generation_prompt %}w60 {% endif %}"
)
CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}}",
    "doc_to_target": "gold",
    "doc_to_choice": "{{[a, b]}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
SHOWN = CHOICE | {"num_fewshot": 2, "fewshot_split": "test"}
TEXT: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{q}}",
    "doc_to_target": "{{a}}",
    "generation_kwargs": {"until": ["w8 "], "max_gen_toks": 6},
    "metric_list": [{"metric": "exact_match"}],
}
CONTINUED: dict[str, Any] = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{q}}",
    "doc_to_target": "{{b}}",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
}
ROLLED: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{(q + ' ' + a + ' ') * 20}}",
    "metric_list": [{"metric": "word_perplexity"}],
}


def generated(**options: Any) -> dict[str, Any]:
    return TEXT | {"generation_kwargs": {"until": ["w8 "], "max_gen_toks": 6} | options}


# Name: the task's YAML, and options of `kind: harness`, which are those of `simple_evaluate`.
TASKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "examples": (SHOWN, {}),
    "first examples": (SHOWN | {"fewshot_config": {"sampler": "first_n"}}, {}),
    "examples from a list": (
        CHOICE | {"num_fewshot": 1, "fewshot_config": {"sampler": "first_n", "samples": ROWS[3:5]}},
        {},
    ),
    "examples asked for": (CHOICE | {"fewshot_split": "test"}, {"num_fewshot": 3}),
    "examples of another form": (
        SHOWN | {"fewshot_config": {"doc_to_text": "w40 {{q}}", "target_delimiter": " w41 ", "sampler": "default"}},
        {},
    ),
    "delimiters": (SHOWN | {"target_delimiter": " w9 ", "fewshot_delimiter": " w10 ", "description": "w11 w12 "}, {}),
    "listed choices": (SHOWN | {"doc_to_choice": ["w6", "w7 w8"]}, {}),
    "mapped choices": (SHOWN | {"doc_to_choice": {"no": "w6", "yes": "w7"}}, {}),
    "several right answers": (CHOICE | {"doc_to_target": "{{[0, gold]}}"}, {}),
    "several inputs": (CHOICE | {"doc_to_text": "{{gold}}", "doc_to_target": "{{b}}"}, {}),
    "mutual information": (CHOICE | {"metric_list": [{"metric": "acc_mutual_info"}]}, {}),
    "turns": (SHOWN, {"apply_chat_template": True}),
    "one turn": (SHOWN, {"apply_chat_template": True, "fewshot_as_multiturn": False}),
    "a template's name": (SHOWN, {"apply_chat_template": "mine"}),
    "turns and a system prompt": (
        SHOWN | {"description": "w13 "},
        {"apply_chat_template": True, "system_instruction": "w14 w15"},
    ),
    "a system prompt": (SHOWN, {"system_instruction": "w14 w15"}),
    "a beginning of the answer": (SHOWN | {"gen_prefix": "w16"}, {}),
    "a beginning of the answer in turns": (TEXT | {"gen_prefix": "w16"}, {"apply_chat_template": True}),
    "text in turns": (TEXT | {"num_fewshot": 2, "fewshot_split": "test"}, {"apply_chat_template": True}),
    "continued": (CONTINUED, {}),
    "nothing before": (CONTINUED | {"doc_to_text": "", "target_delimiter": ""}, {}),
    "rolled": (ROLLED, {}),
    "text": (TEXT, {}),
    "several ends": (generated(until=["w8", "w9", "</s>"]), {}),
    "one end": (generated(until="w9"), {}),
    "other names": (
        TEXT | {"generation_kwargs": {"until": [], "max_new_tokens": 4, "temperature": 0.0, "top_p": 0.9}},
        {},
    ),
    "sampling switched off": (generated(do_sample=False, temperature=0.7, top_k=3), {}),
    "a penalty": (generated(repetition_penalty=1.7, max_gen_toks=12), {}),
    "no repetition": (generated(no_repeat_ngram_size=2, max_gen_toks=12), {}),
    "repeats and filters": (
        TEXT
        | {
            "repeats": 3,
            "filter_list": [
                {"name": "vote", "filter": [{"function": "majority_vote"}, {"function": "take_first"}]},
                {
                    "name": "first",
                    "filter": [{"function": "regex", "regex_pattern": "(w[0-9]+)"}, {"function": "take_first"}],
                },
            ],
        },
        {"filter": "first"},
    ),
    "several targets": (TEXT | {"doc_to_target": "{{[a, b]}}"}, {}),
    "a long prompt": (TEXT | {"doc_to_text": "{{(q + ' ') * 40}}"}, {}),
    "a long context": (CONTINUED | {"doc_to_text": "{{(q + ' ') * 40}}"}, {}),
}


def tokenizer_of(name: str) -> Any:
    """The tiny tokenizer: as it is, adding a beginning or an end of text, or with a template that begins with one."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT if name != "chat with BOS" else "<s>" + CHAT
    parts = {"BOS": "<s> $A", "chat with BOS": "<s> $A", "EOS": "$A </s>", "both": "<s> $A </s>"}
    if name in parts:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=parts[name], special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    if name == "no BOS":
        tokenizer.bos_token = None
    return tokenizer


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """One whose greedy text is no single word."""
    model = tiny_model("llama")
    model.lm_head.weight.data *= 8
    return model


def written(folder: Path, name: str, fields: dict[str, Any]) -> str:
    """Writes a task's YAML, and returns its name."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    path = folder / f"{name.replace(' ', '_')}.yaml"
    path.write_text(yaml.safe_dump({"task": path.stem, "test_split": "test"} | source | fields))
    return path.stem


def compare(model: PreTrainedModel, tokenizer: Any, folder: Path, names: Sequence[str], **options: Any) -> None:
    """Holds every answer, score and standard error against the harness's."""
    results = harness_results(model, tokenizer, folder, names, options)
    for name in names:
        task = task_of(kind="harness", name="t", task=name, include_path=str(folder), **options)
        task.check()
        samples = task.samples(tokenizer)
        (answers,) = answer_samples(Engine(LayerwiseModel(model), tokenizer), samples, "t")
        score, logged = task.score(samples, answers), results["samples"][name]
        chosen = options.get("filter", logged[0]["filter"])
        logged = sorted((s for s in logged if s["filter"] == chosen), key=lambda sample: sample["doc_id"])
        for sample, sample_answers in zip(logged, answers, strict=True):
            for responses, answer in zip(sample["resps"], sample_answers, strict=True):
                assert same(responses[0], answer), name
        metric, scores = logged[0]["metrics"][0], results["results"][name]
        stderr = scores[f"{metric}_stderr,{chosen}"]
        assert score.value == pytest.approx(scores[f"{metric},{chosen}"], rel=1e-5)
        assert score.stderr == pytest.approx(0.0 if stderr == "N/A" else stderr, rel=1e-4, abs=1e-9)


def same(response: Any, answer: Any) -> bool:
    if isinstance(answer, str):
        return bool(response == answer)
    value = response if isinstance(response, float) else response[0]
    return math.isclose(answer.log_probability, value, abs_tol=1e-4)


def harness_results(
    model: PreTrainedModel, tokenizer: Any, folder: Path, names: Sequence[str], options: dict[str, Any]
) -> Any:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    options = {name: value for name, value in options.items() if name != "filter"}
    return lm_eval.simple_evaluate(
        lm, tasks=list(names), task_manager=manager, bootstrap_iters=100, log_samples=True, **options
    )


def by_options() -> list[Any]:
    """The tasks by their options: the harness runs once for each."""
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, (_, options) in TASKS.items():
        groups.setdefault(repr(options), (options, []))[1].append(name)
    return [pytest.param(*group, id=group[1][0]) for group in groups.values()]


@pytest.mark.parametrize(("options", "names"), by_options())
def test_a_tasks_options_are_followed_as_the_harness_does(
    model: PreTrainedModel, tmp_path: Path, options: dict[str, Any], names: list[str]
) -> None:
    compare(model, tokenizer_of("BOS"), tmp_path, [written(tmp_path, n, TASKS[n][0]) for n in names], **options)


@pytest.mark.parametrize("name", ["plain", "no BOS", "EOS", "both", "chat with BOS"])
def test_tokenizers_that_add_special_tokens_answer_as_in_the_harness(
    model: PreTrainedModel, tmp_path: Path, name: str
) -> None:
    names = [
        written(tmp_path, task, TASKS[task][0] | {"num_fewshot": 1, "fewshot_split": "test"})
        for task in ("examples", "text", "continued")
    ]
    options = {"apply_chat_template": True} if name == "chat with BOS" else {}
    if not options:
        names += [written(tmp_path, task, TASKS[task][0]) for task in ("nothing before", "rolled")]
    compare(model, tokenizer_of(name), tmp_path, names, **options)


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token_id": [2, 8, 20, 33]},
        {"repetition_penalty": 1.7, "do_sample": True, "temperature": 0.6, "top_k": 5},
        {"no_repeat_ngram_size": 1, "eos_token_id": [2, 9]},
        {"max_new_tokens": 9},
        {"suppress_tokens": list(range(3, 40))},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_the_models_generation_config_holds_as_in_the_harness(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data *= 8
    model.generation_config.update(**fields)
    compare(model, tokenizer_of("BOS"), tmp_path, [written(tmp_path, "text", generated(max_gen_toks=5))])


def test_a_penalty_holds_for_every_candidate(model: PreTrainedModel, tmp_path: Path) -> None:
    name, tokenizer = written(tmp_path, "penalty", TASKS["a penalty"][0]), tokenizer_of("BOS")
    task = task_of(kind="harness", name="t", task=name, include_path=str(tmp_path))
    samples = task.samples(tokenizer)
    branches = answer_samples(Engine(LayerwiseModel(model), tokenizer, [1, 4]), samples, "t")
    for branch, removed in zip(branches[1:], (1, 4), strict=True):
        shorter = remove_layers(copy.deepcopy(model), [removed])
        logged = harness_results(shorter, tokenizer, tmp_path, [name], {})["samples"][name]
        assert [answers[0] for answers in branch] == [sample["resps"][0][0] for sample in logged]


def test_groups_have_the_weights_filters_and_errors_of_the_harness(model: PreTrainedModel, tmp_path: Path) -> None:
    names = [written(tmp_path, name, TASKS[name][0]) for name in ("examples", "continued", "repeats and filters")]
    few = yaml.safe_load((tmp_path / "examples.yaml").read_text()) | {"task": "few", "num_fewshot": 0}
    (tmp_path / "five.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:5]))
    few["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "five.jsonl")}}
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {
        "sized": (["examples", "few"], {"metric": "acc"}),
        "even": (["examples", "few"], {"metric": "acc_norm", "weight_by_size": False}),
        "mixed": (["examples", "few", "continued"], {"metric": "acc"}),
        "filtered": (names[2:], {"metric": "exact_match", "filter_list": ["first"]}),
    }
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(few))
    for name, (tasks, metric) in groups.items():
        group = {"group": name, "task": tasks, "aggregate_metric_list": [metric]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(group))
    for name, (_, metric) in groups.items():
        results = harness_results(model, tokenizer_of("BOS"), tmp_path, [name], {})["results"]
        key = f"{metric['metric']},{metric.get('filter_list', ['none'])[0]}"
        task = task_of(kind="harness", name="t", task=name, include_path=str(tmp_path))
        task.check()
        score = score_tasks(Engine(LayerwiseModel(model), tokenizer_of("BOS")), [task])[0]["t"]
        assert score.value == pytest.approx(results[name][key], rel=1e-6)
        assert score.stderr == pytest.approx(results[name][key.replace(",", "_stderr,")], rel=1e-6)


def test_a_metric_that_only_some_documents_have_is_averaged_over_those(model: PreTrainedModel, tmp_path: Path) -> None:
    name = written(tmp_path, "some", CHOICE | {"num_fewshot": 0})
    (tmp_path / "measures.py").write_text(
        "def measure(doc, results):\n"
        "    right = float(results[doc['gold']][0] >= max(value for value, _ in results))\n"
        "    return {'acc': right} if doc['gold'] else {'acc_norm': 0.0}\n"
        "def fail(doc, results):\n    raise KeyError('label')\n"
    )
    path = tmp_path / f"{name}.yaml"
    text = path.read_text()
    path.write_text(text + "process_results: !function measures.measure\n")
    compared = harness_results(model, tokenizer_of("BOS"), tmp_path, [name], {})["results"][name]
    task = task_of(kind="harness", name="t", task=name, include_path=str(tmp_path))
    score = score_tasks(Engine(LayerwiseModel(model), tokenizer_of("BOS")), [task])[0]["t"]
    assert (score.value, score.n) == (compared["acc,none"], 4)
    path.write_text(text + "process_results: !function measures.fail\n")
    task = task_of(kind="harness", name="t", task=name, include_path=str(tmp_path))
    message, _ = input_error(lambda: score_tasks(Engine(LayerwiseModel(model), tokenizer_of("BOS")), [task]))
    assert message == "task t: some: some, document 0: its answer has no score (KeyError: 'label')"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.6}, "draws samples (temperature: 0.6); answers here are greedy"),
        ({"do_sample": True}, "draws samples (do_sample: True); answers here are greedy"),
        ({"num_beams": 3}, "generation_kwargs: num_beams is 3, which cannot be followed here"),
        ({"max_length": 20}, "generation_kwargs: max_length is 20, which cannot be followed here"),
        ({"min_new_tokens": 2}, "generation_kwargs: min_new_tokens is 2, which cannot be followed here"),
        ({"until": ["w8", ""]}, "generation_kwargs: until is ['w8', ''], expected texts that are not empty"),
        ({"max_gen_toks": 0}, "generation_kwargs: max_gen_toks is 0"),
        ({"max_gen_toks": "many"}, "generation_kwargs: invalid literal for int() with base 10: 'many'"),
    ],
)
def test_options_that_cannot_be_followed_are_refused_by_name(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    name = written(tmp_path, "text", generated(**options))
    task = task_of(kind="harness", name="t", task=name, include_path=str(tmp_path))
    assert message in input_error(task.check)[0]


def test_what_a_model_cannot_answer_is_refused_by_name(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tokenizer_of("BOS")

    def refusal(fields: dict[str, Any], **options: Any) -> str:
        name = written(tmp_path, "text", fields)
        task = task_of(kind="harness", name="t", task=name, include_path=str(tmp_path), **options)
        return input_error(lambda: score_tasks(Engine(LayerwiseModel(model), tokenizer), [task]))[0]

    without = {name: value for name, value in TEXT.items() if name != "generation_kwargs"}
    assert refusal(without) == (
        "task t: max_gen_toks is 256, but the model's context has 64 tokens, which leaves none for the prompt"
    )
    assert "its continuation '' has no token of its own" in refusal(CONTINUED | {"doc_to_target": ""})
    assert "its prompts cannot be built (ValueError: Sample larger than population" in refusal(SHOWN, num_fewshot=20)
    model.generation_config.num_beams = 4
    assert "the model's generation_config sets num_beams to 4, which lm-evaluation-harness" in refusal(TEXT)
    tokenizer.chat_template = {"default": CHAT, "tools": CHAT}
    message = refusal(SHOWN, apply_chat_template="tools")
    assert message.endswith("of several templates, lm-evaluation-harness applies only the one named 'default'")
    tokenizer.chat_template = None
    assert refusal(SHOWN, apply_chat_template=True).endswith("apply_chat_template: the tokenizer has no chat template")


def test_examples_are_the_same_whenever_the_prompts_are_built(tmp_path: Path) -> None:
    name = written(tmp_path, "shown", SHOWN)
    task, tokenizer = task_of(kind="harness", name="t", task=name, include_path=str(tmp_path)), tokenizer_of("BOS")
    assert [s.requests for s in task.samples(tokenizer)] == [s.requests for s in task.samples(tokenizer)]
