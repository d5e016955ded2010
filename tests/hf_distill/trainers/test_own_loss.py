"""A user's loss that is the JSD gives the weights of the built-in JSD, in every kind of run."""

import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill import (
    CachedTeacher,
    DistillConfig,
    DistillTrainer,
    OPSDConfig,
    OPSDTrainer,
    RoutedTeacher,
    cache_teacher,
)
from hf_distill.cache import Full
from tests.hf_distill.trainers import classifying, models
from tests.hf_distill.trainers.own_losses import MEASURED, Overrides, jsd, jsd_at_1
from tests.hf_distill.trainers.test_anchor import Anchored

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

# A step moves weights by at most ten times the error of the gradient (`models.options`), whose norm
# is clipped to 1 and whose float32 terms have some ten roundings of 2^-24: 6e-6 a step, and a step
# starts from the errors of those before. Measured: at most 1.3e-7.
TOLERANCE = 2e-5
BUG_FACTOR = 10  # so many tolerances from it are other losses
SUM_ERROR = 1e-5  # relative, of a float32 mean over some 40 tokens
ROOT = Path(__file__).parents[3]
OWN: dict[bool, dict[str, Any]] = {True: {"loss": jsd}, False: {}}
Result = tuple[dict[str, Tensor], list[dict[str, float]], dict[str, float]]


class Weighted(models.Pad):
    """Weights of tokens, a third of them 0."""

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        made = super().__call__(batch)
        return made | {"token_weights": (made["input_ids"] % 3) * 0.75}


def trained(trainer: DistillTrainer) -> Result:
    """Weights, logs of steps, and an evaluation behind them."""
    trainer.train()
    weights = models.weights(trainer.model)
    return weights, models.steps(trainer), trainer.evaluate()


def distill(folder: Path, own: bool = False, **changes: Any) -> DistillTrainer:
    given = {name: changes.pop(name, None) for name in ("model", "teacher", "collator", "words")}
    extra = {"loss": changes.pop("loss")} if "loss" in changes else OWN[own]
    kind, data = changes.pop("kind", DistillTrainer), changes.pop("data", models.rows())
    settings = ({} if own or "loss" in extra else {"divergence": "jsd"}) | changes
    model = given["model"] or models.llama
    teacher = given["teacher"] or (lambda _: models.llama(1))
    rows = [row | {"domain": "ab"[i % 2]} for i, row in enumerate(data)]
    args = DistillConfig(**models.options(folder, remove_unused_columns=False, **settings))
    collator = given["collator"] or models.Pad()
    return kind(
        model(), args, collator, rows, rows[:6], given["words"], teacher=teacher(folder), **extra
    )


def opsd(folder: Path, own: bool = False, **changes: Any) -> OPSDTrainer:
    """Completions of the student, each used for two steps, with rows of an anchor beside them."""
    rollout = {"temperature": 1.0, "steps_per_rollout": 2, "importance_clip": 1.5}
    settings = {"max_completion_length": 6, "rollout": rollout, "max_steps": 4}
    settings |= {"temperature": 2.0, "temperature_scaling": "t2"} if not own else {}
    return Anchored(
        models.lora(models.llama()),
        OPSDConfig(**models.options(folder, **settings | changes)),
        train_dataset=models.problems(),
        eval_dataset=models.problems(4),
        processing_class=models.tokenizer(),
        **OWN[own],
    )


def classify(folder: Path, own: bool = False, **changes: Any) -> DistillTrainer:
    settings = {} if own else {"divergence": "jsd"}
    extra = {"callbacks": [], **OWN[own]}
    args = DistillConfig(**models.options(folder, **settings | changes))
    data = classifying.rows(unlabelled=1)
    return DistillTrainer(
        classifying.bert(),
        args,
        classifying.collator(),
        data,
        classifying.rows(6, seed=1),
        teacher=classifying.bert(1),
        **extra,
    )


def cached(folder: Path) -> CachedTeacher:
    path = folder / "cache"
    if not path.exists():
        given = {"codec": Full(), "data_collator": models.Pad()}
        cache_teacher(models.llama(1), models.rows(), path, **given)
    return CachedTeacher(path)


def routed(folder: Path) -> RoutedTeacher:
    return RoutedTeacher({"a": models.llama(1), "b": models.llama(2)}, "domain")


SMOOTHED = {"label_smoothing_factor": 0.1}
Make = Callable[..., DistillTrainer]
SETUPS: dict[str, tuple[Make, dict[str, Any]]] = {
    "hidden states": (distill, {}),
    "soft only": (distill, {"alpha": 1.0}),
    "hard only": (distill, {"alpha": 0.0}),
    "alpha on a schedule": (distill, {"alpha": "linear:1->0.2@2"}),
    "logits": (distill, SMOOTHED),
    "logits, soft only": (distill, SMOOTHED | {"alpha": 1.0}),
    "accumulation": (
        distill,
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    ),
    "lora": (distill, {"model": lambda: models.lora(models.llama())}),
    "tied head": (distill, {"model": models.tied}),
    "softcap": (distill, {"model": models.gemma2, "teacher": lambda _: models.gemma2(1)}),
    "head with a bias": (distill, {"model": models.phi, "teacher": lambda _: models.phi(1)}),
    "checkpointing": (distill, {"activation_checkpointing": True}),
    "weights with zeros": (distill, {"collator": Weighted()}),
    "classes": (distill, {"words": models.tokenizer(), "token_weights": {"number": 3.0}}),
    "entropies": (distill, {"token_weights": {"entropy": 2.0}}),
    "hidden layers": (distill, {"hidden_layers": "uniform", "hidden_weight": 0.5}),
    "wide teacher": (distill, {"teacher": lambda _: models.llama(1, hidden_size=48)}),
    "padded vocabulary": (
        distill,
        {
            "words": models.tokenizer(),
            "teacher": lambda _: models.llama(1, vocab_size=72),
            "data": [{k: [min(x, 42) for x in v] for k, v in row.items()} for row in models.rows()],
        },
    ),
    "routed": (distill, {"teacher": routed}),
    "cached": (distill, {"teacher": cached}),
    "reused completions": (opsd, {}),
    "an anchor": (opsd, {"anchor_weight": 0.5, "alpha": 0.6}),
    "rows of data": (opsd, {"on_policy": False, "alpha": 0.5, "rollout": None}),
    "classifier": (classify, {}),
    "classifier, soft only": (classify, {"alpha": 1.0}),
}


