"""The order of modules that ZeRO-3 plans by is that of a step, whatever ran before it.

An engine stands in that records and plans as DeepSpeed's does, so that no DeepSpeed is needed.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from hf_distill.models.prefetch_trace import RecordTraining
from hf_distill.trainers.restarts import RestartingTrainer
from tests.hf_distill.trainers import models


class Coordinator:
    """Records the modules of a forward and its backward; the next forward ends the record."""

    def __init__(self) -> None:
        self.record: list[str] | None = []
        self.planned: list[str] | None = None
        self.joined: set[int] = set()  # parameters that are whole now
        self.found_joined: list[bool] = []  # at the beginning of each forward

    def release_and_reset_all(self, module: nn.Module) -> None:
        self.joined -= {id(x) for x in module.parameters()}

    def is_record_trace(self) -> bool:
        return self.record is not None

    def _invalidate_trace(self) -> None:
        self.record = []

    def note(self, name: str) -> None:
        if self.record is not None:
            self.record.append(name)

    def reset_step(self) -> None:
        if self.record:
            self.planned, self.record = self.record, None


class Engine:
    """Has a hook of its own at the beginning of each forward, as DeepSpeed has."""

    def __init__(self) -> None:
        self.module, self.coordinator = nn.Linear(2, 2), Coordinator()
        offload = SimpleNamespace(get_param_coordinator=lambda: self.coordinator)
        self.optimizer = SimpleNamespace(parameter_offload=offload)
        self.module.register_forward_pre_hook(self.begin)
        self.module.register_forward_hook(lambda *_: self.coordinator.note("forward"))

    def begin(self, *_: Any) -> None:
        """Leaves what it joins so for a backward."""
        self.coordinator.reset_step()
        self.coordinator.found_joined.append(bool(self.coordinator.joined))
        self.coordinator.joined |= {id(x) for x in self.module.parameters()}

    def probe(self) -> None:
        with torch.no_grad():
            self.module(torch.ones(1, 2))

    def step(self) -> None:
        self.module(torch.ones(1, 2)).sum().backward()
        self.coordinator.note("backward")
        self.coordinator.joined.clear()


def follow(engine: Any) -> RecordTraining:
    wrapped = SimpleNamespace(engine=engine)
    accelerator: Any = SimpleNamespace(deepspeed_engine_wrapped=wrapped)
    callback = RecordTraining(accelerator)
    callback.on_train_begin(None, None, None)
    return callback


@pytest.mark.parametrize("probes", [0, 1, 3])
def test_the_plan_is_that_of_a_step(probes: int) -> None:
    engine = Engine()
    follow(engine)
    for _ in range(probes):
        engine.probe()
    assert engine.coordinator.planned is None
    engine.step()
    engine.probe()  # an evaluation behind it ends the record, and is in none
    engine.step()
    assert engine.coordinator.planned == ["forward", "backward"]


def test_a_forward_without_gradient_joins_anew() -> None:
    """What the one before left joined may be other values by now; a step goes on with it."""
    engine = Engine()
    follow(engine)
    for run in (engine.step, engine.probe, engine.probe, engine.step):
        run()
    assert engine.coordinator.found_joined == [False, False, False, True]


def test_a_forward_before_the_training_is_not_planned_by() -> None:
    engine = Engine()
    engine.probe()
    follow(engine)
    engine.step()
    engine.step()
    assert engine.coordinator.planned == ["forward", "backward"]


def test_without_it_a_probe_is_planned_by() -> None:
    engine = Engine()
    engine.probe()
    engine.step()
    assert engine.coordinator.planned == ["forward"]


def test_each_training_follows_the_engine_once() -> None:
    engine = Engine()
    hooks = engine.module._forward_pre_hooks
    before = len(hooks)
    callback = follow(engine)
    callback.on_train_begin(None, None, None)
    assert len(hooks) == before + 1
    callback.on_train_end(None, None, None)
    assert len(hooks) == before
    follow(SimpleNamespace(module=engine.module, optimizer=None))  # ZeRO-1, or no DeepSpeed
    follow(None)
    engine.optimizer.parameter_offload.get_param_coordinator = object  # of another DeepSpeed
    follow(engine)
    assert len(hooks) == before


@pytest.mark.parametrize("sharded", [False, True])
def test_trainers_of_sharded_parameters_have_it(sharded: bool) -> None:
    student = models.llama()
    trainer: Any = RestartingTrainer.__new__(RestartingTrainer)
    added: list[Any] = []
    trainer._put_callback = added.append
    run: Any = SimpleNamespace(
        student=student,
        teacher=None,
        teachers=[],
        sharded=sharded,
        in_16_bit=False,
        accelerator=SimpleNamespace(distributed_type=DistributedType.FSDP),
    )
    trainer._note_set_up(run)
    assert [type(x) for x in added if isinstance(x, RecordTraining)] == [RecordTraining] * sharded
