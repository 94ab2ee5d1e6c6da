"""The requests of lm-evaluation-harness as its own model class for transformers (`HFLM`) runs them.

The tokenizer encodes as it is made to there: with its beginning- and end-of-text tokens, unless a text begins with the
first of them already. Nothing else in this package encodes that way (`inference.encoding`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from layerpeel.errors import InputError, reason_of
from layerpeel.inference.encoding import start_token
from layerpeel.inference.generation_options import FOLLOWED, changes_text
from layerpeel.inference.requests import Generation, LogLikelihood, Request

MAX_NEW_TOKENS = 256  # the harness's own default
HARNESS_OPTIONS = frozenset({"until", "max_gen_toks", "do_sample"})


def request_of(instance: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> Request:
    """The request that an instance of the harness's stands for.

    Raises:
        InputError: it has an option that cannot be followed, or no tokens to answer.
    """
    where = f"{where}: {instance.task_name}, document {instance.doc_id}"
    if instance.request_type == "generate_until":
        prompt, options = instance.args
        return _generation(prompt, generation_options(options, where), tokenizer, where)
    if instance.request_type == "loglikelihood_rolling":
        return LogLikelihood((start_token(tokenizer),), tuple(_encode(tokenizer, instance.args[0])))
    request = LogLikelihood(*_encode_pair(tokenizer, *instance.args))
    if not request.context or not request.continuation:
        part = "continuation" if request.context else "context"
        raise InputError(
            f"{where}: its {part} {instance.args[bool(request.context)]!r:.60} has no token of its own",
            hint="lm-evaluation-harness cannot answer it either: mend the document, or the task's target_delimiter",
        )
    return request


def generation_options(options: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """A task's `generation_kwargs` with the harness's defaults, as it would hand them to transformers.

    Raises:
        InputError: an option cannot be followed: it draws samples, say.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    options = dict(options or {})
    try:
        normal: dict[str, Any] = dict(normalize_gen_kwargs(options, MAX_NEW_TOKENS))
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: generation_kwargs: {reason_of(error)}", hint="mend the task's YAML") from None
    if normal["do_sample"] is not False:
        drawn = ", ".join(
            f"{name}: {options[name]}" for name in ("do_sample", "temperature") if name in (options or {})
        )
        raise InputError(f"{where} draws samples ({drawn}); answers here are greedy", hint="leave it out")
    until = normal["until"]
    if not all(isinstance(stop, str) and stop for stop in until):
        raise InputError(
            f"{where}: generation_kwargs: until is {until!r:.60}, expected texts that are not empty",
            hint="text ends before the first of these",
        )
    if normal["max_gen_toks"] < 1:
        raise InputError(
            f"{where}: generation_kwargs: max_gen_toks is {normal['max_gen_toks']}", hint="at least one token"
        )
    for name, value in normal.items():
        if changes_text(name, value) and name not in (*HARNESS_OPTIONS, *FOLLOWED):
            raise InputError(
                f"{where}: generation_kwargs: {name} is {value!r:.60}, which cannot be followed here",
                hint=f"answers are greedy; of the options that change them, {' and '.join(FOLLOWED[:2])} are followed",
            )
    return normal


def _generation(prompt: str, options: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> Generation:
    has_start = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    tokens = tuple(tokenizer.encode(prompt, add_special_tokens=not has_start))
    if not tokens:
        raise InputError(f"{where}: its prompt is empty", hint="lm-evaluation-harness cannot answer it either")
    end = tokenizer.eos_token_id
    stops = [*options["until"], *([] if end is None else [tokenizer.decode(end)])]
    passed = tuple((name, options[name]) for name in FOLLOWED if options.get(name) is not None)
    return Generation(tokens, options["max_gen_toks"], tuple(stop for stop in stops if stop), options=passed)


def _encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a context and of its continuation, which takes the context's trailing spaces."""
    if not context:
        tokens, prefix = tuple(tokenizer.encode(continuation, add_special_tokens=False)), (start_token(tokenizer),)
        return (prefix, tokens) if tokens[:1] != prefix else (prefix, tokens[1:])
    stripped = context.rstrip()
    context_tokens = _encode(tokenizer, stripped)
    return tuple(context_tokens), tuple(_encode(tokenizer, context + continuation)[len(context_tokens) :])


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    has_start = text.startswith(tokenizer.decode([start_token(tokenizer)]))
    return tokenizer.encode(text, add_special_tokens=not has_start)
