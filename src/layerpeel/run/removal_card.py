"""The model card of a student that no run made: layers were removed, and at most the gap was healed once."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from layerpeel.model.surgery import KeptLayers
from layerpeel.processes.text import count
from layerpeel.run.card import CARRIED, markdown, source_name, teacher_metadata, teacher_name
from layerpeel.storage.files import write_whole

if TYPE_CHECKING:
    from layerpeel.config.distill import DistillConfig
    from layerpeel.config.run import RunConfig
    from layerpeel.training.result import RepairResult, TrainingResult

TEMPLATE = Path(__file__).with_name("removal_card.md.jinja")


@dataclass(frozen=True)
class HealingFacts:
    """What a card says of a repair and a training.

    Attributes:
        repaired: real tokens that the repair was solved on; 0 where there was none.
        tokens: real tokens that were trained on; 0 where there was no training.
    """

    config: DistillConfig
    sources: list[str]
    repaired: int
    tokens: int

    @classmethod
    def of(cls, config: RunConfig, repair: RepairResult | None, training: TrainingResult | None) -> HealingFacts:
        sources = [source_name(text) for text in config.distill.text]
        return cls(config.distill, sources, repair.tokens if repair else 0, training.tokens if training else 0)


def write_removal_card(
    folder: Path,
    teacher: str,
    layers: KeptLayers,
    parameters: int,
    teacher_parameters: int,
    healing: HealingFacts | None = None,
    cycle: str | None = None,
) -> Path:
    """Writes the README.md of a student into its folder; the main process does.

    Args:
        teacher: its folder or hub name.
        layers: which of the teacher's the student has.
        healing: what was done after the removal, if anything.
        cycle: what the removal means for other runtimes, if it breaks a cycle of layers (`broken_cycle`).
    """
    path = folder / "README.md"
    metadata = _metadata(teacher, bool(healing))
    # Markdown, in which text from outside is escaped as such: escaping for HTML would show in code.
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters |= {"md": markdown, "count": count}
    body = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        base=metadata.base_model,
        license=metadata.license,
        layers=layers,
        parameters=parameters,
        teacher_parameters=teacher_parameters,
        healing=healing,
        cycle=cycle,
        versions={name: version(name) for name in ("layerpeel", "torch", "transformers")},
    )
    write_whole(path, str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}")))
    return path


def _metadata(teacher: str, trained: bool) -> ModelCardData:
    carried = {key: value for key, value in teacher_metadata(teacher).items() if key in CARRIED and value}
    return ModelCardData(
        base_model=teacher_name(teacher),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["layerpeel", "pruning", "depth-pruning", *(["distillation"] if trained else [])],
        **carried,
    )
