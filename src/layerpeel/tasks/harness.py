"""Tasks and groups of lm-evaluation-harness (the extra `eval`).

The harness builds the prompts and computes the metrics; the requests are answered here, for all candidates at once.
Functions that a task's YAML names are run by the harness here too: name only tasks that you trust.
"""

from __future__ import annotations

import difflib
import importlib.util
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr
from transformers import PreTrainedTokenizerBase

from layerpeel.errors import InputError
from layerpeel.inference.encoding import encode, encode_pair, start_token
from layerpeel.inference.requests import Generation, Likelihood, LogLikelihood, Request
from layerpeel.tasks.base import Task
from layerpeel.tasks.scores import TaskScore

OUTPUT_TYPES = ("loglikelihood", "multiple_choice", "loglikelihood_rolling", "generate_until")
MAX_NEW_TOKENS = 256  # the harness's own default
BOOTSTRAPS = 100  # for the few metrics that have no closed form
FEWSHOT_SEED = 1234  # the harness's own default


class Harness(Task):
    """A task, a group, a tag or a YAML file of lm-evaluation-harness, with the harness's own score."""

    task: str
    """A name that the harness knows, or the path of a task's YAML file."""
    include_path: str | None = None
    """A folder with more YAML files; that of the file, if `task` is one."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Solved examples to show; the task's own number if not given."""
    apply_chat_template: bool = False
    """Whether prompts are put into the tokenizer's chat template."""
    metric: str | None = None
    """Which of its metrics; the first if not given."""
    filter: str | None = None
    """Which of its filters; the first if not given."""

    _documents: list[_Document] = PrivateAttr(default_factory=list)

    def check(self) -> None:
        for name, leaf in self._loaded["tasks"].items():
            if leaf.OUTPUT_TYPE not in OUTPUT_TYPES:
                raise InputError(
                    f"{self._where}: {name} is of output type '{leaf.OUTPUT_TYPE}'",
                    hint=f"tasks of these types can be answered: {', '.join(OUTPUT_TYPES)}",
                )
            if getattr(leaf, "UNSAFE_CODE", False) or getattr(leaf, "MULTIMODAL", False):
                raise InputError(
                    f"{self._where}: {name} runs generated code, or asks about pictures or sound",
                    hint="leave it out",
                )
            if (leaf.get_config("generation_kwargs") or {}).get("do_sample"):
                raise InputError(f"{self._where}: {name} draws samples; answers here are greedy", hint="leave it out")
            if not len(leaf.eval_docs):
                raise InputError(f"{self._where}: {name} has no documents to test on", hint="check its dataset")
            self._metric_of(leaf)

    def requests(self, tokenizer: PreTrainedTokenizerBase) -> list[list[Request]]:
        self._documents = [
            document for leaf in self._loaded["tasks"].values() for document in self._ask(leaf, tokenizer)
        ]
        return [document.requests for document in self._documents]

    def score(self, answers: Mapping[int, Sequence[Any]]) -> TaskScore:
        values: dict[str, list[Any]] = {name: [] for name in self._loaded["tasks"]}
        for sample, own in answers.items():
            document = self._documents[sample]
            metric, chosen = self._metric_of(document.leaf)
            values[document.leaf.task_name].append(document.measure(own, chosen)[metric])
        score = self._aggregate({name: own for name, own in values.items() if own})
        return replace(score, chance=self._chance([self._documents[sample] for sample in answers]))

    def _chance(self, documents: Sequence[_Document]) -> float | None:
        """What guessing would score: known where all documents are of one multiple-choice task, scored by accuracy."""
        leaf = documents[0].leaf
        metrics = leaf.aggregation()
        alone = all(document.leaf is leaf for document in documents)
        if leaf.OUTPUT_TYPE != "multiple_choice" or "acc_mutual_info" in metrics or not alone:
            return None
        if self._metric_of(leaf)[0] not in ("acc", "acc_norm"):
            return None
        return sum(1 / len(document.requests) for document in documents) / len(documents)

    @property
    def _where(self) -> str:
        return f"task {self.name}: {self.task}"

    @cached_property
    def _loaded(self) -> dict[str, Any]:
        """`tasks` and `groups` by name, their datasets read.

        Raises:
            InputError: the harness is not installed or knows no such task, or the data cannot be read.
        """
        if not importlib.util.find_spec("lm_eval"):
            raise InputError(
                f"{self._where}: lm-evaluation-harness is not installed", hint="pip install 'layerpeel[eval]'"
            )
        is_file = Path(self.task).suffix in (".yaml", ".yml")
        folder = self.include_path or (str(Path(self.task).parent) if is_file else None)
        with _quiet():
            manager = _manager(folder, defaults=False)
            if not is_file and self.task not in manager.all_tasks:
                manager = _manager(folder, defaults=True)
            if not is_file and self.task not in manager.all_tasks:
                close = difflib.get_close_matches(self.task, manager.all_tasks, n=3)
                raise InputError(
                    f"{self._where}: lm-evaluation-harness knows no such task"
                    + (f"; did you mean {' or '.join(close)}?" if close else ""),
                    hint="`lm-eval ls tasks` lists them; name your own by their YAML file, or by include_path",
                )
            try:
                loaded: dict[str, Any] = dict(manager.load(self.task))
                for leaf in loaded["tasks"].values():
                    _remember_templates(leaf)
                    if self.num_fewshot is not None and leaf.get_config("num_fewshot") != 0:  # as the harness does
                        leaf.set_config(key="num_fewshot", value=self.num_fewshot)
                    leaf.set_fewshot_seed(seed=FEWSHOT_SEED)
            except Exception as error:
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise InputError(
                    f"{self._where}: its data or definition cannot be loaded ({reason})",
                    hint="check the task's files, the network and your access; datasets that are scripts are no longer "
                    "loaded by `datasets`",
                ) from None
        return loaded

    def _ask(self, leaf: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[_Document]:
        """Each document of a task, with its requests."""

        def chat(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return tokenizer.apply_chat_template(
                history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        options: dict[str, Any] = {}
        if self.apply_chat_template:
            options = {"apply_chat_template": True, "chat_template": chat, "tokenizer_name": tokenizer.name_or_path}
        with _quiet():
            leaf.build_all_requests(limit=self.limit, rank=0, world_size=1, **options)
        by_document: dict[int, list[Any]] = {}
        for instance in leaf.instances:
            by_document.setdefault(instance.doc_id, []).append(instance)
        for instances in by_document.values():
            instances.sort(key=lambda instance: instance.idx)
            yield _Document(leaf, instances, [_request_of(instance, tokenizer) for instance in instances])

    def _metric_of(self, leaf: Any) -> tuple[str, str]:
        """The metric and the filter by which a task is scored."""
        metrics, filters = list(leaf.aggregation()), [ensemble.name for ensemble in leaf._filters]
        metric, chosen = self.metric or self._group_metric or metrics[0], self.filter or filters[0]
        if metric not in metrics or chosen not in filters:
            kind, name, there = ("metric", metric, metrics) if metric not in metrics else ("filter", chosen, filters)
            raise InputError(
                f"{self._where}: {leaf.task_name} has no {kind} '{name}'", hint=f"it has {', '.join(there)}"
            )
        return metric, chosen

    @property
    def _group(self) -> Any:
        """The group that was asked for, if it says how to aggregate."""
        group = self._loaded["groups"].get(self.task) or next(iter(self._loaded["groups"].values()), None)
        return group if group is not None and group.has_aggregation else None

    @property
    def _group_metric(self) -> str | None:
        return self._group.aggregate_metric_list[0].metric if self._group else None

    def _aggregate(self, values: dict[str, list[Any]]) -> TaskScore:
        """The harness's own aggregation, of each task and of the group (by size, where a group does not say)."""
        from lm_eval.api import metrics

        leaves, scores = self._loaded["tasks"], {}
        weighted = self._group is None or self._group.aggregate_metric_list[0].weight_by_size
        samples: list[float] = []
        weights: list[float] = []
        for name, own in values.items():
            metric, _ = self._metric_of(leaves[name])
            function = leaves[name].aggregation()[metric]
            error = metrics.stderr_for_metric(function, BOOTSTRAPS)
            with _quiet():
                stderr = error(own) if error and len(own) > 1 else 0.0
            scores[name] = (float(function(own)), float(stderr), len(own))
            if function is metrics.mean:
                samples += map(float, own)
                weights += [1.0 if weighted else 1 / len(own)] * len(own)
        means, errors, sizes = (list(column) for column in zip(*scores.values(), strict=True))
        value = metrics.aggregate_subtask_metrics(means, sizes, weighted) if len(scores) > 1 else means[0]
        pooled = metrics.pooled_sample_stderr if weighted else lambda errors, _: metrics.unweighted_mean_stderr(errors)
        first = leaves[next(iter(values))]
        apart = len(samples) == sum(sizes)  # every task's score is a mean over its samples
        return TaskScore(
            value,
            pooled(errors, sizes) if len(scores) > 1 else errors[0],
            sum(sizes),
            lower_is_better=not first.higher_is_better().get(self._metric_of(first)[0], True),
            influences=TaskScore.of_mean(samples, weights).influences if apart else None,
        )


def _remember_templates(leaf: Any) -> None:
    """Lets a task render each template once a document: the harness renders them anew for every model it scores."""
    for name in ("doc_to_text", "doc_to_choice", "doc_to_target"):
        setattr(leaf, name, _once_a_document(getattr(leaf, name)))


def _once_a_document(render: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[tuple[Any, ...], tuple[Any, Any]] = {}  # holds the document too, so that no other can get its id

    def once(doc: Any, *args: Any, **options: Any) -> Any:
        key = (id(doc), args, tuple(options.items()))
        if key not in known:
            known[key] = (doc, render(doc, *args, **options))
        return known[key][1]

    return once


@cache
def _manager(folder: str | None, *, defaults: bool) -> Any:
    """The harness's index of tasks; that of its own takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=defaults)


@dataclass
class _Document:
    """A document of a task: its instances (the harness's requests), and what each became here."""

    leaf: Any
    instances: list[Any]
    requests: list[Request]

    def measure(self, answers: Sequence[Any], chosen: str) -> dict[str, Any]:
        """The document's metrics, from the answers to its requests."""
        for instance, answer in zip(self.instances, answers, strict=True):
            response: Any = answer
            if isinstance(answer, Likelihood):
                rolling = instance.request_type == "loglikelihood_rolling"
                response = answer.log_probability if rolling else tuple(answer)
            instance.resps, instance.filtered_resps = [response] * (instance.repeats or 1), {}
        next(ensemble for ensemble in self.leaf._filters if ensemble.name == chosen).apply(self.instances)
        found: dict[str, Any] = self.leaf.process_results(
            self.instances[0].doc, [instance.filtered_resps[chosen] for instance in self.instances]
        )
        return found


def _request_of(instance: Any, tokenizer: PreTrainedTokenizerBase) -> Request:
    """What the harness's own model class for transformers would run for an instance."""
    if instance.request_type == "generate_until":
        from lm_eval.models.utils import normalize_gen_kwargs

        prompt, options = instance.args
        options = normalize_gen_kwargs(options, MAX_NEW_TOKENS)
        stops = tuple(stop for stop in (*options["until"], tokenizer.eos_token) if stop)
        return Generation(tuple(encode(tokenizer, prompt)), options["max_gen_toks"], stops)
    if instance.request_type == "loglikelihood_rolling":
        return LogLikelihood((start_token(tokenizer),), tuple(encode(tokenizer, instance.args[0])))
    return LogLikelihood(*encode_pair(tokenizer, *instance.args))


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness logs and draws bars for every step; ours say what matters."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
