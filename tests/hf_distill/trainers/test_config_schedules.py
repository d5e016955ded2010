"""Temperature, alpha and beta that follow the optimizer steps."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import HfArgumentParser
from trl.scripts.utils import TrlParser

from hf_distill import (
    DistillConfig,
    DistillTrainer,
    HintCollator,
    OPSDConfig,
    OPSDTrainer,
    RemoteTeacher,
    Schedule,
    progressive,
)
from hf_distill.cache import CachedTeacher, HeadSamples, TemperatureOutOfRange, cache_teacher
from hf_distill.cache.codecs import Sampled
from hf_distill.cache.errors import UnsupportedDivergence
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.reading import ReadsLogits

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

NAMES = ("temperature", "alpha", "beta")


def distill(folder: Path, **changes: Any) -> DistillTrainer:
    kind, teacher = changes.pop("kind", DistillTrainer), changes.pop("teacher", models.llama(1))
    extra = {k: changes.pop(k) for k in ("compute_loss_func",) if k in changes}
    args = DistillConfig(**models.options(folder, **changes))
    rows, held_out = models.rows(), models.rows(6, seed=1)
    model = models.llama()
    return kind(model, args, models.Pad(), rows, held_out, teacher=teacher, **extra)


def opsd(folder: Path, **changes: Any) -> OPSDTrainer:
    settings = {"on_policy": False, "max_completion_length": 8, "alpha": 0.5} | changes
    return OPSDTrainer(
        models.lora(models.llama()),
        OPSDConfig(**models.options(folder, **settings)),
        HintCollator(models.tokenizer()),
        models.problems(),
        processing_class=models.tokenizer(),
    )


def logs(trainer: DistillTrainer) -> list[dict[str, float]]:
    trainer.train()
    return models.steps(trainer)


MAKERS = pytest.mark.parametrize("make", [distill, opsd])
EQUAL = {
    "texts": {"temperature": "constant:1.5", "alpha": "0.7", "beta": "linear:0.3->0.3@2"},
    "schedules": {
        "temperature": Schedule.constant(1.5),
        "alpha": Schedule.piecewise({1: 0.7, 2: 0.7}),
        "beta": Schedule.cosine(0.3, 0.3, 5),
    },
}


@MAKERS
@pytest.mark.parametrize("form", EQUAL)
def test_a_constant_schedule_is_the_number(tmp_path: Path, make: Any, form: str) -> None:
    plain = make(tmp_path, divergence="jsd", temperature=1.5, alpha=0.7, beta=0.3)
    other = make(tmp_path, divergence="jsd", **EQUAL[form])
    wanted, found = logs(plain), logs(other)
    assert len(found) == 3
    for name in ("loss", "soft", "hard", "grad_norm"):
        assert [x[name] for x in found] == [x[name] for x in wanted]
    assert models.difference(models.weights(plain.model), models.weights(other.model)) == 0.0
    assert not any(name in log for log in found for name in NAMES)


FROZEN = {"learning_rate": 0.0, "gradient_accumulation_steps": 2, "max_steps": 5}
STEPS = (0, 2, 4)  # those that are compared with a run of their own


def one_value(make: Any, folder: Path, step: int, **changes: Any) -> dict[str, float]:
    """The log of a step of a run whose numbers do not move; the weights do not in either."""
    return logs(make(folder, **FROZEN | changes | {"max_steps": step + 1}))[step]


@pytest.mark.parametrize(
    ("make", "name", "schedule"),
    [
        (distill, "temperature", Schedule.linear(3.0, 1.0, 3)),
        (distill, "alpha", Schedule.linear(1.0, 0.0, 4)),
        (distill, "alpha", Schedule.linear(0.0, 1.0, 4)),
        (distill, "alpha", Schedule.piecewise({2: 1.0, 4: 0.5})),
        (opsd, "temperature", Schedule.exponential(3.0, 1.0, 4)),
        (opsd, "alpha", Schedule.cosine(1.0, 0.2, 4)),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_every_micro_batch_of_a_step_uses_the_steps_value(
    tmp_path: Path, make: Any, name: str, schedule: Schedule
) -> None:
    found = logs(make(tmp_path, **FROZEN, **{name: str(schedule)}))
    for step in STEPS:
        value = schedule.at(step)
        want = one_value(make, tmp_path, step, **{name: value})
        assert found[step][name] == value
        # the plain run has no hard loss to log at alpha 1
        shared = [
            "loss",
            "soft",
            "grad_norm",
            *(["hard"] if value != 1.0 or name != "alpha" else []),
        ]
        assert {x: found[step][x] for x in shared} == {x: want[x] for x in shared}
        assert found[step].keys() - want.keys() <= {name, "hard"}
    assert len({found[step]["loss"] for step in STEPS}) > 1


@pytest.mark.parametrize("kind", [DistillTrainer, ReadsLogits])
@pytest.mark.parametrize("ends", [(1.0, 0.0), (0.0, 1.0)])
def test_the_hard_loss_is_measured_at_every_step(
    tmp_path: Path, kind: type[DistillTrainer], ends: tuple[float, float]
) -> None:
    """Also where alpha is 1, so that a mean over several steps is one of all their tokens."""
    settings = {"learning_rate": 0.0, "max_steps": 4, "logging_steps": 4, "kind": kind}
    (moving,) = logs(distill(tmp_path, alpha=Schedule.linear(*ends, 3), **settings))
    (plain,) = logs(distill(tmp_path, alpha=0.5, **settings))
    for name in ("hard", "soft", "tokens"):
        assert moving[name] == plain[name]
    assert moving["alpha"] == ends[1]


def test_a_hard_loss_of_ones_own_is_measured_too(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"learning_rate": 0.0, "label_smoothing_factor": 0.1}
    first, *_, last = logs(distill(tmp_path, alpha="linear:1->0@2", **settings))
    soft, hard = (logs(distill(tmp_path, alpha=alpha, **settings)) for alpha in (1.0, 0.0))
    assert first["loss"] == soft[0]["loss"]
    assert last["loss"] == hard[2]["loss"]
    assert first["hard"] == hard[0]["hard"]


@pytest.mark.parametrize("ends", [(0.0, 2.0), (2.0, 0.0)])
def test_the_weight_of_hidden_states_follows_its_schedule(
    tmp_path: Path, ends: tuple[float, float]
) -> None:
    schedule = Schedule.linear(*ends, 4)
    settings = {"hidden_layers": [1]}
    found = logs(distill(tmp_path, **FROZEN, **settings, hidden_weight=schedule))
    for step in STEPS:
        value = schedule.at(step)
        want = one_value(distill, tmp_path, step, **settings, hidden_weight=value)
        assert found[step]["hidden_weight"] == value
        assert found[step]["loss"] == want["loss"]
        assert found[step]["hidden"] > 0
    assert found[2]["loss"] != found[0]["loss"]


def test_taid_takes_the_steps_temperature_and_alpha(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"taid": {"t_start": 0.3, "t_end": 0.3, "adaptive": False}}
    moving = {"temperature": "linear:3->1@4", "alpha": "linear:1->0.5@4"}
    found = logs(distill(tmp_path, **FROZEN, **settings, **moving))
    for step, temperature, alpha in ((0, 3.0, 1.0), (2, 2.0, 0.75)):
        numbers = {"temperature": temperature, "alpha": alpha}
        want = one_value(distill, tmp_path, step, **settings, **numbers)
        for name in ("loss", "soft", "taid_teacher_kl"):
            assert found[step][name] == want[name], name
    assert all("hard" in log for log in found)


@MAKERS
def test_a_beta_on_a_schedule_goes_from_kl_to_kl(tmp_path: Path, make: Any) -> None:
    found = logs(make(tmp_path, **FROZEN, divergence="jsd", beta="linear:0->1@4"))
    assert [log["beta"] for log in found] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for step, kind in ((0, "forward_kl"), (4, "reverse_kl")):
        want = one_value(make, tmp_path, step, divergence=kind)
        assert {x: found[step][x] for x in ("loss", "soft", "hard")} == {
            x: want[x] for x in ("loss", "soft", "hard")
        }
    for step, beta in ((1, 0.25), (2, 0.5)):
        want = one_value(make, tmp_path, step, divergence="jsd", beta=beta)
        soft = want["soft"] / (beta * (1 - beta))
        assert found[step]["soft"] == pytest.approx(soft, rel=1e-6)
        assert found[step]["hard"] == pytest.approx(want["hard"], rel=1e-6)
        assert found[step]["loss"] == pytest.approx(0.5 * (soft + want["hard"]), rel=1e-5)


@pytest.mark.parametrize("kind", [DistillTrainer, ReadsLogits])
def test_loss_and_gradient_have_the_factor_of_the_normalised_jsd(tmp_path: Path, kind: Any) -> None:
    changes = {"kind": kind, "divergence": "jsd", "beta": "linear:0.2->0.4@2", "max_steps": 1}
    changes |= {"learning_rate": 0.0, "alpha": 1.0}
    (log,) = logs(distill(tmp_path, **changes))
    (plain,) = logs(distill(tmp_path, **changes | {"beta": 0.2}))
    assert log["loss"] == pytest.approx(plain["loss"] / 0.16, rel=1e-6)
    assert log["grad_norm"] == pytest.approx(plain["grad_norm"] / 0.16, rel=1e-5)


@pytest.mark.parametrize("make", [distill, opsd])
def test_a_resumed_run_goes_on_where_the_values_were(tmp_path: Path, make: Any) -> None:
    settings: dict[str, Any] = progressive(5, (3.0, 1.5), (1.0, 0.2), "cosine")
    settings |= {"divergence": "jsd", "beta": "exponential:0.01->0.9@5"}
    settings |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    straight = make(tmp_path, **settings)
    wanted = logs(straight)
    again = make(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    found = models.steps(again)
    assert len(found) == 6
    for mine, other in zip(found, wanted, strict=True):
        for name in ("loss", "soft", "hard", "grad_norm", *NAMES):
            assert mine[name] == other[name], name
    assert models.difference(models.weights(straight.model), models.weights(again.model)) == 0.0
    assert len({log["beta"] for log in found}) == 6


def test_only_what_moves_is_logged(tmp_path: Path) -> None:
    for log in logs(distill(tmp_path, temperature="linear:2->1@2", alpha="constant:0.5")):
        assert "temperature" in log
        assert "alpha" not in log
        assert "beta" not in log


def config(**changes: Any) -> DistillConfig:
    return DistillConfig(output_dir="out", report_to="none", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5$"),
        ({"alpha": "linear:0.5->1.5@9"}, r"\[0, 1\], got 1.5 of 'linear:0.5->1.5@9'"),
        ({"alpha": Schedule.linear(-0.5, 1, 9)}, r"\[0, 1\], got -0.5 of 'linear:-0.5->1.0@9'"),
        ({"temperature": 0}, "temperature must be positive and finite, got 0.0$"),
        ({"temperature": "piecewise:1@0,0@5,1@9"}, "got 0.0 of 'piecewise:1@0,0@5,1@9'"),
        ({"temperature": float("inf")}, "temperature: a schedule must be .*, got inf"),
        ({"temperature": None}, "temperature: a schedule must be .*, got None"),
        ({"temperature": "hot"}, "temperature: a schedule must be .*, got 'hot'"),
        ({"divergence": "jsd", "beta": "linear:0->2@4"}, r"beta must be in \[0, 1\], got 2.0 of"),
        ({"divergence": "skew_kl", "beta": "linear:0->1@4"}, "beta of skew_kl must be below 1"),
        ({"beta": "linear:0->1@4"}, "needs a divergence that reads it, .*'jsd'.* got 'forward_kl'"),
        ({"divergence": "k3", "beta": "linear:0->1@4"}, "needs a divergence that reads it"),
        ({"hidden_weight": "linear:0->-1@4"}, "hidden_weight must be at least 0, got -1.0 of"),
        ({"hidden_weight": "linear:1->0@4"}, "needs hidden_layers, got 'linear:1->0@4' and None"),
        ({"taid": {}, "alpha": "constant:0"}, "taid is a soft loss and needs alpha > 0"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_config_keeps_what_it_was_given() -> None:
    made = config(temperature=3, alpha="0.25", beta="constant:0.3")
    assert (made.temperature, made.alpha, made.beta) == (3, 0.25, "constant:0.3")
    assert isinstance(made.temperature, int)
    assert config().to_dict()["temperature"] == 2.0
    assert config(alpha=0.25) == config(alpha="0.25")


TEXTS = {"temperature": "linear:4.0->1.0@1000", "alpha": "linear:1.0->0.5@1000"}


@pytest.mark.parametrize("given", [progressive(1000), TEXTS], ids=["schedules", "texts"])
def test_schedules_are_written_as_texts_and_read_again(given: dict[str, Any]) -> None:
    made = config(**given)
    written = json.loads(made.to_json_string())
    assert {name: written[name] for name in TEXTS} == TEXTS
    assert {name: made.to_sanitized_dict()[name] for name in TEXTS} == TEXTS
    again = config(**{name: written[name] for name in TEXTS})
    for step in (0, 500, 2000):
        assert again.loss_at(step) == made.loss_at(step)
    assert made.loss_at(500).alpha == 0.75
    assert made.divergence_spec(500).temperature == 2.5


@pytest.mark.parametrize("kind", [DistillConfig, OPSDConfig])
@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_command_lines_and_yaml(tmp_path: Path, parser: type, kind: type) -> None:
    lines = [x for name, text in TEXTS.items() for x in (f"--{name}", text)]
    words = ["--output_dir", "out", "--report_to", "none", *lines, "--beta", "0.25"]
    (parsed,) = parser(kind).parse_args_into_dataclasses(words)
    assert {name: getattr(parsed, name) for name in TEXTS} == TEXTS
    assert parsed.beta == 0.25
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump({"output_dir": "out", "report_to": "none", **TEXTS}))
    if parser is TrlParser:
        (parsed,) = parser(kind).parse_args_and_config(["--config", str(path), "--alpha", "0.5"])
        assert parsed.alpha == 0.5
    else:
        (parsed,) = parser(kind).parse_yaml_file(path)
    assert parsed.temperature == TEXTS["temperature"]
    assert parsed.beta == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": "linear:0->0.5@9"}, "alpha linear:0->0.5@9 > 0 needs a teacher"),
        ({"alpha": 0, "temperature": "linear:2->1@9"}, "a schedule of temperature needs a teacher"),
    ],
)
def test_a_schedule_needs_a_teacher(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distill(tmp_path, teacher=None, **changes)
    distill(tmp_path, teacher=None, alpha="constant:0")


def test_a_remote_teacher_has_one_temperature(tmp_path: Path) -> None:
    teacher = RemoteTeacher("http://127.0.0.1:9", "name", 4)
    for value in ("linear:1->2@9", "linear:2->1@9", 2.0):
        with pytest.raises(ValueError, match=f"set temperature=1.0, got {value}"):
            distill(tmp_path, teacher=teacher, temperature=value)


def cached(folder: Path, codec: Any) -> CachedTeacher:
    cache_teacher(
        models.llama(1), models.rows(), folder / "cache", codec=codec, data_collator=models.Pad()
    )
    return CachedTeacher(folder / "cache")


def test_a_cache_must_have_every_temperature(tmp_path: Path) -> None:
    teacher = cached(tmp_path, HeadSamples(top_k=8, temperature_range=(1.0, 2.0)))
    for text in ("linear:2.5->1@4", "linear:1->2.5@4", "piecewise:1@0,0.5@1,1@2"):
        with pytest.raises(TemperatureOutOfRange, match="from 1 to 2, not"):
            distill(tmp_path, teacher=teacher, temperature=text)
    found = logs(distill(tmp_path, teacher=teacher, temperature="linear:2->1@2", learning_rate=0.0))
    assert [log["temperature"] for log in found] == [2.0, 1.5, 1.0]
    want = logs(distill(tmp_path, teacher=teacher, temperature=1.5, learning_rate=0.0))
    assert found[1]["loss"] == want[1]["loss"]


def test_what_is_checked_of_a_schedule_has_its_ends_and_what_lies_between() -> None:
    made = config(divergence="jsd", beta="linear:0->1@4", temperature="linear:1->3@4")
    found = {(x.spec.resolved().kind, x.spec.temperature) for x in made.losses()}
    kinds = ("forward_kl", "jsd", "reverse_kl")
    assert found == {(kind, temperature) for kind in kinds for temperature in (1.0, 2.0, 3.0)}


@pytest.mark.filterwarnings("ignore:reverse_kl")
def test_a_cache_must_serve_every_beta(tmp_path: Path) -> None:
    teacher = cached(tmp_path, Sampled(8))
    settings: dict[str, Any] = {"divergence": "jsd", "temperature": 1.0}
    distill(tmp_path, teacher=teacher, beta="linear:0->0.9@4", **settings)
    with pytest.raises(UnsupportedDivergence, match="reverse_kl needs the teacher where"):
        distill(tmp_path, teacher=teacher, beta="linear:0->1@4", **settings)


@pytest.mark.parametrize("text", ["linear:8->0.1@6", "constant:2.0", "linear:0.1->8@6"])
def test_the_watchdog_does_not_take_a_schedule_for_a_collapse(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    settings: dict[str, Any] = {"max_steps": 8, "learning_rate": 0.0, "temperature": text}
    settings["watchdog"] = {"window": 1, "entropy_explosion": 0.1, "entropy_collapse": 0.8}
    with caplog.at_level(logging.WARNING):
        found = logs(distill(tmp_path, **settings))
    assert not [name for log in found for name in log if name.startswith("watchdog_entropy")]
    entropies = [log["student_entropy"] for log in found]
    changed = max(entropies) / min(entropies)
    assert (changed > 2) == (text != "constant:2.0")


def test_the_watchdog_takes_the_largest_temperature_for_its_limit(tmp_path: Path) -> None:
    """A uniform teacher is told from a hot softmax; a limit of the cold end would be below 0."""
    settings: dict[str, Any] = {"watchdog": {"teacher_uniform": 0.01}}
    (log, *_) = logs(distill(tmp_path, temperature="linear:1->0.1@6", **settings))
    assert log["teacher_entropy"] > 0.3
    assert "watchdog_teacher_uniform" not in log
