"""A small world in two invented languages, and seven skills in it that mirror the paper's seven datasets.

Creatures have a colour, a home, a food and a friend. Sentences tell what creatures do; language A says
"adjective subject verb adjective object in place", language B "in place subject adjective object adjective verb", each
in words of its own. Everything follows from a seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"
COUNTS = {
    "creature": 24,
    "colour": 8,
    "home": 8,
    "food": 8,
    "verb": 12,
    "relation": 4,
    "in": 1,
    "ask": 1,
    "stop": 1,
}
RELATIONS = ("colour", "home", "food", "creature")  # the last is the friend
COMMANDS = {"translate_ab": "ab", "translate_ba": "ba", "copy": "copy", "summarise": "sum"}
LEXICON_SEED = 20251107  # the world is one; seeds vary what is said of it


class Example(NamedTuple):
    """One exercise of a skill: the target continues the prompt, and begins with a space."""

    prompt: str
    target: str


@dataclass(frozen=True)
class Sentence:
    """What a sentence says, in no language: indices into the lists of words."""

    subject: int
    subject_colour: int
    verb: int
    object: int
    object_colour: int
    place: int


class World:
    """The words, the facts, and a stream of exercises."""

    def __init__(self) -> None:
        rng = random.Random(LEXICON_SEED)
        syllables = ["".join(pair) for pair in product("bdfgklmnprstvz", "aeiou")]
        spelled = rng.sample([a + b for a, b in product(syllables, syllables)], 2 * sum(COUNTS.values()))
        words = iter(spelled)
        self.words = {
            language: {kind: [next(words) for _ in range(count)] for kind, count in COUNTS.items()}
            for language in ("a", "b")
        }
        self.facts = [[rng.randrange(COUNTS[relation]) for relation in RELATIONS] for _ in range(COUNTS["creature"])]

    def vocabulary(self) -> list[str]:
        """Every word that is ever said."""
        said = [w for language in self.words.values() for kind in language.values() for w in kind]
        return [*COMMANDS.values(), ":", "=", *said]

    # What is said

    def say(self, sentence: Sentence, language: str) -> str:
        """A sentence in one of the languages."""
        words = self.words[language]
        subject, object_ = words["creature"][sentence.subject], words["creature"][sentence.object]
        colours = words["colour"][sentence.subject_colour], words["colour"][sentence.object_colour]
        verb, place = words["verb"][sentence.verb], f"{words['in'][0]} {words['home'][sentence.place]}"
        if language == "a":
            order = [colours[0], subject, verb, colours[1], object_, place]
        else:
            order = [place, subject, colours[0], object_, colours[1], verb]
        return " ".join([*order, words["stop"][0]])

    def fact(self, creature: int, relation: int, language: str) -> str:
        """A fact, as a statement."""
        words = self.words[language]
        value = words[RELATIONS[relation]][self.facts[creature][relation]]
        return f"{words['creature'][creature]} {words['relation'][relation]} {value} {words['stop'][0]}"

    def question(self, creature: int, path: tuple[int, ...], language: str) -> tuple[Example, list[str]]:
        """A question, and all the values of its kind. A path of two asks for a friend's."""
        words = self.words[language]
        answer = creature
        for relation in path:
            answer = self.facts[answer][relation]
        asked = " ".join(words["relation"][relation] for relation in reversed(path))
        values = words[RELATIONS[path[-1]]]
        prompt = f"{words['ask'][0]} {asked} {words['creature'][creature]} :"
        return Example(prompt, f" {values[answer]}"), values

    # Exercises

    def knowledge(self, rng: random.Random, language: str) -> Example:
        return self.question(rng.randrange(COUNTS["creature"]), self.any_path(rng), language)[0]

    def any_fact(self, rng: random.Random) -> Example:
        creature, relation = rng.randrange(COUNTS["creature"]), rng.randrange(len(RELATIONS))
        return Example("", " " + self.fact(creature, relation, rng.choice("ab")))

    def any_path(self, rng: random.Random) -> tuple[int, ...]:
        last = rng.randrange(len(RELATIONS))
        return (len(RELATIONS) - 1, last) if rng.random() < 0.5 else (last,)

    def translate(self, rng: random.Random, source: str, target: str) -> Example:
        sentence = _any_sentence(rng)
        prompt = f"{COMMANDS[f'translate_{source}{target}']} : {self.say(sentence, source)} ="
        return Example(prompt, " " + self.say(sentence, target))

    def copy(self, rng: random.Random, sentences: int) -> Example:
        language = rng.choice("ab")
        text = " ".join(self.say(_any_sentence(rng), language) for _ in range(sentences))
        return Example(f"{COMMANDS['copy']} : {text} =", " " + text)

    def summarise(self, rng: random.Random) -> Example:
        """Of a document's sentences, what its hero (its first subject) does to whom, in order."""
        language = rng.choice("ab")
        sentences = [_any_sentence(rng) for _ in range(4)]
        hero = sentences[0].subject
        for index in rng.sample((1, 2, 3), rng.randint(1, 2)):
            sentences[index] = _with_subject(sentences[index], hero)
        words = self.words[language]
        deeds = [(words["verb"][s.verb], words["creature"][s.object]) for s in sentences if s.subject == hero]
        text = " ".join(self.say(sentence, language) for sentence in sentences)
        summary = " ".join([words["creature"][hero], *(word for deed in deeds for word in deed)])
        return Example(f"{COMMANDS['summarise']} : {text} =", f" {summary} {words['stop'][0]}")

    def skills(self) -> dict[str, Callable[[random.Random], Example]]:
        """The seven skills, in the paper's order."""
        return {
            "knowledge_a": lambda rng: self.knowledge(rng, "a"),
            "knowledge_b": lambda rng: self.knowledge(rng, "b"),
            "summarise": self.summarise,
            "copy_document": lambda rng: self.copy(rng, 4),
            "copy_paragraph": lambda rng: self.copy(rng, 2),
            "translate_ab": lambda rng: self.translate(rng, "a", "b"),
            "translate_ba": lambda rng: self.translate(rng, "b", "a"),
        }

    def examples(self, seed: int, avoid: frozenset[str] = frozenset()) -> Iterator[Example]:
        """Training exercises of all skills without end; none of whose prompts is in `avoid`."""
        rng = random.Random(f"text {seed}")
        skills = [*self.skills().values(), *[self.skills()[f"knowledge_{language}"] for language in "aabb"]]
        skills.append(lambda rng: self.copy(rng, 1))  # the shortest of copies, from which the others are learned
        skills.append(self.any_fact)
        while True:
            example = rng.choice(skills)(rng)
            if example.prompt not in avoid:
                yield example


