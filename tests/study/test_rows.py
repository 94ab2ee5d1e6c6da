"""The columns of a study's files."""

from __future__ import annotations

from dataclasses import replace

from layerpeel.study.rows import StudyRows, TauRow
from tests.study.test_charts import RESULT


def test_varied_fields_and_rankings_have_a_column_each() -> None:
    columns = replace(RESULT, values={"seed": 1, "distill.radius": 2}).columns()
    assert list(columns)[:4] == ["variant", "seed", "distill.radius", "runs"] and "values" not in columns
    assert list(TauRow("a", {"a": 1.0, "b": None}).columns().items()) == [("ranking", "a"), ("a", 1.0), ("b", None)]


def test_tables_without_rows_are_left_out() -> None:
    assert list(StudyRows([RESULT], []).tables()) == ["results"]
