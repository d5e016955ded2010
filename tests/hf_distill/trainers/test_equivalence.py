"""Runs that must end in the same weights, each beside a classical bug that must not.

The tolerance is what roundings of float32 gradients make of 2 to 4 AdamW steps of 1e-3, see
`models.options`; a run with the bug must differ by more than a hundred tolerances.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from hf_distill import DistillConfig, DistillTrainer, ModelTeacher, OPSDConfig, OPSDTrainer
from hf_distill.losses import DivergenceLoss, Terms, Tokens
from hf_distill.models import Signal, forward
from hf_distill.models.forward import Reader
from hf_distill.models.head_probe import Post
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.reading import ReadsLogits

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

TOLERANCE = 2e-6
BUG_FACTOR = 100


def distill(
    folder: Path,
    model: nn.Module | None = None,
    teacher: Any = None,
    *,
    kind: type[DistillTrainer] = DistillTrainer,
    collator: Any = None,
    data: Any = None,
    **changes: Any,
) -> dict[str, Tensor]:
    """The student's final weights."""
    model = models.llama() if model is None else model
    teacher = models.llama(1) if teacher is None else teacher
    args = DistillConfig(**models.options(folder, **changes))
    data = data or models.rows()
    trainer = kind(model, args, collator or models.Pad(), data, teacher=teacher)
    trainer.train()
    return models.weights(trainer.model)


def opsd(
    folder: Path,
    model: nn.Module,
    other: Any = None,
    *,
    kind: type[OPSDTrainer] = OPSDTrainer,
    **changes: Any,
) -> dict[str, Tensor]:
    settings = {"on_policy": False, "max_completion_length": 8} | changes
    args = OPSDConfig(**models.options(folder, **settings))
    trainer = kind(
        model,
        args,
        train_dataset=models.problems(),
        processing_class=models.tokenizer(),
        teacher=other,
    )
    trainer.train()
    return models.weights(trainer.model)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], bug: dict[str, Tensor]) -> None:
    right, wrong = models.difference(one, other), models.difference(one, bug)
    print(f"difference {right:.1e}, with the bug {wrong:.1e}")
    assert right <= TOLERANCE
    assert wrong > BUG_FACTOR * TOLERANCE


class MicroBatchMean:
    """The classical bug: every micro-batch divided by its own number of tokens."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        loss = super().compute_loss(model, inputs, return_outputs, None)
        return loss / self.args.gradient_accumulation_steps


class DistillMicroBatchMean(MicroBatchMean, DistillTrainer):
    pass


class OPSDMicroBatchMean(MicroBatchMean, OPSDTrainer):
    pass


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize(("rows", "steps"), [(4, 2), (1, 8)])
def test_accumulation_does_not_change_the_weights(
    tmp_path: Path, rows: int, steps: int, alpha: float
) -> None:
    def run(rows: int, steps: int, kind: type[DistillTrainer] = DistillTrainer) -> dict:
        return distill(
            tmp_path,
            kind=kind,
            alpha=alpha,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
        )

    assert_same(run(8, 1), run(rows, steps), run(rows, steps, DistillMicroBatchMean))


def ending() -> nn.Module:
    """A model whose greedy completions have several lengths."""
    model = models.lora(models.llama())
    head = model.get_base_model().lm_head.weight
    with torch.no_grad():
        head[models.EOS] = 0.5 * head[5:20].sum(0)
    return model


def test_accumulation_does_not_change_what_is_learnt_from_rollouts(tmp_path: Path) -> None:
    def run(rows: int, steps: int, kind: type[OPSDTrainer] = OPSDTrainer) -> dict[str, Tensor]:
        return opsd(
            tmp_path,
            ending(),
            kind=kind,
            on_policy=True,
            rollout={"temperature": 0.0},
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
        )

    assert_same(run(4, 1), run(1, 4), run(1, 4, OPSDMicroBatchMean))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_side_does_not_change_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    def run(collator: models.Pad) -> dict[str, Tensor]:
        make = models.FAMILIES[family]
        # as in `Trainer`, a label on the first token is scored if padding stands before it
        data = models.rows(ignored=1)
        return distill(tmp_path, make(), make(1), collator=collator, data=data)

    right, left = run(models.Pad("right", 20)), run(models.Pad("left", 17))

    def as_given(self: Any, model: Any, inputs: dict) -> dict:
        lost = "attention_mask" if family == "llama" else "position_ids"
        return {name: value for name, value in inputs.items() if name != lost}

    monkeypatch.setattr(Reader, "forward_inputs", as_given)
    assert_same(right, left, run(models.Pad("left", 17)))


class NoTemperatureInHidden(DivergenceLoss):
    def __call__(self, student: Signal, teacher: Signal, tokens: Tokens) -> Terms:
        assert student.hidden is not None
        spec = dataclasses.replace(self.spec, temperature=1.0)
        return DivergenceLoss(spec, self.alpha)(student, teacher, tokens)


class NoTemperature(DistillTrainer):
    @property
    def loss(self) -> DivergenceLoss:
        return NoTemperatureInHidden(super().loss.spec, super().loss.alpha)


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The form in which each micro-batch reached the loss."""
    taken: list[str] = []
    original = DivergenceLoss.__call__

    def noted(self: Any, student: Signal, *args: Any) -> Terms:
        taken.append("logits" if student.hidden is None else "hidden")
        return original(self, student, *args)

    monkeypatch.setattr(DivergenceLoss, "__call__", noted)
    return taken


