"""A folder with openvino_model.xml and tokenizer.json, as optimum writes it, in this Python's OpenVINO."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from tokenizers import Tokenizer


class Runtime:
    """See `exchange`."""

    def __init__(self, request: dict[str, Any]) -> None:
        folder = Path(request["model"])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        model = folder / "openvino_model.xml"
        compiled = openvino.Core().compile_model(str(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        self.names = {name for port in compiled.inputs for name in port.get_names()}
        self.inference = compiled.create_infer_request()
        self.version = f"OpenVINO {openvino.__version__.split('-')[0]}"
        types = set(re.findall(r'element_type="(u4|i4|u8|i8|bf16|f16|f32)"', model.read_text(encoding="utf-8")))
        compressed = {"u4": "4-bit", "i4": "4-bit", "u8": "8-bit", "i8": "8-bit", "bf16": "16-bit", "f16": "16-bit"}
        self.precision = next((word for name, word in compressed.items() if name in types), "fp32")
        self.facts: dict[str, Any] = {}

    def token_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def logits(self, ids: list[int]) -> np.ndarray:
        row = np.array([ids], dtype=np.int64)
        named = {
            "input_ids": row,
            "attention_mask": np.ones_like(row),
            "position_ids": np.arange(len(ids))[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        self.inference.reset_state()
        self.inference.infer({name: value for name, value in named.items() if name in self.names})
        return np.array(self.inference.get_tensor("logits").data[0], dtype=np.float32)
