"""A server that is killed with SIGKILL again and again: nothing is lost, and bytes are the same."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill import DistillConfig, DistillTrainer, HiddenStateTeacher
from hf_distill.cache import HiddenStates, cache_teacher
from hf_distill.serving import HiddenStateServer
from hf_distill.serving.hidden_model import ModelQueue
from tests import processes
from tests.hf_distill.cache import caches
from tests.hf_distill.serving.conftest import serving
from tests.hf_distill.trainers import models

KILLS, STEPS = 20, 40


def _serve(port: int, sender: Connection) -> None:
    torch.set_num_threads(1)
    submit = ModelQueue.submit

    def told(self: Any, rows: Any) -> Any:
        sender.send("asked")
        return submit(self, rows)

    ModelQueue.submit = told
    server = HiddenStateServer(models.llama(1), port=port)
    sender.send(server.server_port)
    server.serve_forever()


class Victim:
    """A server in a process of its own, which always comes back at the same port."""

    def __init__(self, seed: int) -> None:
        self.kills, self.port = 0, 0
        self._chance, self._done = random.Random(seed), threading.Event()
        self._start()
        self.url = f"http://127.0.0.1:{self.port}"
        self._killer = threading.Thread(target=self._kill)

    def _start(self) -> None:
        context = processes.context()
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_serve, args=(self.port, sender), daemon=True)
        self._process.start()
        sender.close()
        assert self._receiver.poll(90)
        self.port = self._receiver.recv()

    def _asked(self, count: int) -> bool:
        """Wait for so many requests; False if there are no more."""
        while count:
            if self._receiver.poll(0.05):
                self._receiver.recv()
                count -= 1
            elif self._done.is_set():
                return False
        return True

    def _kill(self) -> None:
        while self.kills < KILLS and self._asked(self._chance.randrange(1, 3)):
            time.sleep(self._chance.uniform(0, 0.03))
            self._process.kill()
            self._process.join(30)
            self.kills += 1
            self._start()

    @contextmanager
    def killed(self) -> Iterator[None]:
        """Inside the block the server is killed some time after requests."""
        self._killer.start()
        try:
            yield
        finally:
            self._done.set()
            self._killer.join(120)
            self._process.kill()
            self._process.join(30)


@pytest.fixture
def victim() -> Victim:
    return Victim(5)


def train(folder: Path, url: str) -> tuple[list[float], dict[str, Tensor]]:
    teacher = HiddenStateTeacher(url, max_wait=120.0, backoff=0.02, timeout=20.0)
    config = DistillConfig(**models.options(folder, divergence="jsd", max_steps=STEPS))
    trainer = DistillTrainer(models.llama(), config, models.Pad(), models.rows(), teacher=teacher)
    trainer.train()
    teacher.close()
    found = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return found, models.weights(trainer.model)


@pytest.mark.slow
def test_a_training_over_twenty_kills(tmp_path: Path, victim: Victim) -> None:
    with victim.killed():
        found, weights = train(tmp_path / "killed", victim.url)
    assert victim.kills == KILLS
    with serving() as server:
        wanted, others = train(tmp_path / "straight", server.url)
    assert len(found) == STEPS
    assert found == wanted
    assert all(torch.equal(weights[name], others[name]) for name in others)


@pytest.mark.slow
def test_a_cache_over_twenty_kills(tmp_path: Path, victim: Victim) -> None:
    given: dict[str, Any] = {"data_collator": models.Pad(), "batch_size": 2, "shard_rows": 4}
    given["codec"] = HiddenStates("int8")
    rows = models.rows(80)
    teacher = HiddenStateTeacher(victim.url, max_wait=120.0, backoff=0.02, timeout=20.0)
    with victim.killed():
        cache_teacher(teacher, rows, tmp_path / "killed", **given)
    assert victim.kills == KILLS
    teacher.close()
    cache_teacher(models.llama(1), rows, tmp_path / "own", **given)
    assert caches.contents(tmp_path / "killed") == caches.contents(tmp_path / "own")
    head = (tmp_path / "killed/head.safetensors").read_bytes()
    assert head == (tmp_path / "own/head.safetensors").read_bytes()
