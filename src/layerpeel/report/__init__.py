"""What a run or a scoring found, as a page, pictures, tables and model cards."""

from layerpeel.report.card import write_card
from layerpeel.report.export import export_student, push
from layerpeel.report.figures import draw_importance
from layerpeel.report.listing import list_runs
from layerpeel.report.page import watch, write_report

__all__ = ["draw_importance", "export_student", "list_runs", "push", "watch", "write_card", "write_report"]
