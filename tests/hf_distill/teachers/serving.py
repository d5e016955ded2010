"""A server that answers as vLLM's completions endpoint does, with a tiny model in this process."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor, nn

Answer = dict[str, Any]
DROP = 0  # the connection is closed without an answer


def bad_request(message: str, param: str | None = None, value: int = 0) -> Answer:
    if param is not None:
        message += f" (parameter={param}, value={value})"
    return {"message": message, "type": "BadRequestError", "param": param, "code": 400}


class Server:
    """What was asked, and how to answer.

    `faults` are used up in order, one a request for log-probabilities: a status, seconds of
    silence, text in place of the answer, or `DROP`. `change` edits each answer to one. `barrier`
    holds requests until so many are there.
    `max_model_len`, `max_logprobs` and `names` (`--served-model-name`) are vLLM's options; `card`
    is what else it lists of its model, None for a server without a list.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] = ("tiny", "m")) -> None:
        self.model, self.names = model.eval(), tuple(names)
        self.url = ""
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.faults: list[int | float | str | tuple[int, str]] = []
        self.change: Callable[[Answer], Any] | None = None
        self.barrier: threading.Barrier | None = None
        self.vocab_size: int = model.config.vocab_size
        self.max_model_len = 64
        self.max_logprobs = self.vocab_size
        self.card: dict[str, Any] | None = {"object": "model", "owned_by": "vllm", "parent": None}
        self.card |= {"root": f"/models/{self.names[0]}"}
        self.words: Callable[[int], str] = lambda i: f"<{i}>"
        self.connections: set[socket.socket] = set()
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()

    @torch.no_grad()
    def answer(self, asked: dict[str, Any]) -> Answer:
        prompt, k = asked["prompt"], asked.get("prompt_logprobs")
        logits = self.model(input_ids=torch.tensor([prompt])).logits[0].float()
        log_probs = logits.log_softmax(-1)
        choice: Answer = {"index": 0, "text": "x", "finish_reason": "length", "logprobs": None}
        choice["prompt_logprobs"] = None
        if k is not None:
            positions = zip(prompt[1:], log_probs, strict=False)
            choice["prompt_logprobs"] = [None, *(self._entries(*x, k) for x in positions)]
        if asked.get("logprobs") is not None:
            sampled = int(log_probs[-1].argmin())  # temperature 1 may draw any
            entries = self._entries(sampled, log_probs[-1], asked["logprobs"])
            key = "token_id:{}" if asked.get("return_tokens_as_token_ids") else "<{}>"
            top = {key.format(i): x["logprob"] for i, x in entries.items()}
            choice["logprobs"] = {
                "tokens": [key.format(sampled)],
                "token_logprobs": [top[key.format(sampled)]],
                "top_logprobs": [top],
            }
        return {"object": "text_completion", "model": asked["model"], "choices": [choice]}

    def _entries(self, own: int, log_probs: Tensor, k: int) -> dict[str, dict[str, Any]]:
        values, ids = log_probs.topk(min(k, len(log_probs)))
        rank = int((log_probs > log_probs[own]).sum()) + 1
        entries = {own: (log_probs[own].item(), rank)}  # comes first, whatever its rank
        ranked = zip(values.tolist(), range(1, k + 1), strict=False)
        entries |= dict(zip(ids.tolist(), ranked, strict=True))
        return {
            str(i): {"logprob": max(v, -9999.0), "rank": r, "decoded_token": self.words(i)}
            for i, (v, r) in entries.items()
        }

    def refusal(self, asked: dict[str, Any]) -> Answer | None:
        """What vLLM 0.32 says of a request that it does not take, word by word.

        `tests/hf_distill/servers/test_stand_in.py` compares it with what one has said.
        """
        prompt, room = asked["prompt"], self.max_model_len - len(asked["prompt"])
        if asked["model"] not in self.names:
            known = ", ".join(self.names)
            message = f"The model `{asked['model']}` does not exist. Valid aliases: {known}."
            return {"message": message, "type": "NotFoundError", "param": "model", "code": 404}
        if not prompt:
            return bad_request("You must pass at least one prompt")
        if room == 0:
            return bad_request("max_tokens must be at least 1, got 0.", "max_tokens", 0)
        if room < 0:
            return bad_request(
                f"This model's maximum context length is {self.max_model_len} tokens. However, "
                f"your prompt contains {len(prompt)} input tokens, which exceeds this limit even "
                "without any output tokens. Please reduce the length of the input prompt.",
                "input_tokens",
                len(prompt),
            )
        if max(prompt) >= self.vocab_size:
            return bad_request(f"Token id {max(prompt)} is out of vocabulary")
        for kind, words in (("prompt_logprobs", "prompt"), ("logprobs", "sample")):
            number = asked.get(kind) or 0
            if number > self.max_logprobs:
                return bad_request(
                    f"Requested {words} logprobs of {number}, which is greater than max allowed: "
                    f"{self.max_logprobs}",
                    kind,
                    number,
                )
        return None

    def respond(self, asked: dict[str, Any]) -> tuple[int, str]:
        scores = asked.get("prompt_logprobs") is not None
        with self._lock:
            fault = self.faults.pop(0) if self.faults and scores else None
        if isinstance(fault, float):
            time.sleep(fault)
        elif isinstance(fault, int):
            return fault, json.dumps({"error": {"message": f"fault {fault}", "code": fault}})
        elif isinstance(fault, tuple):
            return fault
        elif isinstance(fault, str):
            return 200, fault
        refusal = self.refusal(asked)
        if refusal is not None:
            return refusal["code"], json.dumps({"error": refusal})
        if self.barrier is not None:
            self.barrier.wait(timeout=10)
        with self._lock:
            made = self.answer(asked)
            if self.change is not None and scores:
                self.change(made)
        return 200, json.dumps(made)

    def listed(self, path: str) -> tuple[int, str]:
        """The answer to GET."""
        if path != "/v1/models" or self.card is None:
            return 404, json.dumps({"detail": "Not Found"})
        card = {"created": 1, "max_model_len": self.max_model_len} | self.card
        cards = [{"id": name} | card for name in self.names]
        return 200, json.dumps({"object": "list", "data": cards})

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            yield
        finally:
            with self._lock:
                self.under_way -= 1


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Server

    def setup(self) -> None:
        super().setup()
        self.state.connections.add(self.connection)

    def finish(self) -> None:
        self.state.connections.discard(self.connection)
        with suppress(OSError):  # it may have been cut
            super().finish()

    def do_GET(self) -> None:
        self._answer(*self.state.listed(self.path))

    def do_POST(self) -> None:
        state = self.state
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state.requests.append(asked)
        state.headers.append(dict(self.headers.items()))
        state.paths.append(self.path)
        with state.counted():
            status, text = state.respond(asked)
        if status == DROP:
            self.close_connection = True
            return
        self._answer(status, text)

    def _answer(self, status: int, text: str) -> None:
        body = text.encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            self.close_connection = True  # who asked did not wait

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def listening(state: Server, port: int = 0) -> Iterator[Server]:
    """The server, listening on a port of this machine inside the block; 0 is a free one.

    At its end connections are cut, as the end of a process cuts them.
    """
    handler = type("Handler", (Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        for connection in list(state.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        thread.join()


def serving(model: nn.Module, port: int = 0, names: Sequence[str] = ("tiny", "m")) -> Any:
    """A server with a model, listening as `listening` says."""
    return listening(Server(model, names), port)


def edit(**fields: Any) -> Callable[[Answer], None]:
    """Changes fields of the only choice; a function is given the old value."""

    def change(answer: Answer) -> None:
        choice = answer["choices"][0]
        for name, value in fields.items():
            choice[name] = value(choice[name]) if callable(value) else value

    return change


def each_entry(make: Callable[[dict], dict]) -> Callable[[Answer], None]:
    """Changes the entries of each position."""
    return edit(prompt_logprobs=lambda positions: [x and make(x) for x in positions])
