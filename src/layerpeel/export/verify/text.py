"""The fixed text that runtimes are compared on, and the positions of it at which they are."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from layerpeel.errors import InputError
from layerpeel.export.verify.answers import Question
from layerpeel.model.config_fields import attention_reach, context_length

FIXED_TEXT = Path(__file__).with_name("fixed_text.txt")
LEAST_TOKENS, BEYOND_WINDOW, MOST_TOKENS = 512, 256, 8192 + 256
# Positions that are compared: the first, those around the end of a window, and some between, since some runtimes take
# a request for each.
FIRST, BEFORE_WINDOW, AFTER_WINDOW, BETWEEN = 64, 32, 96, 128


def read_text(path: Path | None) -> str:
    """The text of a file; the bundled one, which has prose, code, tables and several languages, if None.

    Raises:
        InputError: the file is empty or cannot be read.
    """
    try:
        text = (path or FIXED_TEXT).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text {path}: it cannot be read ({error})", hint="give a text file in UTF-8") from None
    if not text.strip():
        raise InputError(f"--text {path}: it is empty", hint="give a file with some hundred words")
    return text


def make_question(
    text: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, tokens: int | None = None
) -> Question:
    """Makes a question of a text that is repeated and cut until it is longer than any window of attention.

    Args:
        tokens: T at the most; by the model's window and context, if None.

    Raises:
        InputError: fewer than three tokens come of it.
    """
    context, window = context_length(config) or MOST_TOKENS, attention_reach(config) or 0
    wanted = min(tokens or min(max(LEAST_TOKENS, window + BEYOND_WINDOW), MOST_TOKENS), context)
    ids = tokenizer(text)["input_ids"]
    copies = -(-2 * wanted // max(len(ids), 1)) if len(ids) < wanted else 1
    repeated = "\n".join([text] * copies)
    passage = _first_tokens(repeated, tokenizer, wanted)
    ids = list(tokenizer(passage)["input_ids"])
    if len(ids) < 3:
        raise InputError(f"--text: it has {len(ids)} tokens", hint="give a file with some hundred words")
    return Question(passage, ids, compared_positions(len(ids), window))


def _first_tokens(text: str, tokenizer: PreTrainedTokenizerBase, wanted: int) -> str:
    """The longest start of a text that has so many tokens at the most."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if len(tokenizer(text[:middle])["input_ids"]) <= wanted:
            low = middle
        else:
            high = middle - 1
    return text[:low]


def compared_positions(length: int, window: int) -> list[int]:
    """Positions whose next tokens are compared, ascending; the last has no next token."""
    last = length - 1
    around = range(max(window - BEFORE_WINDOW, 0), min(window + AFTER_WINDOW, last)) if window else range(0)
    return sorted({*range(min(FIRST, last)), *range(0, last, max(last // BETWEEN, 1)), *around})
