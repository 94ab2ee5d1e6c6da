"""Servers that give log-probabilities, each in its own form: small ones on 127.0.0.1 that serve a tiny student."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.export.conftest import Call

Body = dict[str, Any]


class Served:
    """A checkpoint behind the endpoints of one of the servers; `Served.requests` has what was asked."""

    def __init__(self, folder: Path, most: int = 20) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.most = most
        self.requests: list[str] = []

    owner = "someone"

    @torch.no_grad()
    def log_probs(self, ids: list[int]) -> Tensor:
        return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def checked(self, count: int) -> int:
        if count > self.most:
            raise ValueError(f"at most {self.most} log-probabilities")
        return count

    def continued(self, ids: list[int], count: int) -> str:
        new: list[int] = []
        for _ in range(count):
            new.append(int(self.log_probs(ids + new)[-1].argmax()))
        return str(self.tokenizer.decode(new))

    def answer(self, path: str, body: Body) -> Any:
        self.requests.append(path)
        if path == "/v1/models":
            return {"data": [{"id": "tiny", "owned_by": self.owner}]}
        if path == "/health":
            return {}
        if path == "/tokenize":
            return self.tokenize(body)
        if path == "/v1/completions" and body["model"] == "tiny":
            return {"choices": [self.completion(body)]}
        return self.own(path, body)

    def completion(self, body: Body) -> Body:
        return {"text": self.continued(body["prompt"], body["max_tokens"])}

    def tokenize(self, body: Body) -> Body:
        raise KeyError("/tokenize")

    def own(self, path: str, body: Body) -> Body:
        raise KeyError(path)


class LikeVllm(Served):
    owner = "vllm"

    def tokenize(self, body: Body) -> Body:
        return {"tokens": self.tokenizer(body["prompt"])["input_ids"], "count": 0}

    def completion(self, body: Body) -> Body:
        if "prompt_logprobs" not in body:
            return super().completion(body)
        count, ids = self.checked(body["prompt_logprobs"]), body["prompt"]
        given: list[Body | None] = [None]
        for row, token in zip(self.log_probs(ids)[:-1], ids[1:], strict=True):
            likely = {*row.topk(count).indices.tolist(), token}
            given.append({str(each): {"logprob": row[each].item(), "rank": 1} for each in likely})
        return {"text": "", "prompt_logprobs": given}


class LikeSglang(Served):
    owner = "sglang"

    def own(self, path: str, body: Body) -> Body:
        if path != "/generate":
            raise KeyError(path)
        assert body["return_logprob"] and body["logprob_start_len"] == 0
        rows = self.log_probs(body["input_ids"])[:-1].topk(self.checked(body["top_logprobs_num"]))
        pairs = zip(rows.values.tolist(), rows.indices.tolist(), strict=True)
        likely = [[[value, token, None] for value, token in zip(*row, strict=True)] for row in pairs]
        return {"text": "", "meta_info": {"input_top_logprobs": [None, *likely]}}


class WithEcho(Served):
    """OpenAI's old form, with tokens as text; ids of tokens only where they are asked for and known."""

    knows_ids = False

    def completion(self, body: Body) -> Body:
        if "logprobs" not in body:
            return super().completion(body)
        assert body["echo"]
        ids, count = body["prompt"], self.checked(body["logprobs"])
        rows = self.log_probs(ids)[:-1]
        likely = [{self.name(token): row[token].item() for token in row.topk(count).indices.tolist()} for row in rows]
        own = [row[token].item() for row, token in zip(rows, ids[1:], strict=True)]
        return {"text": "", "logprobs": {"top_logprobs": [None, *likely], "token_logprobs": [None, *own]}}

    def name(self, token: int) -> str:
        return f"token_id:{token}" if self.knows_ids else str(self.tokenizer.decode([token]))


class WithEchoAndIds(WithEcho):
    knows_ids = True


class LikeLlamaServer(Served):
    owner = "llamacpp"

    def tokenize(self, body: Body) -> Body:
        assert body["add_special"]
        return {"tokens": self.tokenizer(body["content"])["input_ids"]}

    def own(self, path: str, body: Body) -> Body:
        if path != "/completion":
            raise KeyError(path)
        assert body["n_predict"] == 1 and body["temperature"] == 0
        row = self.log_probs(body["prompt"])[-1].topk(body["n_probs"])
        likely = [{"id": i, "logprob": v} for v, i in zip(row.values.tolist(), row.indices.tolist(), strict=True)]
        return {"content": "", "completion_probabilities": [{"top_logprobs": likely}]}


@contextmanager
def serving(served: Served) -> Iterator[str]:
    """Serves on a free port; gives the address."""

    class Handler(BaseHTTPRequestHandler):
        def respond(self, body: Body) -> None:
            try:
                status, said = 200, served.answer(self.path, body)
            except (KeyError, ValueError) as error:
                status, said = (400 if isinstance(error, ValueError) else 404), {"error": str(error)}
            content = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.respond({})

        def do_POST(self) -> None:
            self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


FORMS: dict[str, tuple[Callable[[Path], Served], str]] = {
    "vLLM": (LikeVllm, "/v1/completions"),
    "SGLang": (LikeSglang, "/generate"),
    "llama-server": (LikeLlamaServer, "/completion"),
    "echo": (WithEcho, "/v1/completions"),
    "echo with ids": (WithEchoAndIds, "/v1/completions"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_server_is_right_in_each_form(form: str, student: Path, command: Call) -> None:
    make, path = FORMS[form]
    served = make(student)
    with serving(served) as address:
        code, out, err = command(
            "verify", student, "--against", f"{address}/v1", "--tokens", "64", "--precision", "fp32"
        )
    assert code == 0, (out, err)
    assert "greedy text  the same" in out and path in served.requests
    assert ("its tokenizer was not compared" in out) == (form not in ("vLLM", "llama-server"))


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_server_is_caught_in_each_form(form: str, student: Path, windowed: Path, command: Call) -> None:
    """It serves another model."""
    with serving(FORMS[form][0](windowed)) as address:
        code, out, _ = command("verify", student, "--against", address, "--tokens", "200", "--json")
    (said,) = json.loads(out)
    assert code == 1 and said["causes"][-1].startswith("window pattern: the error begins at token")
    assert said["runtime"] == (form if form in ("vLLM", "SGLang", "llama-server") else f"the server at {address}")


def test_a_server_that_refuses_many_is_asked_for_fewer(student: Path, command: Call) -> None:
    served = LikeVllm(student, most=5)
    with serving(served) as address:
        code, out, _ = command("verify", student, "--against", address, "--tokens", "64")
    assert code == 0 and "does not say its precision: the limits are those of 16-bit" in out
    assert served.requests.count("/v1/completions") == 5  # 100, 50, 20, 5 log-probabilities, and the greedy text


def test_a_server_without_log_probabilities_is_told(student: Path, command: Call) -> None:
    with serving(Served(student)) as address:
        code, _, err = command("verify", student, "--against", address, "--tokens", "64")
    assert code == 1 and f"{address} gives no log-probabilities of a text" in err
    assert "vLLM, SGLang and llama-server give them" in err
