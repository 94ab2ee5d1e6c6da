"""layerpeel: makes language models shallower while keeping their quality. Peel one layer, heal, repeat."""

from layerpeel.config import RunConfig
from layerpeel.importance import score_layers
from layerpeel.journal import Run
from layerpeel.loop import peel
from layerpeel.models import load_model
from layerpeel.surgery import remove_layers
from layerpeel.tasks import evaluate
from layerpeel.training import distill

__all__ = ["Run", "RunConfig", "distill", "evaluate", "load_model", "peel", "remove_layers", "score_layers"]
