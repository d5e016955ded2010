"""How often a training step waits for its device: who asks for values, and why it must.

The CPU plays the device, with interpreted Triton kernels: what only CPUs do is switched off.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_distill.data.alignment import AlignmentMeter
from metal_ops import _registration
from metal_ops.backends.blocks import tail
from metal_ops.functional import sparse
from tests import tiny_runs
from tests.metal_ops.triton import interpreter
from tests.waits import Waits

PLACES = "hf_distill.data.sides.places"
FINITE = "hf_distill.trainers.distill_trainer.DistillTrainer.compute_loss"
STORED = "hf_distill.cache.columns.unpad_tokens"
CHECKED = "hf_distill.data.token_weights.TokenWeights._checked"
LEFT_OUT = "hf_distill.monitoring.metrics.TokenMeter.add"
WHY = {
    PLACES: "the number of scored tokens is the size of tensors: once for each side",
    FINITE: "a loss that is not finite must not reach the weights",
    STORED: "a cache's columns must have as many tokens as are scored",
    CHECKED: "weights of a user must be finite: where they are summed, and where they are used",
    LEFT_OUT: "metrics are of the tokens that count; where all do, nothing is asked",
}
LOG = {
    "hf_distill.data.alignment.AlignmentMeter.read": 1,
    "hf_distill.monitoring.metrics.TokenMeter.read": 1,
    "hf_distill.monitoring.metrics._total": 3,  # hints cut, hints dropped, batches unscored
}
PROBE = {  # of the watchdog, which asks a teacher that is a model again
    "hf_distill.monitoring.probes.DriftProbe._said": 1,
    "hf_distill.monitoring.probes.DriftProbe.read": 1,
}

HINTED = {"opsd": True, "teacher": "base", "data": "hints", "on_policy": False}
HIDDEN = {"hidden_layers": "uniform", "hidden_weight": 1.0}

# Arguments of `tests.tiny_runs.make`; waits of a step of one micro-batch; more of a step that logs
KINDS: dict[str, tuple[dict[str, Any], dict[str, int], dict[str, int]]] = {
    "kd": ({}, {PLACES: 1, FINITE: 1}, LOG | PROBE),
    "kd of two micro-batches": (
        {"gradient_accumulation_steps": 2},
        {PLACES: 2, FINITE: 2},
        LOG | PROBE,
    ),
    "kd by logits": ({"label_smoothing_factor": 0.1}, {PLACES: 1, FINITE: 1}, LOG | PROBE),
    "kd, clipped jsd": (
        {"divergence": "jsd", "clip": {"bound": 0.05, "level": "token_rescale"}},
        {PLACES: 1, FINITE: 1},
        LOG | PROBE,
    ),
    "kd of the teacher's top 8": (
        {"support": "teacher_topk", "top_k": 8},
        {PLACES: 1, FINITE: 1},
        LOG | PROBE,
    ),
    "kd with weights of rows": (
        {"data": "ids-weighted"},
        {PLACES: 1, FINITE: 1, LEFT_OUT: 1, CHECKED: 2},
        LOG | PROBE | {"hf_distill.monitoring.metrics.UnscoredMeter.read": 1},
    ),
    "kd with hidden states": ({"data": "ids", **HIDDEN}, {PLACES: 1, FINITE: 1}, LOG | PROBE),
    "opsd with hidden states": ({**HINTED, **HIDDEN}, {PLACES: 2, FINITE: 1}, LOG | PROBE),
    "cache": ({"teacher": "cached-default"}, {PLACES: 1, FINITE: 1, STORED: 1}, LOG),
}


@pytest.fixture(autouse=True)
def on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is done on a CPU only is not done."""
    if interpreter.MISSING or interpreter.DEVICE != "cpu":
        pytest.skip("the CPU plays the device: needs Triton (pip install triton), and no GPU")
    monkeypatch.setenv(interpreter.NAME, "1")
    monkeypatch.setattr(AlignmentMeter, "_is_costly", staticmethod(lambda batch: True))
    for module in (tail, _registration):
        monkeypatch.setattr(module, "may_ask", lambda x: False)
    monkeypatch.setattr(sparse, "ASSERTING", ("cpu",))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with np.errstate(all="ignore"):
        yield
    torch.set_num_threads(threads)


def waits_of_steps(folder: Path, **settings: Any) -> list[dict[str, int]]:
    """Who has waited in each optimizer step, from the taking of its batches to that of the next."""
    waits, starts = Waits(), []
    trainer = tiny_runs.make(folder, **{"per_device_train_batch_size": 2, **settings})
    take = trainer.get_batch_samples

    def taken(*args: Any) -> Any:
        starts.append(len(waits.sites))
        return take(*args)

    trainer.get_batch_samples = taken
    with waits.noted():
        trainer.train()
    return [waits.ours(start, end) for start, end in pairwise(starts)]


def both(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return dict(sorted({x: one.get(x, 0) + other.get(x, 0) for x in one | other}.items()))


@pytest.mark.parametrize("kind", KINDS)
def test_waits_of_a_step(kind, tmp_path):
    """The first step is left out: it looks at models and batches closely."""
    settings, step, log = KINDS[kind]
    assert step.keys() <= WHY.keys()
    _, second, third = waits_of_steps(tmp_path, **settings, logging_steps=3, max_steps=4)
    assert second == dict(sorted(step.items()))
    assert third == both(step, log)


def test_a_log_of_every_step_and_of_every_tenth(tmp_path):
    settings, step, log = KINDS["opsd with hidden states"]
    every = waits_of_steps(tmp_path / "1", **settings, logging_steps=1, max_steps=4)
    # the probe looks at the first, second, fourth log
    assert every[1:] == [both(step, log), both(step, LOG)]
    tenth = waits_of_steps(tmp_path / "10", **settings, logging_steps=10, max_steps=12)
    assert tenth[1:9] == [dict(sorted(step.items()))] * 8
    assert tenth[9:] == [both(step, log), dict(sorted(step.items()))]
