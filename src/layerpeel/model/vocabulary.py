"""Whether a tokenizer's ids have embeddings in its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.errors import InputError
from layerpeel.model.config_fields import text_config
from layerpeel.processes.progress import console, shown


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Checks that every token of text has an embedding; more embeddings than tokens are padding.

    Special tokens that were added for something else, such as images, may go without. They are said, and a text that
    holds one is refused when it is read.

    Raises:
        InputError: tokens of the tokenizer's own vocabulary go beyond the model's.
    """
    embeddings = model.get_input_embeddings()
    beyond = _tokens_beyond(tokenizer, embeddings.weight.shape[0], path)
    if beyond:
        names = ", ".join(map(shown, beyond[:3]))
        console.print(f"no embedding for {names}: a text that holds it is refused", soft_wrap=True)
        embeddings.register_forward_pre_hook(_Guard(embeddings.weight.shape[0], beyond))


def check_vocabulary_of(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """As `check_vocabulary`, by the model's config alone.

    Raises:
        InputError: tokens of the tokenizer's own vocabulary go beyond the model's.
    """
    rows = getattr(text_config(config), "vocab_size", None)
    if isinstance(rows, int):
        _tokens_beyond(tokenizer, rows, path)


def check_vocabulary_size(config: PretrainedConfig, path: str | Path) -> None:
    """Checks that there are tokens to choose from.

    Raises:
        InputError: a model knows one token or none, of which there is nothing to predict.
    """
    rows = getattr(text_config(config), "vocab_size", None)
    if isinstance(rows, int) and rows < 2:
        raise InputError(
            f"{path}: config.json gives the model a vocabulary of {rows} (vocab_size), which leaves nothing to predict",
            hint="take config.json from the model's publisher",
        )


class _Guard:
    """Refuses ids without an embedding, before a model is given them."""

    def __init__(self, rows: int, names: list[str]) -> None:
        self.rows, self.names = rows, names

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and inputs[0].device.type != "meta" and inputs[0].numel() and int(inputs[0].max()) >= self.rows:
            raise InputError(
                f"the text holds a token that the model has no embedding for ({', '.join(self.names[:3])})",
                hint="it stands for something other than text, such as an image; take it out of the text",
            )


def _tokens_beyond(tokenizer: PreTrainedTokenizerBase, rows: int, path: str | Path) -> list[str]:
    """Added special tokens without an embedding, by name.

    Raises:
        InputError: other tokens have none, either.
    """
    ids = tokenizer.get_vocab()
    beyond = sorted((name for name, token in ids.items() if token >= rows), key=ids.__getitem__)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    in_text = [name for name in beyond if name not in special]
    if in_text:
        raise InputError(
            f"{path}: tokenizer and model have different vocabularies: the tokenizer's ids go up to "
            f"{ids[beyond[-1]]}, the model embeds {rows} tokens (0 to {rows - 1}); text can hold "
            f"{', '.join(map(repr, in_text[:3]))}",
            hint="use the tokenizer that the model was trained with, or the model whose embeddings were resized for "
            "its added tokens",
        )
    return beyond
