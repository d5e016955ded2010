"""A server that answers as vLLM's completions endpoint does, with a tiny model in this process."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import nn

Answer = dict[str, Any]
DROP = 0  # the connection is closed without an answer


class Server:
    """What was asked, and how to answer.

    `faults` are used up in order, one a request: a status, seconds of silence, text in place of the
    answer, or `DROP`. `change` edits each answer. `barrier` holds requests until so many are there.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self.url = ""
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.faults: list[int | float | str | tuple[int, str]] = []
        self.change: Callable[[Answer], Any] | None = None
        self.barrier: threading.Barrier | None = None
        self._lock = threading.Lock()

    @torch.no_grad()
    def answer(self, asked: dict[str, Any]) -> Answer:
        prompt, k = asked["prompt"], asked["prompt_logprobs"]
        logits = self.model(input_ids=torch.tensor([prompt])).logits[0].float()
        positions: list[dict | None] = [None]
        for own, log_probs in zip(prompt[1:], logits.log_softmax(-1), strict=False):
            values, ids = log_probs.topk(min(k, len(log_probs)))
            rank = int((log_probs > log_probs[own]).sum()) + 1
            entries = {own: (log_probs[own].item(), rank)}  # comes first, whatever its rank
            entries |= dict(
                zip(ids.tolist(), zip(values.tolist(), range(1, k + 1), strict=False), strict=True)
            )
            positions.append(
                {
                    str(i): {"logprob": max(v, -9999.0), "rank": r, "decoded_token": f"<{i}>"}
                    for i, (v, r) in entries.items()
                }
            )
        choice = {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": positions}
        return {"object": "text_completion", "model": asked["model"], "choices": [choice]}

    def respond(self, asked: dict[str, Any]) -> tuple[int, str]:
        with self._lock:
            fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, float):
            time.sleep(fault)
        elif isinstance(fault, int):
            return fault, json.dumps({"error": {"message": f"fault {fault}", "code": fault}})
        elif isinstance(fault, tuple):
            return fault
        elif isinstance(fault, str):
            return 200, fault
        if self.barrier is not None:
            self.barrier.wait(timeout=10)
        with self._lock:
            made = self.answer(asked)
            if self.change is not None:
                self.change(made)
        return 200, json.dumps(made)


@contextmanager
def serving(model: nn.Module) -> Iterator[Server]:
    """The server, listening on a free port of this machine inside the block."""
    state = Server(model)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.requests.append(asked)
            state.headers.append(dict(self.headers.items()))
            state.paths.append(self.path)
            status, text = state.respond(asked)
            if status == DROP:
                self.close_connection = True
                return
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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


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
