"""Odd checkpoints and odd rows for the fuzzers, each with what has to come of it: a value, or a refusal."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.families import VOCABULARY, save_tiny


@dataclass
class Checkpoint:
    """A model folder to be written.

    Attributes:
        tensors: of the file.
        fields: of config.json.
        files: others, by name.
        refused: whether loading has to refuse it; None if it may.
    """

    tensors: dict[str, Tensor]
    fields: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    refused: bool | None = False

    @classmethod
    def of(cls, folder: Path) -> Checkpoint:
        return cls(load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text()))

    def write(self, folder: Path) -> None:
        for path in folder.iterdir():
            if not path.name.startswith("tokenizer") or path.name in ODD_FILES:
                path.unlink()
        save_file(self.tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.fields))
        for name, content in self.files.items():
            (folder / name).write_text(content)

    def refuse(self, refused: bool | None) -> None:
        """A certain refusal outweighs one that may be."""
        self.refused = True if True in (self.refused, refused) else None if None in (self.refused, refused) else False


EXTRA = (
    "model.layers.0.self_attn.q_proj.weight_scale",
    "model.layers.6.mlp.up_proj.weight",
    "model.layers.1.mlp.up_proj.lora_A.weight",
    "base_model.model.model.embed_tokens.weight",
    "model.layers.2.mlp.up_proj.bias",
    "nonsense",
)
DTYPES = (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn, torch.bool)
SWITCHES: dict[str, Any] = {
    "output_attentions": True,
    "output_hidden_states": True,
    "use_cache": False,
    "return_dict": False,
    "attention_dropout": 0.5,
    "bos_token_id": None,
    "pad_token_id": VOCABULARY - 1,
    "torch_dtype": "bfloat16",
    "_name_or_path": "../../nowhere",
    "architectures": None,
    "task_specific_params": {"x": 1},
    "unknown": {"nested": [1]},
}
BROKEN: dict[str, Any] = {
    "num_hidden_layers": 5,
    "hidden_size": 33,
    "vocab_size": 10,
    "num_attention_heads": 0,
    "rope_scaling": {"rope_type": "none such"},
    "quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "model_type": 7,
    "hidden_act": "none such",
}
ODD_FILES = {
    "generation_config.json": '{"temperature": 0.3, "num_beams": 4, "eos_token_id": [2, 9]}',
    "README.md": "---\nx: [\n---",
    "special_tokens_map.json": "{}",
    "pytorch_model.bin": "not a pickle",
    "chat_template.jinja": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "preprocessor_config.json": "{}",
    "tokenizer.model": "x",
    ".DS_Store": "\0",
    "training_args.bin": "x",
}


def _extra(checkpoint: Checkpoint, pick: int) -> None:
    checkpoint.tensors[EXTRA[pick % len(EXTRA)]] = torch.ones(32, 32)
    checkpoint.refuse(True)


def _missing(checkpoint: Checkpoint, pick: int) -> None:
    del checkpoint.tensors[_name(checkpoint, pick)]
    checkpoint.refuse(True)


def _renamed(checkpoint: Checkpoint, pick: int) -> None:
    name = _name(checkpoint, pick)
    prefixes = ("", "module.", "_orig_mod.", "transformer.")
    checkpoint.tensors[prefixes[pick % 4] + name + ("" if pick % 4 else "_")] = checkpoint.tensors.pop(name)
    checkpoint.refuse(True)


def _dtype(checkpoint: Checkpoint, pick: int) -> None:
    """Floats of another width are what they are; other numbers, and those that need scales, are no weights."""
    name, dtype = _name(checkpoint, pick), DTYPES[pick % len(DTYPES)]
    checkpoint.tensors[name] = checkpoint.tensors[name].to(dtype)
    if dtype in DTYPES[3:]:
        checkpoint.refuse(None)


def _shape(checkpoint: Checkpoint, pick: int) -> None:
    name = _name(checkpoint, pick)
    checkpoint.tensors[name] = checkpoint.tensors[name][:-1].clone()
    checkpoint.refuse(True)


def _not_finite(checkpoint: Checkpoint, pick: int) -> None:
    tensor = checkpoint.tensors[_name(checkpoint, pick)]
    if tensor.dtype not in DTYPES[3:]:  # others cannot hold it
        tensor.view(-1)[0] = float("nan" if pick % 2 else "inf")
    checkpoint.refuse(None)  # refused, or as not finite as the weights make it


def _switch(checkpoint: Checkpoint, pick: int) -> None:
    name = list(SWITCHES)[pick % len(SWITCHES)]
    checkpoint.fields[name] = SWITCHES[name]


def _broken(checkpoint: Checkpoint, pick: int) -> None:
    name = list(BROKEN)[pick % len(BROKEN)]
    checkpoint.fields[name] = BROKEN[name]
    checkpoint.refuse(True)


def _side_file(checkpoint: Checkpoint, pick: int) -> None:
    name = list(ODD_FILES)[pick % len(ODD_FILES)]
    checkpoint.files[name] = ODD_FILES[name]


def _adapter(checkpoint: Checkpoint, pick: int) -> None:
    checkpoint.files["adapter_config.json"] = '{"peft_type": "LORA", "base_model_name_or_path": "x", "r": 4}'
    checkpoint.refuse(True)


def _name(checkpoint: Checkpoint, pick: int) -> str:
    names = sorted(name for name in checkpoint.tensors if name not in EXTRA)
    return names[pick % len(names)]


CHANGES = (_extra, _missing, _renamed, _dtype, _shape, _not_finite, _switch, _broken, _side_file, _adapter)
changes_of_checkpoints = st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, 10**6)), min_size=1, max_size=2)


def tiny_checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint.of(save_tiny(folder))


CELLS = st.one_of(
    st.sampled_from(
        [
            *("007", "1.50", "true", "False", "NA", "nan", "null", "None", "-0", "1e5", "1_000", "0x10", "9" * 30, "4"),
            *("2024-01-31", "12:30", "", " x ", "é", "e\u0301", "हिन्दी", "แมว", "a,b", 'say "x"', "x\ty", "=1+1", "#"),
            *("\ufeffx", "x\ny", "\u2028", "\x85", "\u200b", "'", "\\", "\\n", "[1]", '{"a": 1}', "{prompt}"),
        ]
    ),
    st.text(st.characters(exclude_characters="\r\0", exclude_categories=["Cs"]), max_size=8),
)
NUMBERS = st.sampled_from(
    ["0", "-0", "007", "1.50", "1e400", "1E5", "NaN", "Infinity", "true", "null", "12345678901234567890", "9" * 5000]
)


@dataclass
class Table:
    """A file of rows with one column, `target`, and what its cells are as text; None where they are no text."""

    name: str
    content: bytes
    cells: list[str | None]


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Files of each kind, with and without a byte order mark, with each line end."""
    ending, newline = (
        draw(st.sampled_from(["csv", "tsv", "jsonl", "json", "CSV"])),
        draw(st.sampled_from(["\n", "\r\n"])),
    )
    start = draw(st.sampled_from(["", "\ufeff"]))
    if ending.lower() in ("csv", "tsv"):
        cells = draw(st.lists(CELLS, min_size=1, max_size=4))
        file = io.StringIO(newline="")
        writer = csv.writer(file, delimiter="\t" if ending == "tsv" else ",", lineterminator=newline)
        writer.writerows([["id", "target"], *([f"r{index}", cell] for index, cell in enumerate(cells))])
        return Table(f"rows.{ending}", (start + file.getvalue()).encode(), list(cells))
    values = draw(st.lists(CELLS.map(_string) | NUMBERS.map(_number), min_size=1, max_size=4))
    rows = [f'{{"target": {written}}}' for written, _ in values]
    text = newline.join(rows) if ending == "jsonl" else "[" + f",{newline}".join(rows) + "]"
    return Table(f"rows.{ending}", (start + text).encode(), [cell for _, cell in values])


def _string(text: str) -> tuple[str, str | None]:
    return json.dumps(text), text


def _number(written: str) -> tuple[str, str | None]:
    return written, None if written in ("null", "NaN") else written


PARTS = st.one_of(
    st.text(max_size=5).map(lambda text: ({"type": "text", "text": text}, text)),
    st.just(({"type": "image", "url": "x.png"}, None)),
    st.just(({"type": "text"}, None)),
    st.sampled_from([None, 3, [], "x"]).map(lambda part: (part, None)),
)
CONTENTS = st.one_of(
    st.text(max_size=6).map(lambda text: (text, text)),
    st.lists(PARTS, min_size=1, max_size=3).map(
        lambda parts: ([part for part, _ in parts], _joined([text for _, text in parts]))
    ),
    st.sampled_from([None, 3, {"text": "x"}, True]).map(lambda content: (content, None)),
)


def _joined(texts: list[str | None]) -> str | None:
    return None if None in texts else "".join(text for text in texts if text is not None)
