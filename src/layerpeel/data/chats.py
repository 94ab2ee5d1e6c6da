"""Chats: lists of messages in the forms that data sets have, and as text by a tokenizer's chat template."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from layerpeel.data.cells import TableRow, column_of, located
from layerpeel.errors import InputError

Messages = list[dict[str, Any]]

TEXT_PARTS = ("text", "input_text", "output_text")  # types of the parts of a content that are text
# ShareGPT's names of who speaks, beside the roles themselves.
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
HINT = 'a message looks like {"role": "user", "content": "..."} or {"from": "human", "value": "..."}'


def messages_of(row: TableRow, column: str, where: str) -> Messages:
    """A row's chat in a column, as messages with a role and a content that is text.

    The parts of a content that is a list are joined; `from` and `value` (ShareGPT) become role and content.

    Raises:
        InputError: the column is absent, or holds something other than messages of text.
    """
    messages = column_of(row, column, where)
    where = f"{located(row, where)}: column '{column}'"
    if not isinstance(messages, list):
        raise InputError(
            f"{where} holds {type(messages).__name__}, expected a list of messages",
            hint='a chat looks like [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
        )
    return [_message(message, f"{where}, message {number}") for number, message in enumerate(messages, start=1)]


def write_chat(messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str, *, to_go_on: bool = False) -> str:
    """A chat as text, by the tokenizer's chat template, with its special tokens.

    Args:
        to_go_on: whether it ends with what the assistant's next message begins with.

    Raises:
        InputError: there is no template, or it refuses the chat.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: it holds chats, and the tokenizer has no chat template to write them with",
            hint="give text in place of chats, or put the chat template of the model into the teacher's folder",
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=to_go_on))
    except Exception as error:  # a template is a program, and may raise anything
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"{where}: the tokenizer's chat template refuses a chat of {roles} ({error})",
            hint="leave such chats out, or bring them to the form that the model was trained on",
        ) from None


def _message(message: Any, where: str) -> dict[str, Any]:
    # Tables give every message all the keys that any message has, with None; templates expect them to be absent.
    fields = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    if "role" not in fields and isinstance(fields.get("from"), str) and isinstance(fields.get("value"), str):
        return _from_sharegpt(fields, where)
    if isinstance(fields.get("content"), list) and all(isinstance(part, dict) for part in fields["content"]):
        fields["content"] = "".join(_part(part, where) for part in fields["content"])
    is_text = isinstance(fields.get("content"), str) or bool(fields.get("tool_calls"))
    if not isinstance(fields.get("role"), str) or not is_text:
        keys = f"a mapping of {', '.join(map(str, message)) or 'nothing'}" if isinstance(message, dict) else ""
        raise InputError(
            f"{where}: expected a role and a content, both text; found {keys or type(message).__name__}", hint=HINT
        )
    return fields


def _from_sharegpt(fields: dict[str, Any], where: str) -> dict[str, Any]:
    if fields["from"] not in ROLES:
        raise InputError(
            f"{where}: from '{fields['from']}', expected one of {', '.join(ROLES)}",
            hint="leave such chats out, or write them as role and content with the roles of the chat template",
        )
    return {"role": ROLES[fields["from"]], "content": fields["value"]}


def _part(part: dict[str, Any], where: str) -> str:
    if part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    raise InputError(
        f"{where}: a part of its content is of type '{part.get('type')}', and only text is read",
        hint='a part of text looks like {"type": "text", "text": "..."}; leave chats with images or audio out',
    )
