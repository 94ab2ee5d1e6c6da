"""A checkpoint in this Python's vLLM, in the dtype that the request names."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import vllm

MOST = 50  # log-probabilities at each position: vLLM makes an object of each
MEMORY_ON_CPU = 0.4  # share of the machine's memory: vLLM refuses to start if less is free than it may take


class Runtime:
    """See `exchange`."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.dtype = request["dtype"] or "float32"
        self.engine = vllm.LLM(
            model=request["model"],
            dtype=self.dtype,
            max_model_len=len(request["token_ids"]) + request["new_tokens"],
            max_num_seqs=1,
            max_logprobs=MOST,
            enforce_eager=True,
            gpu_memory_utilization=MEMORY_ON_CPU if vllm.platforms.current_platform.is_cpu() else 0.9,
            enable_prefix_caching=False,
            trust_remote_code=request["trust_remote_code"],
            seed=0,
        )
        self.version = f"vLLM {vllm.__version__}"
        self.precision = self.dtype
        self.facts: dict[str, Any] = {}

    def token_ids(self, text: str) -> list[int]:
        return self.engine.get_tokenizer()(text)["input_ids"]

    def top(self, ids: list[int], count: int) -> tuple[np.ndarray, np.ndarray]:
        width = min(count, MOST) + 1  # the text's own next token comes with them
        sampling = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=width - 1)
        (output,) = self.engine.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
        top_ids, log_probs = np.full((len(ids), width), -1, dtype=np.int64), np.full((len(ids), width), -100.0)
        for place, given in enumerate(output.prompt_logprobs[1:]):
            for column, (token, value) in enumerate(given.items()):
                top_ids[place, column], log_probs[place, column] = token, value.logprob
        return top_ids, log_probs.astype(np.float32)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        sampling = vllm.SamplingParams(max_tokens=count, temperature=0)
        (output,) = self.engine.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    def seconds(self, ids: list[int], count: int) -> float:
        sampling = vllm.SamplingParams(max_tokens=count, min_tokens=count, ignore_eos=True, temperature=0)
        started = time.perf_counter()
        self.engine.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
        return time.perf_counter() - started
