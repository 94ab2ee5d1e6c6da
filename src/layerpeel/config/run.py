"""`RunConfig`, its top-level fields, and the checks across sections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from layerpeel.config.distill import DistillConfig
from layerpeel.config.fields import AS_BYTES, AS_COUNT, Folder, Section, TeacherTextConfig, TextConfig, file_of
from layerpeel.config.score import ScoreConfig


class StopConfig(Section):
    """When a run is over; the first that holds ends it."""

    target_layers: Annotated[int, Field(ge=1)] | None = None
    """The depth to reach."""
    min_quality: Annotated[float, Field(gt=0, le=1)] | None = None
    """A floor: the share of the teacher's aggregate to keep. The last student above it is the result."""
    max_params: Annotated[int, Field(ge=1), AS_COUNT] | None = None
    """The size to reach, in parameters; 2.5B and 300M are understood."""

    @model_validator(mode="after")
    def _some_stop(self) -> StopConfig:
        if self.target_layers is None and self.min_quality is None and self.max_params is None:
            raise ValueError("expected at least one of target_layers, min_quality, max_params")
        return self


class TaskConfig(BaseModel):
    """A measurement of quality; its kind decides what other keys there are."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True, allow_inf_nan=False)

    kind: str
    """choice, pairs, generate, perplexity, harness, or module:Class."""
    name: str = ""
    """What it is called in tables; the kind if not given."""

    @property
    def paths(self) -> list[str]:
        """Its keys that may hold a path."""
        names = ("data", "fewshot_data", "include_path", *(["task"] if self.kind == "harness" else []))
        return [name for name in names if isinstance((self.model_extra or {}).get(name), str)]

    @model_validator(mode="after")
    def _not_from_the_teacher(self) -> TaskConfig:
        for key, value in (self.model_extra or {}).items():
            if isinstance(value, dict) and "from" in value:
                raise ValueError(
                    f"{key}: expected a path; a task cannot be made of text that the teacher writes, "
                    "which has no right answers but the teacher's own"
                )
        return self

    @model_validator(mode="after")
    def _name(self) -> TaskConfig:
        self.name = self.name or self.kind
        return self


class RunConfig(Section):
    """A run."""

    teacher: Annotated[str, Field(min_length=1)]
    """A model folder or a hub name."""
    output: Folder
    """The run's folder, taken from the working folder; running again goes on with it."""
    stop: StopConfig = StopConfig.model_construct()
    """When it is over; only `run` and `plan` need it."""
    score: ScoreConfig = ScoreConfig()
    """How layers are scored."""
    tasks: list[TaskConfig] = []
    """What quality is, at least one: measured on the teacher, and on the student after each round."""
    aggregate: Literal["mean", "relative"] = "mean"
    """Of the tasks' scores: their mean, or the mean of score / teacher's score."""
    distill: DistillConfig = DistillConfig(tokens_per_round=0)
    """How the gap is healed."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the order of the training text."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = []
    """Where to send training curves as they grow, through accelerate; tensorboard writes below `output`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen weights; auto: float32 on a CPU, else that of the checkpoint."""
    attn_implementation: Annotated[str, Field(min_length=1)] = "auto"
    """The kernel of attention, as transformers calls it: eager, sdpa, flash_attention_2, flash_attention_3; auto: what
    transformers takes for the model. Flash kernels need a GPU, 16 bits and their package; with them, texts that begin
    alike are scored one by one."""
    trust_remote_code: bool = False
    """Whether code that comes with the checkpoint may run."""
    revision: Annotated[str, Field(min_length=1)] | None = None
    """Of a teacher on the hub: a branch, tag or commit. The commit that was read is on record either way."""
    merge_adapter: bool = False
    """Whether the adapter (LoRA) in the teacher's folder is merged into its weights, by peft; else it is refused."""
    memory_limit: Annotated[int, Field(ge=1), AS_BYTES] | None = None
    """A config that surely needs more bytes than this is refused; what the machine has in all, if not given."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.distill.trains and not self.distill.text:
            without = "distill.tokens_per_round: 0" if self.distill.tokens_per_round else "no distill.last_pass"
            raise ValueError(f"distill.text: expected text to train on (or {without})")
        if self.score.heal and not self.distill.text:
            raise ValueError("distill.text: expected text to heal candidates on (or no score.heal)")
        if not self.tasks:
            raise ValueError("tasks: expected at least one, to say what quality is")
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tasks: expected different names, found '{twice[0]}' twice")
        return self

    @property
    def streams(self) -> bool:
        """Whether a run reads the layers from the checkpoint as they run."""
        return self.distill.weights == "stream"

    @property
    def has_teacher_text(self) -> bool:
        """Whether the teacher writes some of the text."""
        sources = [*self.distill.text, *(self.score.text or [])]
        return any(isinstance(source, TeacherTextConfig) for source in sources)

    def files_of_text(self) -> dict[str, TextConfig]:
        """The sources of text that are files, those of prompts among them, each by its place in the config."""
        files = {}
        for section, sources in (("distill", self.distill.text), ("score", self.score.text or [])):
            for number, source in enumerate(sources):
                if file := file_of(source):
                    files[f"{section}.text.{number}{'' if file is source else '.prompts'}"] = file
        return files
