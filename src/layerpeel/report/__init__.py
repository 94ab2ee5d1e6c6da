"""What a run or a scoring found, as pictures."""

from layerpeel.report.figures import draw_importance

__all__ = ["draw_importance"]
