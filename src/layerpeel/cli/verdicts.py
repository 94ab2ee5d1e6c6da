"""What the command line says of a student in another runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from layerpeel.cli.output import stdout
from layerpeel.processes.progress import shown
from layerpeel.processes.text import number

if TYPE_CHECKING:
    from layerpeel.export.outcomes import Outcome
    from layerpeel.export.verify.comparison import Comparison
    from layerpeel.export.verify.verifying import Verdict
    from layerpeel.report.runtimes import RuntimeSpeed

STARTS = (0, 1, 8, 64, 256, 512, 1024, 2048, 4096)  # of the groups of positions that the table shows


def print_outcome(outcome: Outcome) -> None:
    """Prints where and how far a runtime is from the student, whether that is rounding, what else, and how fast."""
    verdict = outcome.verdict
    stdout.print(f"{shown(outcome.path)} in {shown(verdict.runtime)}, {verdict.precision}", soft_wrap=True)
    stdout.print(verdict_table(verdict))
    measured = verdict.comparison
    ids = "the same" if measured.first_other_token is None else _other_ids(measured)
    stdout.print(f"token ids    {ids}", soft_wrap=True)
    if measured.greedy is not None:
        stdout.print(f"greedy text  {_greedy(measured)}", soft_wrap=True)
    for note in verdict.notes:
        stdout.print(f"note         {shown(note)}", soft_wrap=True)
    for cause in verdict.causes:
        stdout.print(f"likely       {shown(cause)}", soft_wrap=True)
    result = "right" if verdict.is_right else f"WRONG: {'; '.join(verdict.faults)}"
    stdout.print(f"verdict      {shown(result)}", soft_wrap=True)
    if outcome.speed:
        stdout.print(f"speed        {_speed(outcome.speed)}", soft_wrap=True)


def _speed(speed: RuntimeSpeed) -> str:
    parts = (
        f"{name} {number(rates.teacher, 1)} → {number(rates.student, 1)} tokens/s, {rates.ratio:.2f} times"
        for name, rates in (("prompt", speed.prompt), ("generation", speed.generation))
    )
    read = f"{speed.prompt_tokens} + {speed.new_tokens} tokens, medians of {speed.turns} turns"
    return f"teacher → student: {'; '.join(parts)} ({read})"


def verdict_table(verdict: Verdict) -> Table:
    """KL and agreement by groups of positions, of all, and their limits."""
    measured = verdict.comparison
    table = Table("token", "mean KL", "largest KL", "same top token", box=None, header_style="bold")
    for start, end in zip(STARTS, (*STARTS[1:], 2**62), strict=True):
        rows = [row for row, place in enumerate(measured.positions) if start <= place < end]
        if rows:
            last = measured.positions[rows[-1]]
            name = f"{start}" if last == start else f"{start} to {last}"
            table.add_row(name, *_numbers([measured.kl[row] for row in rows], [measured.same_top[row] for row in rows]))
    table.add_row("all", *_numbers(measured.kl, measured.same_top))
    table.add_row("limit", f"{verdict.limits.kl:.1e}", "", f"{verdict.limits.same_top:.1%}")
    return table


def _numbers(kl: list[float], same_top: list[bool]) -> list[str]:
    mean = sum(kl) / len(kl)
    return [f"{mean:.1e}", f"{max(kl):.1e}", f"{sum(same_top) / len(same_top):.1%}"]


def _other_ids(measured: Comparison) -> str:
    student, other = (" ".join(map(str, ids)) for ids in measured.token_ids)
    return f"differ from token {measured.first_other_token} on: {student} in the student, {other or 'none'} there"


def _greedy(measured: Comparison) -> str:
    assert measured.greedy is not None
    if measured.same_greedy:
        return "the same"
    student, other = measured.greedy
    alike = next((i for i, (a, b) in enumerate(zip(student, other, strict=False)) if a != b), 0)
    rest, other_rest = (shown(repr(text[alike:][:40])) for text in (student, other))
    return f"differs after {alike} of {len(student)} characters: {rest}, there {other_rest}"
