"""Text that the teacher writes: sampled in shards, kept in a folder, and read from there like any other text.

What a shard holds follows from the options and the first shard alone. So a text that was interrupted, or that several
processes share, is the same to the last bit as one that a single process writes without a break, on the same machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.config.fields import TeacherTextConfig, TextConfig, TextSource
from layerpeel.data.token_documents import (
    MARKER,
    TokenText,
    find_token_text,
    read_documents_in,
    read_token_documents,
    vocabulary_digest,
    write_documents,
)
from layerpeel.data.tokenizing import mean_length
from layerpeel.inference.beginnings import Beginnings
from layerpeel.inference.budget import Budget
from layerpeel.inference.degeneration import TextSigns, signs_of
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.sampling import Sampler
from layerpeel.processes.distributed import gather, processes_of, wait_for_all
from layerpeel.processes.progress import Advance, console, progress
from layerpeel.processes.text import count, duration
from layerpeel.storage.files import json_digest, remove_paths
from layerpeel.storage.outputs import check_space

FORM = 1  # of the text; another one is written anew
FIRST = 64  # documents of the first shard, by which the others are sized
SHARD, LEAST_SHARDS = 2**17, 4  # tokens of a shard, about; and how many shards there are, at least
MOST_TOKENS = 50_000_000  # of a text whose config does not say how many
SAMPLES, SAMPLE_LENGTH = 4, 600  # documents that are shown, and characters of each
LONG = 60  # seconds, of which it is worth to say so


@dataclass(frozen=True)
class WrittenText:
    """A complete text of the teacher's.

    Attributes:
        folder: where it is.
        text: what it says of itself.
        tokens_per_second: at which it was written, by the processes that completed it; 0 where all was there.
        beginnings: of its documents.
        ends: tokens that end one.
        tokenizer: the teacher's.
    """

    folder: Path
    text: TokenText
    tokens_per_second: float
    beginnings: Beginnings
    ends: Collection[int]
    tokenizer: PreTrainedTokenizerBase

    def signs(self) -> TextSigns:
        """What it is like; reads all of it."""
        documents = enumerate(read_token_documents(self.folder))
        return signs_of((ids[len(self.beginnings.of(number)) :].tolist() for number, ids in documents), self.ends)

    def samples(self) -> list[str]:
        """The beginnings of a few documents."""
        documents = islice(read_token_documents(self.folder), 0, None, max(1, self.text.documents // SAMPLES))
        return [str(self.tokenizer.decode(ids))[:SAMPLE_LENGTH] for ids in islice(documents, SAMPLES)]


class TeacherWriter:
    """Writes the texts of one teacher, each in a folder `teacher-HASH`, the hash being that of all that it depends on.

    Args:
        folder: for the texts.
        teacher: which one it is, in whatever JSON can hold.
        length: tokens of a document, at most.
        tokens: of all text that a training reads; what a source of the teacher's has of it, by its weight, is written
            where the source does not say how much.
        memory: bytes for a batch; as for scoring if None.
    """

    def __init__(
        self,
        model: PreTrainedModel | LayerwiseModel,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        *,
        teacher: Any,
        length: int,
        tokens: int,
        seed: int = 0,
        memory: int | None = None,
    ) -> None:
        self.layerwise = model if isinstance(model, LayerwiseModel) else LayerwiseModel(model)
        self.tokenizer, self.folder, self.teacher = tokenizer, folder, teacher
        self.length, self.tokens, self.seed = length, tokens, seed
        self.budget = Budget(memory, self.layerwise.device)
        self.written: dict[Path, WrittenText] = {}

    def resolve(self, sources: Sequence[TextSource]) -> list[TextSource]:
        """The sources, with each of the teacher's replaced by the folder of its text, which is written if need be.

        Raises:
            InputError: there is nothing for a document to begin with; or the disk has no room.
            RunError: the model gives NaN or infinity, or memory does not suffice.
            Interrupted: a stop was asked for; shards that are complete are kept.
        """
        return [
            self._folder_of(source, sources) if isinstance(source, TeacherTextConfig) else source for source in sources
        ]

    def _folder_of(self, source: TeacherTextConfig, sources: Sequence[TextSource]) -> TextConfig:
        tokens = tokens_of(source, sources, self.tokens, self._length_of)
        beginnings = Beginnings(source, sources, self.tokenizer, self.length, self.seed)
        text = _Text(self, source, beginnings, tokens)
        if text.folder not in self.written:
            self.written[text.folder] = text.complete()
        return TextConfig(path=str(text.folder), weight=source.weight)

    def _length_of(self, source: TextSource) -> float:
        """Tokens of a document of a source; of the teacher's, the most that one may have."""
        return self.length if isinstance(source, TeacherTextConfig) else mean_length(source, self.tokenizer)


def tokens_of(
    source: TeacherTextConfig,
    sources: Sequence[TextSource],
    total: int,
    length_of: Callable[[TextSource], float] = lambda source: 1.0,
) -> int:
    """How many tokens a source of the teacher's has: as many as it says, or what is read of it in all.

    Args:
        total: tokens that are read of all sources.
        length_of: tokens of a document of a source; without it, those of all sources are taken to be alike.
    """
    if source.tokens:
        return source.tokens
    read, *others = (each.weight * length_of(each) for each in [source, *sources])  # weights count documents
    return max(1, min(math.ceil(total * read / sum(others)), MOST_TOKENS))