def held_out(world: World, seed: int = 0, items: int = 200) -> dict[str, list[dict[str, object]]]:
    """Test items of each skill. Their sentences are new; the facts are the world's, which is what is tested."""
    rows: dict[str, list[dict[str, object]]] = {}
    for name, exercise in world.skills().items():
        rng = random.Random(f"test {name} {seed}")
        if name.startswith("knowledge"):
            rows[name] = [_choice_row(world, rng, name[-1]) for _ in range(items)]
        else:
            rows[name] = [exercise(rng)._asdict() for _ in range(items)]
    return rows


def held_out_prompts(world: World) -> frozenset[str]:
    """Prompts that no training text may hold: those of all generation items."""
    return frozenset(str(row["prompt"]) for rows in held_out(world).values() for row in rows if "prompt" in row)


def write_world(folder: Path, *, seed: int = 0, documents: int = 12_000, items: int = 200) -> None:
    """Writes `tasks/SKILL.jsonl` and `text.jsonl`, the mixture of exercises that the teacher learned from."""
    world = World()
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    for name, rows in held_out(world, items=items).items():
        _write_lines(folder / "tasks" / f"{name}.jsonl", rows)
    stream = world.examples(seed, avoid=held_out_prompts(world))
    texts = [{"text": "".join(next(stream)).lstrip()} for _ in range(documents)]
    _write_lines(folder / "text.jsonl", texts)


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Byte-level BPE of Qwen2's kind (which is how transformers loads it), in which each word is one token."""
    pieces = {word: (word[:2], word[2:]) for word in world.vocabulary() if len(word) > 2}
    short = [word for word in world.vocabulary() if len(word) == 2]
    halves = dict.fromkeys(half for pair in pieces.values() for half in pair if len(half) == 2)
    syllables = [half for half in halves if half[0] not in "aeiou"]
    merges = [(half[0], half[1]) for half in dict.fromkeys([*syllables, *halves, *short])]
    merges += [*pieces.values(), *(("Ġ", word) for word in world.vocabulary())]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([END, PAD, *letters, *(left + right for left, right in merges)])
    model = models.BPE({token: index for index, token in enumerate(tokens)}, merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD)


def _any_sentence(rng: random.Random) -> Sentence:
    subject, object_ = rng.sample(range(COUNTS["creature"]), 2)
    colours = rng.randrange(COUNTS["colour"]), rng.randrange(COUNTS["colour"])
    return Sentence(
        subject, colours[0], rng.randrange(COUNTS["verb"]), object_, colours[1], rng.randrange(COUNTS["home"])
    )


def _with_subject(sentence: Sentence, subject: int) -> Sentence:
    other = sentence.subject if sentence.object == subject else sentence.object
    return Sentence(subject, sentence.subject_colour, sentence.verb, other, sentence.object_colour, sentence.place)


def _choice_row(world: World, rng: random.Random, language: str) -> dict[str, object]:
    example, values = world.question(rng.randrange(COUNTS["creature"]), world.any_path(rng), language)
    right = example.target.strip()
    choices = [right, *rng.sample([value for value in values if value != right], 3)]
    rng.shuffle(choices)
    return {"context": example.prompt, "choices": choices, "answer": choices.index(right)}


def _write_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
