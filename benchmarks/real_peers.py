"""Peers of the package index, used as their documentation has it, on the same text and tokens: see real.py.

They are not among our extras: pip install optipfair nvidia-modelopt[hf] trl
Each is given what its users would give it: rows of 256 tokens of joined documents, eight a step, its own defaults for
learning rate, schedule and losses, a student in float32 with bfloat16 autocast, a teacher in bfloat16. TRL's trainer is
asked for what is distillation on given text (lmbda 0, forward KL): sampling from the student takes days here.
"""

from __future__ import annotations

import importlib.metadata
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainingArguments

LENGTH, ROWS = 256, 8  # tokens in a row, rows in a step


@dataclass(frozen=True)
class Job:
    """What a peer is given: a teacher's folder, how many layers go, text, tokens to train on, where to save."""

    teacher: Path
    removals: int
    text: Path
    tokens: int
    folder: Path


def versions() -> dict[str, str | None]:
    """Of the packages that are there."""
    found: dict[str, str | None] = {}
    for name in ("optipfair", "nvidia-modelopt", "trl"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model


def token_rows(job: Job) -> Tensor:
    """Documents in random order, joined by the end-of-text token and cut: token ids, [N, LENGTH]."""
    tokenizer = AutoTokenizer.from_pretrained(job.teacher)
    lines = job.text.read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(lines)
    ids: list[int] = []
    for line in lines:
        ids += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= job.tokens:
            break
    rows = job.tokens // LENGTH
    return torch.tensor(ids[: rows * LENGTH]).view(rows, LENGTH)


def save(student: PreTrainedModel, job: Job) -> None:
    student.to(torch.bfloat16).save_pretrained(job.folder)
    AutoTokenizer.from_pretrained(job.teacher).save_pretrained(job.folder)


def optipfair(job: Job) -> tuple[list[int], int]:
    """OptiPFair: layers by its own importance, removed and distilled by it; the layers kept, and the tokens."""
    from optipfair import analyze_layer_importance, distill_model, prune_model

    rows = token_rows(job)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(ROWS // 4)]
    teacher, student = load(job.teacher, torch.bfloat16), load(job.teacher, torch.float32)
    importance = analyze_layer_importance(student, DataLoader(batches[:8], batch_size=None), show_progress=False)
    removed = sorted(importance, key=importance.__getitem__)[: job.removals]
    student = prune_model(student, pruning_type="DEPTH", layer_indices=sorted(removed), show_progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        student = distill_model(student, teacher, DataLoader(batches, batch_size=None), epochs=1, show_progress=False)
    save(student, job)
    return [layer for layer in sorted(importance) if layer not in removed], rows.numel()


def modelopt(job: Job, student: PreTrainedModel) -> int:
    """NVIDIA Model-Optimizer's trainer: KL on logits; the tokens."""
    from modelopt.torch.distill.plugins.huggingface import KDTrainer

    rows = token_rows(job)
    with_teacher: dict[str, Any] = {"teacher_model": load(job.teacher, torch.bfloat16)}
    trainer = KDTrainer(
        model=student,
        args=TrainingArguments(**arguments(job)),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        distill_args=with_teacher,
    )
    trainer.train()
    save(student, job)
    return rows.numel()


def trl_gkd(job: Job, student: PreTrainedModel) -> int:
    """TRL's trainer for generalised knowledge distillation, on given text; the tokens."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = torch.tensor([example["input_ids"] for example in examples])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    rows = token_rows(job)
    trainer = GKDTrainer(
        model=student,
        teacher_model=load(job.teacher, torch.bfloat16),
        args=GKDConfig(**arguments(job), lmbda=0.0, beta=0.0, temperature=1.0, max_length=LENGTH),
        data_collator=collate,
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        processing_class=AutoTokenizer.from_pretrained(job.teacher),
    )
    trainer.train()
    save(student, job)
    return rows.numel()


def arguments(job: Job) -> dict[str, Any]:
    """What both trainers of transformers are given; all else is their default."""
    return {
        "output_dir": str(job.folder),
        "num_train_epochs": 1,
        "per_device_train_batch_size": ROWS,
        "bf16": True,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
        "seed": 0,
    }