class _Text:
    """A text that is being written."""

    def __init__(self, writer: TeacherWriter, source: TeacherTextConfig, beginnings: Beginnings, tokens: int) -> None:
        self.writer, self.beginnings, self.tokens = writer, beginnings, tokens
        self.sampler = Sampler(
            writer.layerwise,
            writer.tokenizer,
            writer.length,
            temperature=source.temperature,
            top_p=source.top_p,
            seed=writer.seed,
            budget=writer.budget,
        )
        self.made_by = {
            "form": FORM,
            "teacher": writer.teacher,
            "dtype": str(writer.layerwise.model.dtype),
            "ends": list(self.sampler.ends),
            "beginnings": beginnings.key,
            "tokens": tokens,
            "length": writer.length,
            "temperature": source.temperature,
            "top_p": source.top_p,
            "seed": writer.seed,
        }
        key = json_digest(self.made_by)
        self.folder = writer.folder / f"teacher-{key}"
        self.processes = processes_of(writer.layerwise.device)

    def complete(self) -> WrittenText:
        """Writes what is missing of the text."""
        text, rate = find_token_text(self.folder), 0.0
        if not text or not self._is_whole(text):
            check_space(self.folder, 4 * self.tokens, "the text that the teacher writes")
            remove_paths(self.folder / MARKER)
            self.folder.mkdir(parents=True, exist_ok=True)
            wait_for_all()
            text, rate = self._write()
            text.write(self.folder)
            wait_for_all()
        return WrittenText(self.folder, text, rate, self.beginnings, self.sampler.ends, self.writer.tokenizer)

    def _is_whole(self, text: TokenText) -> bool:
        """Whether all files are as they were written."""
        read = {name: read_documents_in(self.folder / name) for name in text.files}
        return all(part is not None and part[1] == text.files[name] for name, part in read.items())

    def _write(self) -> tuple[TokenText, float]:
        """Writes all shards, each process its share; says what they hold, and how many tokens were written a second."""
        lengths: list[list[int]] = []  # of the documents of each shard
        checksums: list[str] = []
        made, started = 0, time.monotonic()
        with progress("text from the teacher", -(-self.tokens // self.processes.num_processes)) as advance:
            size = min(FIRST, -(-self.tokens // self.writer.length))
            while sum(map(sum, lengths)) < self.tokens:
                # The first shard is written alone: it says how many documents the others need.
                number, world = len(lengths), self.processes.num_processes if lengths else 1
                first, rank = sum(map(len, lengths)), self.processes.process_index
                shard = None
                if rank < world:
                    shard = self._shard(number + rank, range(first + rank * size, first + (rank + 1) * size), advance)
                for part in filter(None, gather(shard)):
                    if sum(map(sum, lengths)) < self.tokens:
                        lengths.append(part.lengths)
                        checksums.append(part.checksum)
                    made += part.made
                if number == 0:
                    size = self._size(lengths[0])
                    self._announce(made / (time.monotonic() - started))
        return self._text(lengths, checksums), made / (time.monotonic() - started)

    def _shard(self, number: int, documents: range, advance: Advance) -> _Shard:
        """A shard, from the disk if it is there; this process writes it."""
        path = self.folder / f"{number:05d}.safetensors"
        kept = read_documents_in(path)
        if kept and len(kept[0]) == len(documents):
            lengths = list(map(len, kept[0]))
            advance(sum(lengths))
            return _Shard(lengths, kept[1], 0)
        written = self.sampler.sample([self.beginnings.of(each) for each in documents], documents, advance)
        lengths = list(map(len, written))
        return _Shard(lengths, write_documents(path, written), sum(lengths))

    def _size(self, lengths: Sequence[int]) -> int:
        """How many documents each shard after the first has, by the lengths of those in the first."""
        left = max(0, self.tokens - sum(lengths))
        needed = math.ceil(1.05 * left * len(lengths) / sum(lengths))  # a little more: else the last one may be short
        return max(1, math.ceil(needed / max(LEAST_SHARDS, math.ceil(left / SHARD))))

    def _announce(self, rate: float) -> None:
        """Says how long it will take, once that is known, if it is long."""
        seconds = self.tokens / max(rate * self.processes.num_processes, 1e-9)
        if rate and seconds > LONG:
            console.print(f"the teacher writes {count(self.tokens)} tokens of text: about {duration(seconds)}")

    def _text(self, lengths: Sequence[Sequence[int]], checksums: Sequence[str]) -> TokenText:
        """What the marker says: as many documents count as are needed for the tokens, and shards after them go."""
        flat = [length for shard in lengths for length in shard]
        ends = list(accumulate(flat))
        documents = 1 + next(number for number, end in enumerate(ends) if end >= self.tokens)
        names = [f"{number:05d}.safetensors" for number in range(len(lengths))]
        remove_paths(*(path for path in self.folder.glob("*.safetensors") if path.name not in names))
        return TokenText(
            documents=documents,
            tokens=ends[documents - 1],
            tokenizer=vocabulary_digest(self.writer.tokenizer),
            files=dict(zip(names, checksums, strict=True)),
            made_by=self.made_by,
        )


class _Shard(NamedTuple):
    """A shard that is on the disk.

    Attributes:
        lengths: tokens of each document.
        made: tokens that were sampled for it now.
    """

    lengths: list[int]
    checksum: str
    made: int