@pytest.mark.parametrize(
    ("divergence", "alpha"), [("forward_kl", 0.5), ("reverse_kl", 1.0), ("jsd", 0.5), ("jsd", 1.0)]
)
@pytest.mark.parametrize("family", [*models.FAMILIES, "wide_teacher"])
def test_hidden_states_and_logits_give_the_same_weights(
    tmp_path: Path, paths: list[str], family: str, divergence: str, alpha: float
) -> None:
    def run(kind: type[DistillTrainer]) -> dict[str, Tensor]:
        if family == "wide_teacher":
            student, teacher = models.llama(), models.llama(1, hidden_size=48)
        else:
            make = models.FAMILIES[family]
            student, teacher = make(), make(1)
        return distill(
            tmp_path,
            student,
            teacher,
            kind=kind,
            divergence=divergence,
            alpha=alpha,
            temperature=2.0,
            beta=0.3,
            max_steps=1,
        )

    hidden, logits = run(DistillTrainer), run(ReadsLogits)
    assert paths == ["hidden", "logits"]
    assert_same(hidden, logits, run(NoTemperature))


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_a_lost_scale_or_softcap_would_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    make = models.FAMILIES[family]
    logits = distill(tmp_path, make(), make(1), kind=ReadsLogits)
    right = distill(tmp_path, make(), make(1))
    monkeypatch.setattr(forward, "probe_head", lambda *_: Post(1.0, None))
    assert_same(logits, right, distill(tmp_path, make(), make(1)))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", [DistillTrainer, ReadsLogits])
def test_checkpointed_gradients_give_the_same_weights(
    tmp_path: Path, kind: type[DistillTrainer], use_reentrant: bool
) -> None:
    def run(**changes: Any) -> dict[str, Tensor]:
        student = models.llama(attention_dropout=0.4)  # recomputing must draw the same noise
        return distill(tmp_path, student, kind=kind, **changes)

    def checkpointed(**how: Any) -> dict[str, Tensor]:
        return run(activation_checkpointing=True, activation_checkpointing_kwargs=how)

    assert_same(
        run(),
        checkpointed(use_reentrant=use_reentrant),
        checkpointed(use_reentrant=use_reentrant, preserve_rng_state=False),
    )


def trainer_weights(folder: Path) -> dict[str, Tensor]:
    args = TrainingArguments(**models.options(folder, gradient_accumulation_steps=2))
    trainer = Trainer(models.llama(), args, models.Pad(), models.rows())
    trainer.train()
    return models.weights(trainer.model)


def test_alpha_zero_without_a_teacher_is_trainer_bit_for_bit(tmp_path: Path) -> None:
    args = DistillConfig(**models.options(tmp_path, gradient_accumulation_steps=2, alpha=0.0))
    trainer = DistillTrainer(models.llama(), args, models.Pad(), models.rows())
    trainer.train()
    assert models.difference(trainer_weights(tmp_path), models.weights(trainer.model)) == 0.0


@pytest.mark.parametrize("kind", [DistillTrainer, ReadsLogits])
def test_alpha_zero_with_a_teacher_is_trainer(tmp_path: Path, kind: type[DistillTrainer]) -> None:
    def run(alpha: float) -> dict[str, Tensor]:
        return distill(tmp_path, kind=kind, alpha=alpha, gradient_accumulation_steps=2)

    assert_same(trainer_weights(tmp_path), run(0.0), run(0.05))


def loop_weights(divergence: str, temperature: float, beta: float, alpha: float) -> dict:
    """Three AdamW steps of alpha * T² soft + (1 - alpha) * hard, row by row, without padding."""
    student, teacher = models.llama(), models.llama(1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, eps=1e-4, weight_decay=0.0)
    data = models.rows()
    for step in range(3):
        terms = []
        for row in data[4 * step : 4 * step + 4]:
            ids = torch.tensor([row["input_ids"]])
            labels = torch.tensor(row["labels"])[1:]
            with torch.no_grad():
                log_p = F.log_softmax(teacher(input_ids=ids).logits[0, :-1] / temperature, -1)
            logits = student(input_ids=ids).logits[0, :-1]
            log_q = F.log_softmax(logits / temperature, -1)
            p, q = log_p.exp(), log_q.exp()
            forward, reverse = p * (log_p - log_q), q * (log_q - log_p)
            log_m = (beta * p + (1 - beta) * q).log()
            mixed = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
            soft = {"forward_kl": forward, "reverse_kl": reverse, "jsd": mixed}[divergence].sum(-1)
            hard = F.nll_loss(F.log_softmax(logits, -1), labels.clamp_min(0), reduction="none")
            both = alpha * temperature**2 * soft + (1 - alpha) * hard
            terms.append(both[labels != -100])
        loss = torch.cat(terms).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    return models.weights(student)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_plain_loop_gives_the_same_weights(tmp_path: Path, divergence: str) -> None:
    def run(**changes: Any) -> dict[str, Tensor]:
        settings = {"alpha": 0.5, "temperature": 3.0, "beta": 0.3} | changes
        return distill(tmp_path, divergence=divergence, **settings)

    loop = loop_weights(divergence, 3.0, 0.3, 0.5)
    assert_same(loop, run(), run(temperature_scaling="none"))


def test_base_adapters_are_a_separate_copy_of_the_base(tmp_path: Path) -> None:
    def student() -> nn.Module:
        return models.lora(models.llama())

    base, live = opsd(tmp_path, student()), opsd(tmp_path, student(), teacher="live")
    separate = opsd(tmp_path, student(), ModelTeacher(models.llama()))
    assert_same(base, separate, live)


def test_base_of_a_full_model_is_a_separate_copy(tmp_path: Path) -> None:
    base = opsd(tmp_path, models.llama())
    separate = opsd(tmp_path, models.llama(), ModelTeacher(models.llama()))
    assert_same(base, separate, opsd(tmp_path, models.llama(), models.llama(1)))
