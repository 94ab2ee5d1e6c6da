"""A small world in two invented languages, and seven skills in it that mirror the paper's seven datasets.

Creatures have a colour, a home, a food and a friend. Sentences tell what creatures do; language A says
"colour subject verb colour object in place", language B "in place subject colour object colour verb", each in words of
its own, with or without the colours and the place. Everything follows from a seed.
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
Relations = tuple[int, ...]  # indices into RELATIONS, followed one after another
LEXICON_SEED = 20251107  # of the words and facts; `seed` elsewhere varies the exercises


class Example(NamedTuple):
    """One exercise of a skill: the target continues the prompt, and begins with a space."""

    prompt: str
    target: str


@dataclass(frozen=True)
class Sentence:
    """A sentence's meaning, as indices into the lists of words."""

    subject: int
    subject_colour: int | None
    verb: int
    object: int
    object_colour: int | None
    place: int | None

    @property
    def kept_for_tests(self) -> bool:
        """Whether the sentence is kept out of training: one in sixteen."""
        fields = (self.subject, self.subject_colour, self.verb, self.object, self.object_colour, self.place)
        return sum((2 * i + 1) * (-1 if f is None else f) for i, f in enumerate(fields)) % 16 == 0


class World:
    """The words, the facts, and exercises in them.

    Args:
        test: make exercises of the sentences that are kept out of training, instead of the others.
    """

    def __init__(self, *, test: bool = False) -> None:
        self.test = test
        rng = random.Random(LEXICON_SEED)
        syllables = ["".join(pair) for pair in product("bdfgklmnprstvz", "aeiou")]
        spelled = rng.sample([a + b for a, b in product(syllables, syllables)], 2 * sum(COUNTS.values()))
        words = iter(spelled)
        self.words = {
            language: {kind: [next(words) for _ in range(count)] for kind, count in COUNTS.items()}
            for language in ("a", "b")
        }
        self.facts = [[rng.randrange(COUNTS[relation]) for relation in RELATIONS] for _ in range(COUNTS["creature"])]
        self.training_questions = self.questions(test=False)

    def vocabulary(self) -> list[str]:
        """All words of both languages, the commands and the punctuation."""
        words = [w for language in self.words.values() for kind in language.values() for w in kind]
        return [*COMMANDS.values(), ":", "=", *words]

    # Sentences, facts and questions

    def say(self, sentence: Sentence, language: str) -> str:
        """A sentence in one of the languages."""
        words = self.words[language]

        def one(kind: str, index: int | None) -> list[str]:
            return [] if index is None else [words[kind][index]]

        subject, object_ = one("creature", sentence.subject), one("creature", sentence.object)
        colours = one("colour", sentence.subject_colour), one("colour", sentence.object_colour)
        verb, place = one("verb", sentence.verb), one("home", sentence.place)
        place = [*words["in"], *place] if place else []
        if language == "a":
            order = [*colours[0], *subject, *verb, *colours[1], *object_, *place]
        else:
            order = [*place, *subject, *colours[0], *object_, *colours[1], *verb]
        return " ".join([*order, *words["stop"]])

    def fact(self, creature: int, relation: int, language: str) -> str:
        """A fact, as a statement."""
        words = self.words[language]
        value = words[RELATIONS[relation]][self.facts[creature][relation]]
        return f"{words['creature'][creature]} {words['relation'][relation]} {value} {words['stop'][0]}"

    def question(self, creature: int, path: Relations, language: str, wording: int) -> tuple[Example, list[str]]:
        """A question in one of two wordings, and all the values of its kind. `path` goes from friend to friend."""
        words = self.words[language]
        answer = creature
        for relation in path:
            answer = self.facts[answer][relation]
        relations = [words["relation"][relation] for relation in reversed(path)]
        subject, ask = words["creature"][creature], words["ask"][0]
        order = [ask, *relations, subject] if wording == 0 else [subject, *reversed(relations), ask]
        values = words[RELATIONS[path[-1]]]
        return Example(f"{' '.join(order)} :", f" {values[answer]}"), values

    def questions(self, *, test: bool) -> list[tuple[int, Relations, int]]:
        """The (creature, path, wording) of all training questions, or of all test ones: the other wording of a fact."""
        friend = len(RELATIONS) - 1
        paths = [(*[friend] * hops, last) for hops in range(3) for last in range(len(RELATIONS))]
        return [
            (creature, path, wording)
            for creature in range(COUNTS["creature"])
            for number, path in enumerate(paths)
            for wording in (0, 1)
            if test == ((creature + number) % 3 == wording)
        ]

    # Exercises

    def knowledge(self, rng: random.Random, language: str) -> Example:
        creature, path, wording = rng.choice(self.training_questions)
        return self.question(creature, path, language, wording)[0]

    def any_fact(self, rng: random.Random) -> Example:
        creature, relation = rng.randrange(COUNTS["creature"]), rng.randrange(len(RELATIONS))
        return Example("", " " + self.fact(creature, relation, rng.choice("ab")))

    def sentence(self, rng: random.Random, subject: int | None = None) -> Sentence:
        """A random sentence: one kept out of training if `test`, else one of the others."""
        while True:
            creatures = rng.sample(range(COUNTS["creature"]), 2)
            colours = [rng.randrange(COUNTS["colour"]) if rng.random() < 0.6 else None for _ in range(2)]
            place = rng.randrange(COUNTS["home"]) if rng.random() < 0.6 else None
            first = creatures[0] if subject is None else subject
            second = creatures[1] if creatures[1] != first else creatures[0]
            sentence = Sentence(first, colours[0], rng.randrange(COUNTS["verb"]), second, colours[1], place)
            if sentence.kept_for_tests == self.test:
                return sentence

    def translate(self, rng: random.Random, source: str, target: str) -> Example:
        sentence = self.sentence(rng)
        prompt = f"{COMMANDS[f'translate_{source}{target}']} : {self.say(sentence, source)} ="
        return Example(prompt, " " + self.say(sentence, target))

    def copy(self, rng: random.Random, sentences: int) -> Example:
        language = rng.choice("ab")
        text = " ".join(self.say(self.sentence(rng), language) for _ in range(sentences))
        return Example(f"{COMMANDS['copy']} : {text} =", " " + text)

    def summarise(self, rng: random.Random) -> Example:
        """A document of five sentences; its summary is what the first one's subject does to whom, in order."""
        language = rng.choice("ab")
        sentences = [self.sentence(rng) for _ in range(5)]
        hero = sentences[0].subject
        for index in rng.sample((1, 2, 3, 4), rng.randint(1, 2)):
            sentences[index] = self.sentence(rng, subject=hero)
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
            "copy_document": lambda rng: self.copy(rng, 6),
            "copy_paragraph": lambda rng: self.copy(rng, 2),
            "translate_ab": lambda rng: self.translate(rng, "a", "b"),
            "translate_ba": lambda rng: self.translate(rng, "b", "a"),
        }

    def examples(self, seed: int) -> Iterator[Example]:
        """An endless stream of exercises of all skills."""
        rng = random.Random(f"text {seed}")
        skills = [*self.skills().values(), *[self.skills()[f"knowledge_{language}"] for language in "aaabbb"]]
        skills.append(lambda rng: self.copy(rng, 1))  # the shortest copies, from which longer ones are learned
        skills.append(self.any_fact)
        while True:
            yield rng.choice(skills)(rng)


