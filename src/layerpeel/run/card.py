"""The model card of a student, in the form of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from jinja2 import Environment, StrictUndefined

from layerpeel.config.fields import TextConfig
from layerpeel.config.run import RunConfig
from layerpeel.processes.distributed import RANK
from layerpeel.processes.text import count, number, one_line, percent
from layerpeel.run.folder import Run, removed_layers
from layerpeel.storage.files import write_whole
from layerpeel.tasks.scores import Evaluation, aggregate_stderr

CARRIED = ("license", "license_name", "license_link", "language")  # from the teacher's own card
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TEMPLATE = Path(__file__).with_name("card.md.jinja")


def write_card(run: Run, folder: Path, round_: int, last_pass: dict[str, Any] | None = None) -> Path:
    """Writes the README.md of a round's student into its folder; of several processes the first does.

    Args:
        round_: the round whose student is in `folder`; 0 if nothing was removed.
        last_pass: what the journal says of the training after the last removal, if the student had it.
    """
    path = folder / "README.md"
    if RANK:
        return path
    metadata = card_metadata(run.config)
    # Markdown, in which text from outside is escaped as such: escaping for HTML would show in code.
    template = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    template.filters |= {"md": markdown, "number": number, "percent": percent, "count": count}
    body = template.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        card_facts(run, round_, metadata, last_pass)
    )
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}")
    write_whole(path, str(card))
    return path


def card_metadata(config: RunConfig) -> ModelCardData:
    """The card's head: what the hub files the model under."""
    carried = {key: value for key, value in teacher_metadata(config.teacher).items() if key in CARRIED and value}
    datasets = sorted({text.path for text in config.distill.text if _is_hub_name(text.path)})
    return ModelCardData(
        base_model=teacher_name(config.teacher),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["layerpeel", "pruning", "depth-pruning", "distillation"],
        datasets=datasets if config.distill.tokens_per_round and datasets else None,
        **carried,
    )


def teacher_metadata(teacher: str) -> dict[str, Any]:
    """What the head of the teacher's own card says, if it has one and can be read; nothing is fetched."""
    folder = Path(teacher)
    found = folder / "README.md" if folder.is_dir() else try_to_load_from_cache(teacher, "README.md")
    if not isinstance(found, (str, Path)) or not Path(found).is_file():
        return {}
    try:
        return ModelCard.load(found).data.to_dict()
    except Exception:  # somebody else's YAML, which must not keep us from writing ours
        return {}


def teacher_name(teacher: str) -> str:
    """The hub's name, or the folder's; the rest of a path is nobody's business."""
    return one_line(Path(teacher).name if Path(teacher).is_dir() else teacher, 200)


def card_facts(run: Run, round_: int, metadata: ModelCardData, last_pass: dict[str, Any] | None) -> dict[str, Any]:
    """What the card says."""
    assert run.teacher
    config, done = run.config, run.rounds[:round_]
    student = (done[-1] if done else run.teacher) | (last_pass or {})
    trained = [event["training"] for event in [*done, *([last_pass] if last_pass else [])]]
    return {
        "name": f"{metadata.base_model}, {run.teacher['layers'] - len(removed_layers(run, round_))} layers",
        "base": metadata.base_model,
        "license": metadata.license,
        "config": config,
        "teacher": run.teacher,
        "student": student,
        "layers": run.teacher["layers"] - len(removed_layers(run, round_)),
        "removed": removed_layers(run, round_),
        "order": [event["removed"] for event in done],
        "tokens": sum(training["tokens"] for training in trained),
        "last_pass": last_pass,
        "sources": [_source(text) for text in config.distill.text],
        "errors": [_aggregate_stderr(run, event) for event in (run.teacher, student)],
        "versions": next((event["versions"] for event in run.events if event["event"] == "start"), {}),
    }


def _aggregate_stderr(run: Run, event: dict[str, Any]) -> float:
    return aggregate_stderr(Evaluation.from_json(event["evaluation"]), run.reference, run.config.aggregate)


def _source(text: TextConfig) -> str:
    return text.path if _is_hub_name(text.path) else Path(text.path).name


def _is_hub_name(path: str) -> bool:
    return bool(HUB_NAME.fullmatch(path)) and not Path(path).exists() and not Path(path).suffix


def markdown(value: Any) -> str:
    """A text as nothing but text in Markdown: no markup, link, image, HTML or new cell."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~$&:.@])", r"\\\1", one_line(value, 200))
