"""What a first config measures quality on: harness tasks where they can be had, and text that is held out."""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from layerpeel.config.fields import TeacherTextConfig, TextConfig
from layerpeel.config.run import RunConfig, TaskConfig
from layerpeel.data.chats import write_chat
from layerpeel.data.documents import PlacedDocument, held_out_documents, read_documents
from layerpeel.errors import InputError
from layerpeel.inference.beginnings import Beginnings
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.requests import LogLikelihood, Request
from layerpeel.inference.sampling import Sampler
from layerpeel.model.loading import load_teacher
from layerpeel.processes.progress import progress
from layerpeel.storage.files import write_whole
from layerpeel.tasks.perplexity import Perplexity
from layerpeel.tasks.registry import make_tasks

# Tasks of lm-evaluation-harness, by the parameters from which a model is above chance in them.
HARNESS = {
    "piqa": 0.0,
    "arc_easy": 0.0,
    "hellaswag": 1e8,
    "lambada_openai": 1e8,
    "arc_challenge": 1e9,
    "winogrande": 1e9,
}
MOST_ROWS = 200  # of each task of the harness
HELD_OUT, SAMPLED = 64, 32  # documents of the user's that are held out, about; that the teacher writes, at most
LEAST_EVERY = 10  # of so many documents, one is held out at the most
READ = 4096  # documents of the text by which it is decided how many are held out
CHARACTERS = 2000  # of a document that is held out, at most
NOT_THE_RUNS_SEED = 2**32  # of the teacher's held-out text: a config's seed is below


@dataclass(frozen=True)
class Measure:
    """A task for a config.

    Attributes:
        fields: in the config, but for `limit`.
        requests: of each sample.
    """

    fields: Mapping[str, Any]
    requests: Sequence[Sequence[Request]]

    def first(self, limit: int) -> list[Request]:
        """The requests of the first samples."""
        return [request for sample in self.requests[:limit] for request in sample]


def harness_measures(parameters: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Measure], str | None]:
    """Tasks of the harness that fit a model's size; and why there are not more, where some could not be had."""
    if not importlib.util.find_spec("lm_eval"):
        return [], "lm-evaluation-harness is not installed (pip install 'layerpeel[eval]')"
    measures: list[Measure] = []
    for name in (name for name, least in HARNESS.items() if parameters >= least):
        fields = {"name": name, "kind": "harness", "task": name}
        (task,) = make_tasks([TaskConfig.model_validate({**fields, "limit": MOST_ROWS})])
        try:
            task.check()
            measures.append(Measure(fields, [sample.requests for sample in task.samples(tokenizer)]))
        except InputError as error:  # without a network, the next ones would fail as slowly
            return measures, str(error)
    return measures, None


def hold_out_every(text: str) -> int:
    """Of how many documents of a text one is held out.

    Raises:
        InputError: there is no text, or one document alone, of which nothing can be held out.
    """
    documents = sum(1 for _ in islice(read_documents(TextConfig(path=text)), READ))
    if documents < 2:
        raise InputError(
            f"--text {text}: it holds one document, and one has to be held out to measure on",
            hint="in a .txt file, a line <|endoftext|> ends a document; or give a folder of several files",
        )
    return max(LEAST_EVERY, math.ceil(documents / HELD_OUT))


def held_out_texts(source: TextConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The beginnings of the documents that a source holds out."""
    wanted = islice(held_out_documents(source), HELD_OUT)
    return [_as_text(placed, tokenizer)[:CHARACTERS] for placed in wanted]


def _as_text(placed: PlacedDocument, tokenizer: PreTrainedTokenizerBase) -> str:
    where, document = placed
    if isinstance(document, str):
        return document
    if isinstance(document, list):
        return write_chat(document, tokenizer, where)
    return str(tokenizer.decode(document, skip_special_tokens=True))


def sampled_texts(settings: RunConfig, documents: int) -> list[str]:
    """Documents that the teacher writes, which are none of those that it writes for a run; loads the teacher.

    Raises:
        InputError: the teacher cannot be loaded, has nothing to begin with, or writes nothing.
    """
    model, tokenizer = load_teacher(settings)
    length = settings.distill.sequence_length
    beginnings = Beginnings(TeacherTextConfig(), [], tokenizer, length, NOT_THE_RUNS_SEED)
    sampler = Sampler(LayerwiseModel(model), tokenizer, length, seed=NOT_THE_RUNS_SEED)
    with progress("held-out text from the teacher", documents * length) as advance:
        written = sampler.sample([beginnings.of(number) for number in range(documents)], range(documents), advance)
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in written]
    texts = [text for text in texts if tokenizer.encode(text, add_special_tokens=False)]
    if not texts:
        raise InputError(
            f"{settings.teacher}: it writes nothing by itself, so there is no text to heal and to measure it on",
            hint="give text: --text FOLDER",
        )
    return texts


def text_measure(fields: Mapping[str, Any], texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Measure:
    """The task of the perplexity of texts that are in no file yet."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "held-out.jsonl"
        write_texts(file, texts)
        (task,) = make_tasks([TaskConfig.model_validate({**fields, "data": str(file)})])
        task.check()
        return Measure(fields, [sample.requests for sample in task.samples(tokenizer)])


def measure_to_be_written(fields: Mapping[str, Any], length: int) -> Measure:
    """The task of the perplexity of text that the teacher has yet to write: its documents are at most so long."""
    return Measure(fields, [[LogLikelihood((0,), (0,) * (length - 1))]] * SAMPLED)


def held_out_fields(place: str, length: int) -> dict[str, Any]:
    """Of the task of the perplexity of held-out text, in windows that are no longer than rows."""
    window = {"sequence_length": length - 1} if length < Perplexity.model_fields["sequence_length"].default else {}
    return {"name": "held_out", "kind": "perplexity", "data": place, **window}


def write_texts(file: Path, texts: Sequence[str]) -> None:
    """Writes texts as rows."""
    write_whole(file, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
