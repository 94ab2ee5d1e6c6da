"""layerpeel: makes language models shallower while keeping their quality. Peel one layer, heal, repeat."""

from __future__ import annotations

from layerpeel._front_door import __all__ as __all__
from layerpeel._front_door import __dir__ as __dir__
from layerpeel._front_door import __getattr__ as __getattr__