def close(found: dict[str, float], want: dict[str, float], prefix: str = "") -> None:
    """The same numbers, but for what only a built-in loss measures."""
    no_part = ("_runtime", "_second", "_uniform")  # times; what the watchdog reads of entropies
    names = {name for name in want if not name.endswith(no_part)}
    unmeasured = {prefix + name for name in MEASURED}
    assert found.keys() >= names - unmeasured
    assert not found.keys() & unmeasured
    for name in names - unmeasured:
        assert found[name] == pytest.approx(want[name], rel=10 * SUM_ERROR, abs=1e-6), name


@pytest.mark.parametrize("name", SETUPS)
def test_an_own_jsd_is_the_built_in_one(tmp_path: Path, name: str) -> None:
    make, changes = SETUPS[name]
    built_in, logs, metrics = trained(make(tmp_path, **changes))
    own, own_logs, own_metrics = trained(make(tmp_path, own=True, **changes))
    print(f"weights differ by {models.difference(own, built_in):.1e}")
    assert models.difference(own, built_in) <= TOLERANCE
    for log, want in zip(own_logs, logs, strict=True):
        close(log, want)
    close(own_metrics, metrics, "eval_")
    assert "eval_soft" in own_metrics
    assert MEASURED - {"clipped"} <= logs[0].keys()


def test_the_pages_example_is_the_built_in_loss(tmp_path: Path) -> None:
    """Its ten lines; `tests/docs` runs them."""
    page = (ROOT / "docs" / "pages" / "extending.md").read_text(encoding="utf-8")
    (code,) = (x for x in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def jsd(" in x)
    assert len(code.splitlines()) == 10
    names: dict[str, Any] = {"math": math, "torch": torch, "Tensor": Tensor}
    exec(code.partition("\n\n\n")[0], names)
    own, logs, _ = trained(distill(tmp_path, loss=names["jsd"]))
    built_in, want, _ = trained(distill(tmp_path, temperature=1.0))
    assert models.difference(own, built_in) <= TOLERANCE
    for log, other in zip(logs, want, strict=True):
        close(log, other)


def test_another_temperature_would_show(tmp_path: Path) -> None:
    built_in, _, _ = trained(distill(tmp_path))
    wrong, _, _ = trained(distill(tmp_path, loss=jsd_at_1))
    assert models.difference(wrong, built_in) > BUG_FACTOR * TOLERANCE


@pytest.mark.parametrize("changes", [{}, SMOOTHED, {"alpha": "linear:1->0.2@2"}], ids=str)
def test_the_method_is_the_argument(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A subclass that overrides `token_loss`."""
    own, own_logs, metrics = trained(distill(tmp_path, own=True, **changes))
    found, logs, other = trained(distill(tmp_path, kind=Overrides, **changes))
    assert models.difference(found, own) == 0.0
    for log, want in zip(logs, own_logs, strict=True):
        close(log, want)
    close(other, metrics, "eval_")


@pytest.mark.parametrize("in_16_bit", ["weights", "autocast"])
def test_in_16_bits_the_gradient_is_the_built_ins(tmp_path: Path, in_16_bit: str) -> None:
    """Logits are rounded by 2^-9 of themselves, here or there; measured: 8e-3 of the gradient."""

    def gradient(**changes: Any) -> Tensor:
        trainer = distill(tmp_path, bf16=in_16_bit == "autocast", **changes)
        if in_16_bit == "weights":
            trainer.model.bfloat16()
            trainer.teacher.model.bfloat16()
        batch = next(iter(trainer.get_train_dataloader()))
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model.train(), batch)
        assert loss.dtype == torch.float32
        loss.backward()
        return torch.cat([p.grad.float().flatten() for p in trainer.model.parameters()])

    built_in, own, wrong = gradient(), gradient(own=True), gradient(loss=jsd_at_1)
    error = (own - built_in).norm() / built_in.norm()
    bug = (wrong - built_in).norm() / built_in.norm()
    print(f"error of the gradient {error:.1e}, with the bug {bug:.1e}")
    assert error <= 0.03
    assert bug > 5 * 0.03


def test_hidden_states_are_read_and_logits_where_a_hard_loss_wants_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forms: list[str] = []

    class Notes(DistillTrainer):
        def token_loss(self, student: Any, teacher: Any, tokens: Any) -> Any:
            forms.append("logits" if student.hidden is None else "hidden")
            return super().token_loss(student, teacher, tokens)

    caplog.set_level(logging.WARNING)
    for changes in ({}, SMOOTHED):
        distill(tmp_path, own=True, kind=Notes, max_steps=1, **changes).train()
    assert forms == ["hidden", "logits"]
    assert not [x for x in caplog.messages if "not used" in x]
