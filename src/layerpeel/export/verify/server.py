"""Asks a server that speaks OpenAI's protocol: vLLM, SGLang, llama-server, and others that give log-probabilities.

Its address is one that the user named, or that of a llama.cpp started for this on 127.0.0.1. Forms that are tried, the
first that answers is taken:

1. `/v1/completions` with `prompt_logprobs` (vLLM);
2. `/generate` with `return_logprob` and `top_logprobs_num` (SGLang);
3. `/v1/completions` with `echo` and `logprobs` (OpenAI's old form);
4. `/completion` with `n_probs`, one position a request (llama-server), which reads on from its cache.

Shapes: P compared positions, K most likely tokens.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from layerpeel.errors import InputError, RunError, reason_of
from layerpeel.export.verify.answers import UNTOLD, Answers, Question, pack_top
from layerpeel.processes.progress import progress

Pairs = list[tuple[int, float]]
COUNTS = (100, 50, 20, 5)  # of log-probabilities to ask for: servers refuse more than their limit
SECONDS = 600.0


class Server:
    """The endpoints of one server.

    Args:
        address: with or without /v1 at the end.
        tokenizer: of the student, to tell which ids a server means that gives tokens as text.
        model: its name there; the first that the server lists, if not given.

    Raises:
        InputError: nothing answers there.
    """

    def __init__(self, address: str, tokenizer: PreTrainedTokenizerBase, model: str | None = None) -> None:
        self.address = re.sub(r"/v1/?$", "", address.rstrip("/"))
        self.tokenizer = tokenizer
        listed = self._get("/v1/models")
        models = listed.get("data") or [{}]
        self.model = model or models[0].get("id")
        self.name = {"llamacpp": "llama-server", "vllm": "vLLM", "sglang": "SGLang"}.get(
            str(models[0].get("owned_by")), f"the server at {self.address}"
        )

    def ask(self, question: Question) -> Answers:
        """Takes the first form that the server answers.

        Raises:
            RunError: it gives no log-probabilities in any.
        """
        forms: list[Callable[[Question], list[Pairs]]] = [
            self._prompt_logprobs,
            self._return_logprob,
            self._echo,
            self._one_by_one,
        ]
        refusals = []
        for form in forms:
            try:
                rows = form(question)
            except (Refused, KeyError, TypeError, IndexError, ValueError) as error:
                refusals.append(f"{form.__name__.strip('_')}: {reason_of(error)}")
                continue
            ids, log_probs = pack_top(rows)
            return Answers(self.name, None, self._token_ids(question.text), ids, log_probs, self._greedy(question))
        raise RunError(
            f"{self.address} gives no log-probabilities of a text ({'; '.join(refusals)})",
            hint="start it with log-probabilities on: vLLM, SGLang and llama-server give them",
        )

    def _token_ids(self, text: str) -> list[int] | None:
        """The text by the server's tokenizer: llama-server and vLLM have an endpoint for it."""
        body = {"model": self.model, "content": text, "prompt": text, "add_special": True, "add_special_tokens": True}
        try:
            return [int(token) for token in self._post("/tokenize", body)["tokens"]]
        except (Refused, KeyError, TypeError, ValueError):
            return None

    def _greedy(self, question: Question) -> str | None:
        body = {"prompt": question.prompt, "max_tokens": question.new_tokens, "temperature": 0}
        try:
            return str(self._post("/v1/completions", {"model": self.model} | body)["choices"][0]["text"])
        except (Refused, KeyError, IndexError, TypeError):
            return None

    def _prompt_logprobs(self, question: Question) -> list[Pairs]:
        body = {"model": self.model, "prompt": question.token_ids, "max_tokens": 1, "temperature": 0}
        response = self._with_most("/v1/completions", body, "prompt_logprobs", question.most_likely)
        given = response["choices"][0]["prompt_logprobs"]
        return [
            [(int(token), float(value["logprob"])) for token, value in given[place + 1].items()]
            for place in question.positions
        ]

    def _return_logprob(self, question: Question) -> list[Pairs]:
        body = {
            "input_ids": question.token_ids,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        response = self._with_most("/generate", body, "top_logprobs_num", question.most_likely)
        given = response["meta_info"]["input_top_logprobs"]
        return [[(int(token), float(value)) for value, token, *_ in given[place + 1]] for place in question.positions]

    def _echo(self, question: Question) -> list[Pairs]:
        body = {"model": self.model, "prompt": question.token_ids, "max_tokens": 1, "temperature": 0, "echo": True}
        body["return_tokens_as_token_ids"] = True
        response = self._with_most("/v1/completions", body, "logprobs", question.most_likely)
        logprobs = response["choices"][0]["logprobs"]
        likely, own_tokens = logprobs["top_logprobs"], logprobs["token_logprobs"]
        if len(own_tokens) < len(question.token_ids):
            raise Refused("it does not echo the text's tokens")
        rows = []
        for place in question.positions:
            pairs, next_token = self._with_ids(likely[place + 1] or {}), question.token_ids[place + 1]
            if all(token != next_token for token, _ in pairs):
                pairs.append((next_token, float(own_tokens[place + 1])))
            rows.append(pairs)
        return rows

    def _one_by_one(self, question: Question) -> list[Pairs]:
        rows = []
        # A token that ends no text and is whole in UTF-8: llama-server keeps no probabilities with another. The bias
        # decides which token it takes, not the probabilities, which are those before sampling.
        steered = next((t for t in question.token_ids if _is_plain(self.tokenizer.decode([t]))), question.token_ids[0])
        with progress("asking llama-server", len(question.positions)) as advance:
            for place in question.positions:
                body = {
                    "prompt": question.token_ids[: place + 1],
                    "n_predict": 1,
                    "n_probs": question.most_likely,
                    "temperature": 0.0,
                    "samplers": ["temperature"],
                    "cache_prompt": True,
                    "logit_bias": [[steered, 1000.0]],
                }
                likely = self._post("/completion", body)["completion_probabilities"][0]["top_logprobs"]
                rows.append([(int(each["id"]), _number(each["logprob"])) for each in likely])
                advance()
        return rows

    def _with_ids(self, by_text: dict[str, float]) -> Pairs:
        """Token ids of tokens given as text; `UNTOLD` where several tokens have that text."""
        pairs = []
        for text, value in by_text.items():
            numbered = re.fullmatch(r"token_id:(\d+)", text)
            pairs.append((int(numbered[1]) if numbered else self._ids_by_text.get(text, UNTOLD), _number(value)))
        return pairs

    @property
    def _ids_by_text(self) -> dict[str, int]:
        if not hasattr(self, "_texts"):
            texts = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))])
            counts: dict[str, int] = {}
            for text in texts:
                counts[text] = counts.get(text, 0) + 1
            self._texts = {text: token for token, text in enumerate(texts) if counts[text] == 1}
        return self._texts

    def _with_most(self, path: str, body: dict[str, Any], name: str, most: int) -> Any:
        """The answer for the largest count of log-probabilities that the server does not refuse."""
        for count in COUNTS:
            if count <= most:
                try:
                    return self._post(path, body | {name: count})
                except Refused as error:
                    refusal = error
        raise refusal

    def _get(self, path: str) -> Any:
        try:
            return request_json(self.address + path)
        except (Refused, ValueError) as error:
            raise InputError(
                f"{self.address}: it does not answer as an OpenAI-compatible server ({reason_of(error)})",
                hint="give the address of the server, such as http://127.0.0.1:8000",
            ) from None

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return request_json(self.address + path, body)


class Refused(Exception):
    """The server does not answer a request, or not as this form has it."""


def request_json(address: str, body: dict[str, Any] | None = None) -> Any:
    """What a server answers to a GET, or to a POST with a body.

    Raises:
        Refused: nothing that is JSON.
        ValueError: it is no address.
    """
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, content, {"Content-Type": "application/json"} if body else {})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        raise Refused(f"{error.code} {error.read(300).decode(errors='replace')}") from None
    except (OSError, json.JSONDecodeError) as error:
        raise Refused(reason_of(error)) from None


def _is_plain(text: str) -> bool:
    return text.strip().isascii() and text.strip().isalpha()


def _number(value: float | None) -> float:
    """A log-probability; JSON has none for minus infinity."""
    return float("-inf") if value is None else float(value)
