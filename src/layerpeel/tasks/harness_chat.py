"""Chat templates as lm-evaluation-harness's own model class for transformers applies them."""

from __future__ import annotations

from collections.abc import Callable

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from layerpeel.errors import InputError


def chat_renderer(tokenizer: PreTrainedTokenizerBase, template: bool | str, where: str) -> Callable[..., str]:
    """What makes a text of a list of messages.

    A template that takes no system turn is given the other turns alone.

    Args:
        template: True, or the name of one of the tokenizer's templates.

    Raises:
        InputError: the tokenizer has no such template.
    """
    _check_template(tokenizer, template, where)

    def render(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        def rendered(messages: list[dict[str, str]]) -> str:
            return str(
                tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

        try:
            return rendered(history)
        except TemplateError:
            return rendered([message for message in history if message["role"] != "system"])

    return render


def _check_template(tokenizer: PreTrainedTokenizerBase, template: bool | str, where: str) -> None:
    templates = tokenizer.chat_template
    if not templates:
        raise InputError(
            f"{where}: apply_chat_template: the tokenizer has no chat template",
            hint="leave apply_chat_template out, or give the tokenizer a template",
        )
    # The harness takes the tokenizer's default whatever name it is given, so that only that one has a number to equal.
    if isinstance(templates, dict) and ("default" not in templates or template not in (True, "default")):
        raise InputError(
            f"{where}: apply_chat_template: {template}: of several templates, lm-evaluation-harness applies only the "
            "one named 'default'",
            hint=f"the tokenizer has {', '.join(sorted(templates))}; make yours its only one, or its 'default'",
        )