def held_out(items: int = 150) -> dict[str, list[dict[str, object]]]:
    """Test items of each skill; none of their sentences and questions is in any training text."""
    world = World(test=True)
    rows: dict[str, list[dict[str, object]]] = {}
    for name, exercise in world.skills().items():
        rng = random.Random(f"test {name}")
        if name.startswith("knowledge"):
            questions = rng.sample(world.questions(test=True), items)
            rows[name] = [_choice_row(world, rng, name[-1], question) for question in questions]
        else:
            rows[name] = [exercise(rng)._asdict() for _ in range(items)]
    return rows


def write_world(folder: Path, *, seed: int = 0, documents: int = 12_000, items: int = 150) -> None:
    """Writes `tasks/SKILL.jsonl` and `text.jsonl`, the mixture of exercises that the teacher learned from."""
    world = World()
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    for name, rows in held_out(items).items():
        _write_lines(folder / "tasks" / f"{name}.jsonl", rows)
    examples = world.examples(seed)
    texts = [{"text": "".join(next(examples)).lstrip()} for _ in range(documents)]
    _write_lines(folder / "text.jsonl", texts)


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as Qwen2's, with one token a word."""
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


def _choice_row(
    world: World, rng: random.Random, language: str, question: tuple[int, Relations, int]
) -> dict[str, object]:
    creature, path, wording = question
    example, values = world.question(creature, path, language, wording)
    right = example.target.strip()
    choices = [right, *rng.sample([value for value in values if value != right], 3)]
    rng.shuffle(choices)
    return {"context": example.prompt, "choices": choices, "answer": choices.index(right)}


def _write_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
