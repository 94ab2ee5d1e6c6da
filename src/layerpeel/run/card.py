"""The model card of a student, in the form of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from jinja2 import Environment, StrictUndefined

from layerpeel.config.fields import TeacherTextConfig, TextConfig, TextSource
from layerpeel.data.reading import is_hub_text
from layerpeel.model.layer_cycles import out_of_cycle
from layerpeel.model.loading import load_config_of
from layerpeel.processes.text import count, number, one_line, percent
from layerpeel.storage.files import write_whole

if TYPE_CHECKING:
    from layerpeel.config.run import RunConfig
    from layerpeel.run.events import StudentRecord
    from layerpeel.run.folder import Run

CARRIED = ("license", "license_name", "license_link", "language")  # from the teacher's own card
TEMPLATE = Path(__file__).with_name("card.md.jinja")


def write_card(run: Run, folder: Path, round_number: int, last_pass: StudentRecord | None = None) -> Path:
    """Writes the README.md of a round's student into its folder.

    Args:
        round_number: the round whose student is in `folder`; 0 if nothing was removed.
        last_pass: what the record says of the training after the last removal, if the student had it.
    """
    path = folder / "README.md"
    metadata = card_metadata(run.config)
    # Markdown, in which text from outside is escaped as such: escaping for HTML would show in code.
    template = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    template.filters |= {"md": markdown, "number": number, "percent": percent, "count": count}
    body = template.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        card_facts(run, round_number, metadata, last_pass) | {"cycle": _cycle(run, folder)}
    )
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}")
    write_whole(path, str(card))
    return path


def _cycle(run: Run, folder: Path) -> str | None:
    """What other runtimes make of the student in a folder, if its layers are out of a cycle that they count on."""
    if not (folder / "config.json").is_file():
        return None
    return out_of_cycle(load_config_of(folder, trust_remote_code=run.config.trust_remote_code))


def card_metadata(config: RunConfig) -> ModelCardData:
    """The card's head: what the hub files the model under."""
    carried = {key: value for key, value in teacher_metadata(config.teacher).items() if key in CARRIED and value}
    files = [text for text in config.distill.text if isinstance(text, TextConfig)]
    datasets = sorted({text.path for text in files if is_hub_text(text.path)})
    return ModelCardData(
        base_model=teacher_name(config.teacher),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["layerpeel", "pruning", "depth-pruning", "distillation"],
        datasets=datasets if config.distill.trains and datasets else None,
        **carried,
    )


def teacher_metadata(teacher: str) -> dict[str, Any]:
    """What the head of the teacher's own card says, if it has one and can be read; nothing is fetched."""
    folder = Path(teacher)
    path = folder / "README.md" if folder.is_dir() else try_to_load_from_cache(teacher, "README.md")
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        return {}
    try:
        return ModelCard.load(path).data.to_dict()
    except Exception:  # somebody else's YAML, which must not keep us from writing ours
        return {}


def teacher_name(teacher: str) -> str:
    """The hub's name, or the folder's; the rest of a path is nobody's business."""
    return one_line(Path(teacher).name if Path(teacher).is_dir() else teacher, 200)


def card_facts(run: Run, round_number: int, metadata: ModelCardData, last_pass: StudentRecord | None) -> dict[str, Any]:
    """What the card says."""
    assert run.teacher and run.start
    trainings = [each.training for each in run.rounds[:round_number]] + ([last_pass.training] if last_pass else [])
    rounds, removed = run.rounds[:round_number], run.removed_layers(round_number)
    student = last_pass or (rounds[-1] if rounds else run.teacher)
    layers = run.teacher.layers - len(removed)
    return {
        "name": f"{metadata.base_model}, {layers} layers",
        "base": metadata.base_model,
        "commit": run.start.teacher_files.get("commit"),
        "license": metadata.license,
        "config": run.config,
        "teacher": run.teacher,
        "student": student,
        "layers": layers,
        "removed": removed,
        "order": [each.removed for each in rounds],
        "tokens": sum(training.tokens for training in trainings),
        "repaired": sum(each.repair.tokens for each in rounds if each.repair),
        "last_pass": last_pass,
        "in_rounds": run.config.distill.in_rounds(),
        "at_end": run.config.distill.at_end(len(removed)),
        "sources": [source_name(text) for text in run.config.distill.text],
        "errors": [
            model.evaluation.aggregate_stderr(run.reference, run.config.aggregate) for model in (run.teacher, student)
        ],
        "versions": run.start.versions,
    }


def source_name(text: TextSource) -> str:
    """What a card calls a source of text."""
    if isinstance(text, TeacherTextConfig):
        return "text that the teacher wrote"
    return text.path if is_hub_text(text.path) else Path(text.path).name


def markdown(value: Any) -> str:
    """A text as nothing but text in Markdown: no markup, link, image, HTML or new cell."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~$&:.@])", r"\\\1", one_line(value, 200))
