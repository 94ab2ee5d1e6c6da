"""A folder with model.onnx and tokenizer.json, as optimum writes it, in this Python's ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Runtime:
    """See `exchange`."""

    def __init__(self, request: dict[str, Any]) -> None:
        folder = Path(request["model"])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        self.version = f"ONNX Runtime {onnxruntime.__version__}"
        output = next(each for each in self.session.get_outputs() if each.name == "logits")
        self.precision = "16-bit" if "16" in output.type else "fp32"
        self.facts: dict[str, Any] = {}

    def token_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def logits(self, ids: list[int]) -> np.ndarray:
        return self.session.run(["logits"], self._inputs(ids))[0][0].astype(np.float32)

    def _inputs(self, ids: list[int]) -> dict[str, np.ndarray]:
        """The ids as the whole text, with empty caches."""
        row = np.array([ids], dtype=np.int64)
        named = {"input_ids": row, "attention_mask": np.ones_like(row), "position_ids": np.arange(len(ids))[None]}
        inputs = {}
        for each in self.session.get_inputs():
            if each.name in named:
                inputs[each.name] = named[each.name]
            else:  # past_key_values.N.key: [batch, heads, past, width], of which batch and past have names, not sizes
                shape = [1 if i == 0 else size if isinstance(size, int) else 0 for i, size in enumerate(each.shape)]
                inputs[each.name] = np.zeros(shape, dtype=DTYPES[each.type])
        return inputs
