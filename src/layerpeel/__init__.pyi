from layerpeel.config.run import RunConfig
from layerpeel.importance.scoring import score_layers
from layerpeel.model.loading import load_model
from layerpeel.model.surgery import remove_layers
from layerpeel.run.folder import Run
from layerpeel.run.loop import peel
from layerpeel.tasks.evaluation import evaluate
from layerpeel.training.rounds import distill, repair

__all__ = ["Run", "RunConfig", "distill", "evaluate", "load_model", "peel", "remove_layers", "repair", "score_layers"]
