"""Tasks and groups of lm-evaluation-harness (the extra `eval`).

The harness builds the prompts and computes the metrics; `inference.engine` answers the requests, for all candidates at
once. The harness runs functions that a task's YAML names: name only tasks that you trust.
"""

from __future__ import annotations

from collections import Counter
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
from layerpeel.inference.requests import Likelihood
from layerpeel.tasks.base import Sample, Task
from layerpeel.tasks.harness_chat import chat_renderer
from layerpeel.tasks.harness_loading import HarnessTasks, build_instances, load_harness, quiet, refusing
from layerpeel.tasks.harness_requests import generation_options, request_of
from layerpeel.tasks.scores import TaskScore

OUTPUT_TYPES = ("loglikelihood", "multiple_choice", "loglikelihood_rolling", "generate_until")
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
    apply_chat_template: bool | str = False
    """Whether prompts are put into the tokenizer's chat template; or that template's name, where it has several."""
    fewshot_as_multiturn: bool = True
    """Whether each solved example is a turn of its own in a chat template, or all are part of the user's turn."""
    system_instruction: str | None = None
    """Text before each prompt; the system's turn in a chat template."""
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
            if leaf.OUTPUT_TYPE == "generate_until":
                generation_options(leaf.get_config("generation_kwargs"), f"{self._where}: {name}")
            if not len(leaf.eval_docs):
                raise InputError(f"{self._where}: {name} has no documents to test on", hint="check its dataset")
            self._metric_of(leaf)
            # One document's prompt, without the tokenizer: most of what cannot be built shows before any long work.
            self._build(leaf, lambda history, add_generation_prompt=True: history[-1]["content"], limit=1)

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
        render = chat_renderer(tokenizer, self.apply_chat_template, self._where) if self.apply_chat_template else None
        return [sample for leaf in self._loaded.leaves.values() for sample in self._samples_of(leaf, tokenizer, render)]

    def score(self, samples: Sequence[Sample], answers: Sequence[Sequence[Any]]) -> TaskScore:
        documents: list[_Document] = [sample.reference for sample in samples]
        values: dict[str, list[Any]] = {name: [] for name in self._loaded.leaves}
        counts: dict[str, Counter[str]] = {name: Counter() for name in self._loaded.leaves}
        for document, document_answers in zip(documents, answers, strict=True):
            name = document.leaf.task_name
            metric, chosen = self._metric_of(document.leaf)
            with refusing(f"{self._where}: {name}, document {document.instances[0].doc_id}: its answer has no score"):
                measured = document.measure(document_answers, chosen)
            counts[name].update(list(measured))  # of a dict, a Counter adds the values
            if metric in measured:
                values[name].append(measured[metric])
        self._check_measured(values, counts)
        sizes = {name: max(counter.values()) for name, counter in counts.items() if counter}
        score = self._aggregate({name: leaf_values for name, leaf_values in values.items() if leaf_values}, sizes)
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

    def _check_measured(self, values: dict[str, list[Any]], counts: dict[str, Counter[str]]) -> None:
        for name, leaf_values in values.items():
            if counts[name] and not leaf_values:
                raise InputError(
                    f"{self._where}: {name} gives its answers no '{self._metric_of(self._loaded.leaves[name])[0]}'",
                    hint=f"metric: one of {', '.join(sorted(counts[name]))}, if its metric_list names it",
                )

    @property
    def _where(self) -> str:
        return f"task {self.name}: {self.task}"

    @cached_property
    def _loaded(self) -> HarnessTasks:
        return load_harness(self.task, self.include_path, self.num_fewshot, self._where)

    def _build(self, leaf: Any, render: Callable[..., str] | None, limit: int | None) -> list[list[Any]]:
        """The instances of one of the harness's tasks, by document."""
        return build_instances(
            leaf,
            self._where,
            limit=limit,
            system_instruction=self.system_instruction,
            apply_chat_template=bool(self.apply_chat_template),
            fewshot_as_multiturn=self.fewshot_as_multiturn,
            chat_template=render if self.apply_chat_template else None,
        )

    def _samples_of(
        self, leaf: Any, tokenizer: PreTrainedTokenizerBase, render: Callable[..., str] | None
    ) -> Iterator[Sample]:
        """The samples of one of the harness's tasks."""
        for instances in self._build(leaf, render, self.limit):
            where = f"{self._where}: {leaf.task_name}, document {instances[0].doc_id}"
            with refusing(f"{where}: its prompt cannot be encoded"):
                requests = [request_of(instance, tokenizer, where) for instance in instances]
            yield Sample(requests, _Document(leaf, instances), f"{leaf.task_name}, document {instances[0].doc_id}")

    def _metric_of(self, leaf: Any) -> tuple[str, str]:
        """The metric and the filter by which a task is scored."""
        metrics, filters = list(leaf.aggregation()), [ensemble.name for ensemble in leaf._filters]
        metric = self.metric or (self._group_aggregation.metric if self._group_aggregation else metrics[0])
        named = self._group_aggregation.filter_list if self._group_aggregation and not self.metric else None
        chosen = self.filter or next(iter(named or filters))
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
    def _group_aggregation(self) -> Any:
        """The metric, the filters and the weights that the group names first; None where there is no such group."""
        return self._group.aggregate_metric_list[0] if self._group else None

    def _aggregate(self, values: dict[str, list[Any]], sizes: dict[str, int]) -> TaskScore:
        """The harness's own aggregation, of each task and of the group (by size, where a group does not say).

        Args:
            values: by task, its metric on each document that has it.
            sizes: by task, its documents: what the harness weighs by.
        """
        from lm_eval.api import metrics

        weighted = self._group is None or self._group_weights
        scores = [self._leaf_score(name, leaf_values) for name, leaf_values in values.items()]
        means, errors = (list(column) for column in zip(*scores, strict=True))
        leaf_sizes = [sizes[name] for name in values]
        value = metrics.aggregate_subtask_metrics(means, leaf_sizes, weighted) if len(scores) > 1 else means[0]
        first = self._loaded.leaves[next(iter(values))]
        return TaskScore(
            value,
            _pooled(errors, leaf_sizes, weighted),
            sum(map(len, values.values())),
            lower_is_better=not first.higher_is_better().get(self._metric_of(first)[0], True),
            influences=self._influences(values, sizes if weighted else None),
        )

    @property
    def _group_weights(self) -> bool:
        """Whether the group weighs by size the metric that is asked for."""
        metric = self.metric or self._group_aggregation.metric
        entries = [entry for entry in self._group.aggregate_metric_list if entry.metric == metric]
        return bool((entries or [self._group_aggregation])[0].weight_by_size)

    def _leaf_score(self, name: str, values: list[Any]) -> tuple[float, float | None]:
        """A task's score and its standard error, where the harness has one."""
        from lm_eval.api import metrics

        function = self._aggregation(name)
        error = metrics.stderr_for_metric(function, BOOTSTRAPS)
        with quiet(), refusing(f"{self._where}: {name} has no score"):
            stderr = float(error(values)) if error and len(values) > 1 else None
            return float(function(values)), stderr

    def _influences(self, values: dict[str, list[Any]], sizes: dict[str, int] | None) -> tuple[float, ...] | None:
        """What each document adds to the score; None unless every task's score is a mean over its documents."""
        from lm_eval.api import metrics

        if any(self._aggregation(name) is not metrics.mean for name in values):
            return None
        samples = [float(value) for leaf_values in values.values() for value in leaf_values]
        weights = [
            (sizes[name] if sizes else 1.0) / len(leaf_values)
            for name, leaf_values in values.items()
            for _ in leaf_values
        ]
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


def _pooled(errors: Sequence[float | None], sizes: Sequence[int], weighted: bool) -> float:
    """The standard error of a group, from those of its tasks; 0 where the harness has none for one of them."""
    from lm_eval.api import metrics

    if None in errors or len(errors) == 1:
        return errors[0] or 0.0 if len(errors) == 1 else 0.0
    return float(metrics.pooled_sample_stderr(errors, sizes) if weighted else metrics.unweighted_mean_stderr(errors))
