"""What the command line says of a removal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerpeel.processes.progress import shown

if TYPE_CHECKING:
    from layerpeel.model.removal import Removal


def removal_lines(removal: Removal, folder: Path) -> list[str]:
    """What was written, what was removed, kept and changed, and what does not hold any more."""
    layers = removal.layers
    lines = [
        f"{len(layers)} layers, {removal.parameters:,} parameters "
        f"(of {layers.total} and {removal.teacher_parameters:,}): {shown(folder)}",
        f"removed  layers {', '.join(map(str, layers.removed))}",
    ]
    lines += [f"         {count} tensors of {reason}" for reason, count in removal.dropped.items()]
    lines.append(f"kept     {removal.kept} tensors, each with its bytes and its dtype")
    lines += [f"         {shown(name)}" for name in removal.carried]
    lines += [f"changed  {shown(name)}: {_change(*change)}" for name, change in removal.changed.items()]
    lines += [f"left     {shown(name)}{_reason(name)}" for name in removal.left]
    if removal.broken_cycle:
        lines.append(f"note     {shown(removal.broken_cycle)}")
    return lines


def _change(before: Any, after: Any) -> str:
    if isinstance(before, list) and isinstance(after, list):
        return f"{len(before)} -> {len(after)} entries"
    return shown(f"{before} -> {after}")


def _reason(name: str) -> str:
    return " (the student has a model card of its own)" if name.lower() == "readme.md" else ""
