"""What can be said of a run's teacher before its weights are read: its headers, its tokenizer, its cycle of layers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError
from layerpeel.model.checkpoint_keys import check_can_be_undone, quantised_with
from layerpeel.model.config_fields import text_config
from layerpeel.model.forward_switches import runnable_config
from layerpeel.model.layer_cycles import broken_cycle, cycle_breakers, cycle_of
from layerpeel.model.loading import load_teacher_config, load_tokenizer, load_without_bytes, teacher_options
from layerpeel.model.vocabulary import check_vocabulary_of
from layerpeel.processes.progress import console, shown


def read_for_plan(config: RunConfig) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """A teacher's config and tokenizer, checked as far as it can be without its weights.

    Raises:
        InputError: a run would refuse the teacher.
    """
    teacher = runnable_config(load_teacher_config(config))
    tokenizer = load_tokenizer(config.teacher, **teacher_options(config))
    check_vocabulary_of(teacher, tokenizer, config.teacher)
    _check_headers(config, teacher)
    note_cycle(config, teacher)
    return teacher, tokenizer


def _check_headers(config: RunConfig, teacher: PretrainedConfig) -> None:
    """Checks by a teacher's config and, in a folder, the headers of its files that its weights can be loaded.

    Raises:
        InputError: they cannot.
    """
    check_can_be_undone(teacher, config.teacher)
    folder = Path(config.teacher)
    if folder.is_dir() and not config.merge_adapter and not quantised_with(teacher):
        load_without_bytes(folder, teacher, folder, trust_remote_code=config.trust_remote_code)


def note_cycle(config: RunConfig, teacher: PretrainedConfig) -> None:
    """Says what removals mean for runtimes that take a cycle of layers as fixed, if the run may break it."""
    if not config.score.protect.pattern and (warning := broken_cycle(teacher)):
        console.print(shown(f"note: {warning} (docs/faq.md; score.protect.pattern)"), soft_wrap=True)


def check_pattern(config: RunConfig, teacher: PretrainedConfig, free: Iterable[int]) -> None:
    """Checks that some single layer can go, of those that `score.protect` leaves, without breaking a cycle.

    Args:
        free: the layers that may go otherwise.

    Raises:
        InputError: none can, and a round removes one.
    """
    cycle = cycle_of(teacher) if config.score.protect.pattern else None
    if cycle and not set(free) - cycle_breakers(teacher).keys():
        period = cycle.period
        middle = text_config(teacher).num_hidden_layers // 2 // period * period
        layers = f"{middle}-{middle + period - 1}"
        raise InputError(
            f"score.protect.pattern: the teacher's layers follow a cycle of {period}, which breaks without any single "
            "layer that may go, and a round removes one: no round can keep it",
            hint=f"remove a whole period with `layerpeel remove --layers {layers}`, or `layerpeel distill` with these "
            "layers; or allow the last layers to go (score.protect.last: 0); or let the cycle break "
            f"(score.protect.pattern: false), which only {cycle.fixed_in.replace(', ', ' and ')} cannot read",
        )
