"""Times one step of distillation, ours against others', on random weights and random tokens of a given shape.

    python benchmarks/distillation.py --shape qwen-vocabulary --out results.json

Rivals, each in a process of its own, in turn, over several rounds:
(published) the recipe of arXiv 2511.05085: two full models, all hidden states, dense softmaxes;
(trl) TRL's GKDTrainer, lmbda=0, beta=0: forward KL on dense logits (needs `pip install trl`);
(uncached) with `--rivals uncached`: ours against itself; "ours" then finds the teacher's states on disk, as from the
second round on over the same text.
(liger) on a GPU, the published recipe with Liger's fused linear JSD in place of the dense KL (needs liger-kernel).
All train the same parameters of the same student, with AdamW: the layers beside the gap (or as --train says).
Writes for each rival `speed`, our tokens/s over its, and `memory`, our peak over its: of the whole process on a CPU,
of what torch allocated on a GPU. The shape qwen2.5-7b is for showing that it trains at all, and runs only ours.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from machine import machine
from measuring import measured_apart, write_record
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from layerpeel.config.distill import DistillConfig
from layerpeel.data.rows import Rows
from layerpeel.model.surgery import remove_layers
from layerpeel.training.recipe import TrainingRecipe
from layerpeel.training.student import Student
from layerpeel.training.teacher_cache import TeacherCache
from layerpeel.training.trainable import parameters_to_train
from layerpeel.training.trainer import Trainer


@dataclass(frozen=True)
class Shape:
    """A teacher's sizes, which of its layers are missing in the student, and a batch."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    gap: range
    rows: int
    tokens: int
    tied: bool = True
    rivals: tuple[str, ...] = ("published", "trl")


SHAPES = {
    "tiny": Shape(6, 64, 128, 4, 2, 512, range(2, 4), 2, 32),
    "storyteller": Shape(18, 128, 352, 4, 2, 4096, range(8, 12), 8, 256),
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 49_152, range(12, 18), 2, 512),
    "qwen-vocabulary": Shape(18, 384, 1024, 6, 2, 151_936, range(8, 12), 2, 512),
    "qwen2.5-3b": Shape(36, 2048, 11_008, 16, 2, 151_936, range(16, 24), 2, 2048, rivals=("published", "trl", "liger")),
    "qwen2.5-7b": Shape(28, 3584, 18_944, 28, 4, 152_064, range(12, 18), 2, 2048, tied=False, rivals=()),
}


def main() -> None:
    """Runs ours and every rival in turn, and writes the medians' ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", default="neighbours", help="as distill.train")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each, of which the median counts")
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all rivals")
    parser.add_argument("--rivals", default=None, help="only these, as published,trl; none for ours alone")
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.worker:
        options.out.write_text(json.dumps(measure(options.worker, shape, options.train, options.steps)))
        return
    rivals = shape.rivals if options.rivals is None else tuple(filter(None, options.rivals.split(",")))
    if not torch.cuda.is_available():
        rivals = tuple(rival for rival in rivals if rival != "liger")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ("ours", *rivals)}
    given = ["--shape", options.shape, "--train", options.train, "--steps", options.steps]
    for _ in range(options.repeats):
        for name, found in runs.items():
            way = "cached" if name == "ours" and "uncached" in rivals else name
            found.append(measured_apart(__file__, *given, "--worker", way))
            print(name, {key: round(value, 3) for key, value in found[-1].items()}, flush=True)
    middle = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    ours = middle["ours"]
    record = {
        "command": f"python benchmarks/distillation.py --shape {options.shape} --train {options.train}"
        + f" --rivals {options.rivals}" * (options.rivals is not None),
        "machine": machine(),
        "shape": options.shape,
        "rivals": {
            name: {
                "speed": ours["tokens_per_second"] / middle[name]["tokens_per_second"],
                "memory": ours["peak_gib"] / middle[name]["peak_gib"],
            }
            for name in rivals
        },
        "medians": middle,
        "runs": runs,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_record(options.out, record, indent=1)
    print(json.dumps({"medians": middle, "rivals": record["rivals"]}, indent=1))


def measure(name: str, shape: Shape, train: str, steps: int) -> dict[str, float]:
    """Tokens a second over the median step (three more go before), and the peak of memory, in GiB."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = make_teacher(shape, device)
    before = peak_gib(device)
    marks: list[float] = []

    def mark(*_: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    WAYS[name](teacher, shape, train, steps + 3, mark)
    times = [after - begun for begun, after in pairwise(marks)]
    return {
        "tokens_per_second": shape.rows * shape.tokens / statistics.median(times[-steps:]),
        "peak_gib": peak_gib(device),
        "gib_with_the_teacher_alone": before,
    }


def make_teacher(shape: Shape, device: torch.device) -> PreTrainedModel:
    """Random weights; fp32 on a CPU, bf16 on a GPU."""
    config = Qwen2Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
    )
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16
        )
    return model.eval().requires_grad_(False)


