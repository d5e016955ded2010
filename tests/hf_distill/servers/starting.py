"""A real vLLM server on this machine, for as long as a block lasts."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2

from tests.hf_distill.servers import venvs

STARTS = 900  # seconds; 25 on two free cores
ENDS = 30
NAME = "smollm2"  # by which the server knows its model


class NotStarted(RuntimeError):
    """The server has ended, or does not answer."""


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _wait(process: subprocess.Popen, root: str, log: Path) -> None:
    until = time.monotonic() + STARTS
    with httpx2.Client(trust_env=False, verify=False) as client:
        while time.monotonic() < until and process.poll() is None:
            with suppress(httpx2.TransportError):
                if client.get(f"{root}/health").status_code == 200:
                    return
            time.sleep(0.5)
    raise NotStarted(f"vLLM does not answer (exit status {process.poll()}): {_end_of(log)}")


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def _end(process: subprocess.Popen) -> None:
    """End the server and its workers, which are of its process group."""
    for way in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, way)
        with suppress(subprocess.TimeoutExpired):
            process.wait(ENDS)


@contextmanager
def vllm_server(model: Path, folder: Path, **options: str | int) -> Iterator[str]:
    """Serve a folder with weights in float32; the URL up to "/v1".

    Args:
        model: of the folder.
        folder: for the log.
        **options: of `vllm serve`, with underscores.

    Raises:
        NotStarted: with the end of the log.
    """
    port, log = _free_port(), folder / "vllm.log"
    chosen = {"served_model_name": NAME, "dtype": "float32", "host": "127.0.0.1", "port": port}
    words = [venvs.python("vllm").with_name("vllm"), "serve", model, "--enforce-eager"]
    for name, value in (chosen | options).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    with open(log, "wb") as file:
        process = subprocess.Popen(
            words,
            env=venvs.environment("vllm"),
            cwd=folder,  # not the repository, whose folders it would import
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _end(process)
