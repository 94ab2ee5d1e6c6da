"""Tasks and groups of lm-evaluation-harness (the extra `eval`).

The harness builds the prompts and computes the metrics; `inference.engine` answers the requests, for all candidates at
once. The harness runs functions that a task's YAML names: name only tasks that you trust.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Annotated, Any

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from layerpeel.config.fields import AS_COUNT
from layerpeel.data.digests import digest_of_rows
from layerpeel.errors import InputError
from layerpeel.inference.encoding import encode, encode_pair, start_token
from layerpeel.inference.requests import Generation, Likelihood, LogLikelihood, Request
from layerpeel.tasks.base import Sample, Task
from layerpeel.tasks.harness_loading import HarnessTasks, load_harness, quiet
from layerpeel.tasks.scores import TaskScore

OUTPUT_TYPES = ("loglikelihood", "multiple_choice", "loglikelihood_rolling", "generate_until")
MAX_NEW_TOKENS = 256  # the harness's own default
PLACES = ("dataset_path", "dataset_kwargs", "metadata")  # in a definition: where its data are, and notes
BOOTSTRAPS = 100  # for the few metrics that have no closed form


class Harness(Task):
    """A task, a group, a tag or a YAML file of lm-evaluation-harness, with the harness's own score."""

    task: str
    """A name that the harness knows, or the path of a task's YAML file."""
    include_path: str | None = None
    """A folder with more YAML files; that of the file, if `task` is one."""
    num_fewshot: Annotated[int, Field(ge=0), AS_COUNT] | None = None
    """Solved examples to show; the task's own number if not given."""
    apply_chat_template: bool = False
    """Whether prompts are put into the tokenizer's chat template."""
    metric: str | None = None
    """Which of its metrics; the first if not given."""
    filter: str | None = None
    """Which of its filters; the first if not given."""

    def check(self) -> None:
        for name, leaf in self._loaded.leaves.items():
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

    def digest(self) -> str | None:
        """Of the documents, those to show included, and of what the tasks' definitions say."""
        rows: list[Any] = []
        for name, leaf in self._loaded.leaves.items():
            shown = leaf.fewshot_docs() if leaf.get_config("num_fewshot") else None
            definition = {key: value for key, value in leaf.dump_config().items() if key not in PLACES}
            rows += [name, definition, *(shown or []), None, *islice(leaf.eval_docs, self.limit)]
        return digest_of_rows(rows)

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        """One sample a document; its reference is its `_Document`."""
        return [sample for leaf in self._loaded.leaves.values() for sample in self._samples_of(leaf, tokenizer)]

    def score(self, samples: Sequence[Sample], answers: Sequence[Sequence[Any]]) -> TaskScore:
        documents: list[_Document] = [sample.reference for sample in samples]
        values: dict[str, list[Any]] = {name: [] for name in self._loaded.leaves}
        for document, document_answers in zip(documents, answers, strict=True):
            metric, chosen = self._metric_of(document.leaf)
            values[document.leaf.task_name].append(document.measure(document_answers, chosen)[metric])
        score = self._aggregate({name: leaf_values for name, leaf_values in values.items() if leaf_values})
        return replace(score, chance=self._chance(documents))

    def _chance(self, documents: Sequence[_Document]) -> float | None:
        """What guessing would score: known if all documents are of one multiple-choice task, scored by accuracy."""
        leaf = documents[0].leaf
        metrics = leaf.aggregation()
        one_task = all(document.leaf is leaf for document in documents)
        if leaf.OUTPUT_TYPE != "multiple_choice" or "acc_mutual_info" in metrics or not one_task:
            return None
        if self._metric_of(leaf)[0] not in ("acc", "acc_norm"):
            return None
        return sum(1 / len(document.instances) for document in documents) / len(documents)

    @property
    def _where(self) -> str:
        return f"task {self.name}: {self.task}"

    @cached_property
    def _loaded(self) -> HarnessTasks:
        return load_harness(self.task, self.include_path, self.num_fewshot, self._where)

    def _samples_of(self, leaf: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[Sample]:
        """The samples of one of the harness's tasks."""

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
        with quiet():
            leaf.build_all_requests(limit=self.limit, rank=0, world_size=1, **options)
        by_document: dict[int, list[Any]] = {}
        for instance in leaf.instances:
            by_document.setdefault(instance.doc_id, []).append(instance)
        for instances in by_document.values():
            instances.sort(key=lambda instance: instance.idx)
            yield Sample([_request_of(instance, tokenizer) for instance in instances], _Document(leaf, instances))

    def _metric_of(self, leaf: Any) -> tuple[str, str]:
        """The metric and the filter by which a task is scored."""
        metrics, filters = list(leaf.aggregation()), [ensemble.name for ensemble in leaf._filters]
        metric, chosen = self.metric or self._group_metric or metrics[0], self.filter or filters[0]
        if metric not in metrics or chosen not in filters:
            kind, name, names = ("metric", metric, metrics) if metric not in metrics else ("filter", chosen, filters)
            raise InputError(
                f"{self._where}: {leaf.task_name} has no {kind} '{name}'", hint=f"it has {', '.join(names)}"
            )
        return metric, chosen

    @property
    def _group(self) -> Any:
        """The group that `task` names, if it says how to aggregate."""
        groups = self._loaded.groups
        group = groups.get(self.task) or next(iter(groups.values()), None)
        return group if group is not None and group.has_aggregation else None

    @property
    def _group_metric(self) -> str | None:
        return self._group.aggregate_metric_list[0].metric if self._group else None

    def _aggregate(self, values: dict[str, list[Any]]) -> TaskScore:
        """The harness's own aggregation, of each task and of the group (by size, where a group does not say).

        Args:
            values: by task, its metric on each document.
        """
        from lm_eval.api import metrics

        weighted = self._group is None or self._group.aggregate_metric_list[0].weight_by_size
        scores = [self._leaf_score(name, leaf_values) for name, leaf_values in values.items()]
        means, errors, sizes = (list(column) for column in zip(*scores, strict=True))
        value = metrics.aggregate_subtask_metrics(means, sizes, weighted) if len(scores) > 1 else means[0]
        pooled = metrics.pooled_sample_stderr if weighted else lambda errors, _: metrics.unweighted_mean_stderr(errors)
        first = self._loaded.leaves[next(iter(values))]
        return TaskScore(
            value,
            pooled(errors, sizes) if len(scores) > 1 else errors[0],
            sum(sizes),
            lower_is_better=not first.higher_is_better().get(self._metric_of(first)[0], True),
            influences=self._influences(values, weighted),
        )

    def _leaf_score(self, name: str, values: list[Any]) -> tuple[float, float, int]:
        """A task's score, its standard error, and the number of its documents."""
        from lm_eval.api import metrics

        function = self._aggregation(name)
        error = metrics.stderr_for_metric(function, BOOTSTRAPS)
        with quiet():
            stderr = error(values) if error and len(values) > 1 else 0.0
        return float(function(values)), float(stderr), len(values)

    def _influences(self, values: dict[str, list[Any]], weighted: bool) -> tuple[float, ...] | None:
        """What each document adds to the score; None unless every task's score is a mean over its documents."""
        from lm_eval.api import metrics

        if any(self._aggregation(name) is not metrics.mean for name in values):
            return None
        samples = [float(value) for leaf_values in values.values() for value in leaf_values]
        weights = [1.0 if weighted else 1 / len(leaf_values) for leaf_values in values.values() for _ in leaf_values]
        return TaskScore.of_mean(samples, weights).influences

    def _aggregation(self, name: str) -> Callable[[list[Any]], float]:
        leaf = self._loaded.leaves[name]
        function: Callable[[list[Any]], float] = leaf.aggregation()[self._metric_of(leaf)[0]]
        return function


@dataclass
class _Document:
    """A document of one of the harness's tasks, and its instances (the harness's requests), one a request."""

    leaf: Any
    instances: list[Any]

    def measure(self, answers: Sequence[Any], chosen: str) -> dict[str, Any]:
        """The document's metrics, from the answers to its requests and the name of a filter."""
        for instance, answer in zip(self.instances, answers, strict=True):
            response: Any = answer
            if isinstance(answer, Likelihood):
                rolling = instance.request_type == "loglikelihood_rolling"
                response = answer.log_probability if rolling else tuple(answer)
            instance.resps, instance.filtered_resps = [response] * (instance.repeats or 1), {}
        next(ensemble for ensemble in self.leaf._filters if ensemble.name == chosen).apply(self.instances)
        metrics: dict[str, Any] = self.leaf.process_results(
            self.instances[0].doc, [instance.filtered_resps[chosen] for instance in self.instances]
        )
        return metrics


def _request_of(instance: Any, tokenizer: PreTrainedTokenizerBase) -> Request:
    """The request that the harness's own model class for transformers (HFLM) would run for an instance."""
    if instance.request_type == "generate_until":
        from lm_eval.models.utils import normalize_gen_kwargs

        prompt, options = instance.args
        options = normalize_gen_kwargs(options, MAX_NEW_TOKENS)
        stops = tuple(stop for stop in (*options["until"], tokenizer.eos_token) if stop)
        return Generation(tuple(encode(tokenizer, prompt)), options["max_gen_toks"], stops)
    if instance.request_type == "loglikelihood_rolling":
        return LogLikelihood((start_token(tokenizer),), tuple(encode(tokenizer, instance.args[0])))
    return LogLikelihood(*encode_pair(tokenizer, *instance.args))
