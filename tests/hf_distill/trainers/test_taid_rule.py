"""How TAID's t moves: beside the paper's formula in a loop; what settings are taken and refused."""

import json
import math
from typing import Any

import pytest
from transformers import HfArgumentParser

from hf_distill import DistillConfig
from hf_distill.losses.taid import TaidConfig, TaidState, next_state

# falls, rises, stands still, jumps
LOSSES = [3.0, 2.5, 2.6, 2.1, 2.1, 1.0, 4.0, 3.9, 3.0, 2.8, 2.2, 2.0, 2.3, 1.9, 1.8, 0.9, 0.8, 1.2]
LOSSES += [0.7, 0.6]
# t moves faster than the linear target, also in a run of six steps
PUSHED = {"t_start": 0.5, "t_end": 0.95, "step_size": 0.8, "momentum": 0.9}
SLOWER = PUSHED | {"step_size": 0.15}


def by_hand(config: TaidConfig, losses: list[float], total: int) -> list[float]:
    """The t after each step, with the sigmoid as it is written."""
    t, momentum, last, found = config.t_start, 0.0, None, []
    for step, loss in enumerate(losses, start=1):
        linear = config.t_start + (config.t_end - config.t_start) * step / total
        if last is not None:
            change = (last - loss) / (last + 1e-15)
            momentum = config.momentum * momentum + (1 - config.momentum) * change
            added = config.step_size * (1 / (1 + math.exp(-momentum))) * (1 - t)
            t = min(config.t_end, max(linear, t + added))
        last = loss
        found.append(t)
    return found


@pytest.mark.parametrize(
    ("settings", "ahead"), [({}, 0), (PUSHED, 9), (SLOWER, 5), (SLOWER | {"momentum": 0.0}, 5)]
)
def test_t_moves_as_in_the_paper(settings: dict[str, float], ahead: int) -> None:
    config = TaidConfig(**settings)
    state, found = TaidState(config.t_start), []
    for step, loss in enumerate(LOSSES, start=1):
        state = next_state(config, state, loss, step / len(LOSSES))
        found.append(state.t)
    wanted = by_hand(config, LOSSES, len(LOSSES))
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 1e-14
    assert found == sorted(found)
    assert found[0] == config.t_start
    linear = [config.t_start + (config.t_end - config.t_start) * n / 20 for n in range(1, 21)]
    assert sum(a > b + 1e-3 for a, b in zip(found, linear, strict=True)) >= ahead
    assert found[1:] != linear[1:] if ahead else found[1:] == pytest.approx(linear[1:], abs=1e-12)


def test_a_smaller_loss_moves_t_further() -> None:
    config = TaidConfig(**PUSHED)
    before = TaidState(0.6, 0.0, 2.0)
    ts = [next_state(config, before, loss, 0.0).t for loss in (1.0, 2.0, 4.0, 1e6)]
    assert ts == sorted(ts, reverse=True)
    assert ts[1] == pytest.approx(0.6 + 0.8 * 0.5 * 0.4)
    assert ts[-1] == 0.6  # the average is far below 0: no overflow


def test_a_loss_of_zero_has_no_relative_change() -> None:
    """The KL to itself, t_start = 0: the change would be -1e15 and stay in the average."""
    config = TaidConfig(**PUSHED | {"t_start": 0.0})
    state = next_state(config, TaidState(0.0, 0.0, 0.0), 1.0, 0.1)
    assert (state.momentum, state.loss) == (0.0, 1.0)
    assert state.t == pytest.approx(0.4)


@pytest.mark.parametrize(("total", "ahead"), [(3900, False), (4200, True)])
def test_with_the_defaults_only_long_runs_get_ahead(total: int, ahead: bool) -> None:
    config = TaidConfig()
    state, found = TaidState(config.t_start), []
    for step in range(1, total + 1):
        state = next_state(config, state, 1.0, step / total)
        found.append(state.t - (0.4 + 0.6 * step / total))
    assert (max(found) > 1e-6) == ahead
    assert state.t == 1.0


def test_not_adaptive_it_is_linear() -> None:
    config = TaidConfig(t_start=0.2, t_end=0.8, adaptive=False)
    state = TaidState(0.2)
    for step, t in enumerate((0.35, 0.5, 0.65, 0.8), start=1):
        state = next_state(config, state, math.nan, step / 4)
        assert state == (pytest.approx(t), 0.0, None)
    config = TaidConfig(t_start=0.3, t_end=0.9, adaptive=False)
    assert next_state(config, state, math.nan, 1.0).t == 0.9  # the sum is rounded to more


@pytest.mark.parametrize("value", [{}, "{}", TaidConfig()])
def test_it_is_on_with_its_defaults(value: Any) -> None:
    made = DistillConfig(output_dir="out", report_to="none", taid=value)
    assert made.taid == TaidConfig(0.4, 1.0, 5e-4, 0.99, True)
    written = json.loads(made.to_json_string())["taid"]
    assert written == {
        "t_start": 0.4, "t_end": 1.0, "step_size": 5e-4, "momentum": 0.99, "adaptive": True
    }  # fmt: skip
    assert DistillConfig(output_dir="out", report_to="none", taid=written).taid == made.taid


def test_the_command_line_turns_it_on() -> None:
    words = ["--output_dir", "out", "--taid", '{"t_start": 0.1, "adaptive": false}']
    (parsed,) = HfArgumentParser(DistillConfig).parse_args_into_dataclasses(words)
    assert parsed.taid == TaidConfig(t_start=0.1, adaptive=False)
    (parsed,) = HfArgumentParser(DistillConfig).parse_args_into_dataclasses(words[:2])
    assert parsed.taid is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence": "jsd"}, "taid needs divergence 'forward_kl', got 'jsd'"),
        ({"divergence": "k3"}, "taid needs divergence 'forward_kl', got 'k3'"),
        ({"alpha": 0.0}, "taid is a soft loss and needs alpha > 0, got 0.0"),
        ({"taid": {"t_start": 1.2}}, r"taid.t_start must be in \[0, t_end = 1.0\], got 1.2"),
        ({"taid": {"t_start": 0.7, "t_end": 0.5}}, r"t_start must be in \[0, t_end = 0.5\], got"),
        ({"taid": {"t_start": -0.1}}, r"taid.t_start must be in .* got -0.1"),
        ({"taid": {"t_start": 0.0, "t_end": 0.0}}, r"taid.t_end must be in \(0, 1\], got 0.0"),
        ({"taid": {"t_end": 1.5}}, r"taid.t_end must be in \(0, 1\], got 1.5"),
        ({"taid": {"step_size": -1e-4}}, r"taid.step_size must be in \[0, 1\], got -0.0001"),
        ({"taid": {"step_size": 2}}, r"taid.step_size must be in \[0, 1\], got 2"),
        ({"taid": {"momentum": 1.0}}, r"taid.momentum must be in \[0, 1\), got 1.0"),
        ({"taid": {"momentum": -0.5}}, r"taid.momentum must be in \[0, 1\), got -0.5"),
        (
            {"taid": {"adaptive": False, "step_size": 0.1}},
            "taid.step_size is read if taid.adaptive only, got 0.1",
        ),
        (
            {"taid": {"adaptive": False, "momentum": 0.5}},
            "taid.momentum is read if taid.adaptive only, got 0.5",
        ),
        ({"taid": {"alpha": 1}}, "taid has no field 'alpha'; it has t_start, t_end, step_size"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(**{"output_dir": "out", "report_to": "none", "taid": {}} | changes)
