"""A finished run, as the report's tests have it."""

from tests.report.conftest import finished, run

__all__ = ["finished", "run"]
