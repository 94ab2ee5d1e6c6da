"""The student as it is meant: its folder, loaded by transformers here, computed in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from layerpeel.export.verify.answers import Question
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.loading import load_model


class Reference:
    """A student's own next-token distributions; what was computed for a question is kept for the next runtime.

    Args:
        folder: a checkpoint.
        dtype: to compute in.

    Raises:
        InputError: it cannot be loaded.
    """

    def __init__(self, folder: Path | str, dtype: str = "float32", *, trust_remote_code: bool = False) -> None:
        model, self.tokenizer = load_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        self.layerwise = LayerwiseModel(model.eval())
        self.config = model.config
        self._hidden: tuple[Question, Tensor] | None = None
        self._continued: tuple[Question, list[int]] | None = None

    @torch.no_grad()
    def log_probs(self, question: Question) -> Iterator[Tensor]:
        """The student's distributions at the compared positions: [N, V] in fp32, some positions at a time."""
        if self._hidden is None or self._hidden[0] is not question:
            hidden = self.layerwise.forward_with_skips(torch.tensor([question.token_ids]))[0, 0]
            self._hidden = question, hidden[question.positions]
        for rows in self._hidden[1].split(self.layerwise.logit_rows()):
            yield self.layerwise.logits(rows).float().log_softmax(-1)

    def greedy(self, question: Question) -> list[int]:
        """The tokens that follow the prompt, each the most likely one, up to an end of text."""
        if self._continued is None or self._continued[0] is not question:
            self._continued = question, self._continue(question)
        return self._continued[1]

    @torch.no_grad()
    def _continue(self, question: Question) -> list[int]:
        ids, end = list(question.prompt), self._end_tokens()
        cache, unread = None, ids
        for _ in range(question.new_tokens):
            tokens = torch.tensor([unread], device=self.layerwise.device)
            output = self.layerwise.model(tokens, past_key_values=cache, use_cache=True)
            ids.append(int(output.logits[0, -1].argmax()))
            cache = output.past_key_values
            unread = ids[-1:] if cache is not None else ids
            if ids[-1] in end:
                break
        return ids[len(question.prompt) :]

    def text_of(self, ids: list[int]) -> str:
        """Token ids as text, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _end_tokens(self) -> set[int]:
        end = self.layerwise.model.generation_config.eos_token_id if self.layerwise.model.generation_config else None
        return set(end) if isinstance(end, list) else {end} if isinstance(end, int) else set()
