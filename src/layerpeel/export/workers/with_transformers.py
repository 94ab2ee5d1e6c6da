"""A checkpoint in this Python's transformers, of whichever version, computed in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers


class Runtime:
    """See `exchange`."""

    def __init__(self, request: dict[str, Any]) -> None:
        remote = {"trust_remote_code": request["trust_remote_code"]}
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(request["model"], **remote)
        except ValueError:  # transformers 4 does not know the class that 5 names (TokenizersBackend)
            self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(request["model"])
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(request["model"], **remote).float().eval()
        self.version = f"transformers {transformers.__version__}"
        quantised = getattr(self.model.config, "quantization_config", None)
        self.precision = None if quantised else "fp32"
        config = self.model.config.get_text_config()
        self.facts = {"layers": config.num_hidden_layers}
        scaling = getattr(config, "rope_parameters", None) or {}
        base = scaling.get("rope_theta", getattr(config, "rope_theta", None))
        if base is not None:
            self.facts["rope_theta"] = base
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        self.facts["separate_head"] = head.weight.data_ptr() != embedding.weight.data_ptr()

    def token_ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    @torch.no_grad()
    def logits(self, ids: list[int]) -> np.ndarray:
        return self.model(torch.tensor([ids])).logits[0].float().numpy()