def batches(shape: Shape, steps: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randint(shape.vocabulary, (shape.rows, shape.tokens), generator=generator)


def ours(
    teacher: PreTrainedModel,
    shape: Shape,
    train: str,
    steps: int,
    mark: Callable[..., None],
    cache: TeacherCache | None = None,
) -> None:
    """Our training loop."""
    student = Student(teacher)
    student.remove(shape.gap)
    tokens = steps * shape.rows * shape.tokens
    config = DistillConfig(
        tokens_per_step=shape.rows * shape.tokens,
        batch_size=shape.rows,
        sequence_length=shape.tokens,
        tokens_per_round=tokens,
        train=train,
    )
    ids = torch.cat(list(batches(shape, steps)))
    recipe = TrainingRecipe(config)
    trainer = Trainer(student, recipe.parameters(student), recipe, cache=cache, log=mark, description="ours")
    trainer.train(Rows(ids, torch.ones_like(ids).bool()), seed=0)


def cached(teacher: PreTrainedModel, shape: Shape, train: str, steps: int, mark: Callable[..., None]) -> None:
    """Our training loop for the second time over the same text, with the teacher's states on disk."""
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache(Path(folder), "teacher", 2**40)
        for marks in (lambda *_: None, mark):
            ours(teacher, shape, train, steps, marks, cache)


def full_student(teacher: PreTrainedModel, shape: Shape, train: str) -> tuple[PreTrainedModel, int]:
    """A second model with weights of its own, and the position of its last trained layer."""
    chosen = Student(teacher)
    chosen.remove(shape.gap)
    names = set(parameters_to_train(chosen, train))
    last = max(layer for name in names if (layer := chosen.layer_of(name)) is not None)
    by_position = dict(zip(chosen.parameters(), [n for n, _ in chosen.model.named_parameters()], strict=True))
    wanted = {by_position[name] for name in names}
    position = chosen.kept_layers.position(last)
    del chosen
    student = remove_layers(copy.deepcopy(teacher), shape.gap)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in wanted)
    return student, position


def published(
    teacher: PreTrainedModel, shape: Shape, train: str, steps: int, mark: Callable[..., None], liger: bool = False
) -> None:
    """The published recipe, or the same with Liger's fused loss in place of the dense KL."""
    student, last = full_student(teacher, shape, train)
    kept = [layer for layer in range(shape.layers) if layer not in shape.gap]
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05)
    fused = None
    if liger:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        fused = LigerFusedLinearJSD(jsd_beta=0.0)
    for ids in batches(shape, steps):
        ids = ids.to(teacher.device)
        options = {"output_hidden_states": True, "use_cache": False, "logits_to_keep": 1 if fused else 0}
        with torch.no_grad():
            teacher_outputs = teacher(ids, **options)
        outputs = student(ids, **options)
        if fused:
            head = teacher.get_output_embeddings().weight
            loss = fused(
                outputs.hidden_states[-1].flatten(0, 1),
                student.get_output_embeddings().weight,
                teacher_outputs.hidden_states[-1].flatten(0, 1),
                head,
            )
        else:
            logs, target = outputs.logits.log_softmax(-1), teacher_outputs.logits.softmax(-1)
            loss = functional.kl_div(logs, target, reduction="sum") / 100
        loss = loss + functional.mse_loss(
            outputs.hidden_states[last + 1], teacher_outputs.hidden_states[kept[last] + 1]
        )
        loss = loss + functional.mse_loss(outputs.hidden_states[-1], teacher_outputs.hidden_states[-1])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        mark()


def trl(teacher: PreTrainedModel, shape: Shape, train: str, steps: int, mark: Callable[..., None]) -> None:
    """TRL's trainer for generalised knowledge distillation, off-policy and with forward KL."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class Mark(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            mark()

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    student, _ = full_student(teacher, shape, train)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = GKDConfig(
            output_dir=folder,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            max_steps=steps,
            learning_rate=1e-4,
            per_device_train_batch_size=shape.rows,
            weight_decay=0.05,
            max_grad_norm=0.3,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
            use_cpu=teacher.device.type == "cpu",
            bf16=teacher.dtype is torch.bfloat16,
            max_length=shape.tokens,
        )
        rows = Dataset.from_dict({"input_ids": torch.cat(list(batches(shape, steps))).tolist()})
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=arguments,
            data_collator=collate,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[Mark()],
        )
        trainer.train()


def with_liger(teacher: PreTrainedModel, shape: Shape, train: str, steps: int, mark: Callable[..., None]) -> None:
    """The published recipe with Liger's fused loss."""
    published(teacher, shape, train, steps, mark, liger=True)


WAYS = {"ours": ours, "cached": cached, "uncached": ours, "published": published, "trl": trl, "liger": with_liger}


def peak_gib(device: torch.device) -> float:
    """The most memory that was taken so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
