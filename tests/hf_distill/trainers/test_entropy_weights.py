"""Weights by the teacher's entropy and between markers: against loops, and one teacher forward."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_distill import DistillConfig, DistillTrainer, OPSDConfig, OPSDTrainer
from hf_distill.cache import CachedTeacher, HeadSamples, cache_teacher
from hf_distill.data import sides
from hf_distill.data.token_classes import CLASSES, token_classes
from hf_distill.data.token_weights import TokenWeights
from hf_distill.models import Signal
from hf_distill.trainers.causal_lm import KEPT, TokenWeighing
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.test_token_weights import (
    KINDS,
    MicroBatchMean,
    Weighted,
    final,
    make,
)

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

TOLERANCE = 2e-6  # of weights after three steps of 1e-3; measured: 6e-8
SUM_ERROR = 2e-6  # relative, of a float32 mean over some 50 tokens; measured: 2e-8
OPENS, CLOSES = models.WORDS.index("think"), models.WORDS.index("done")
SETTINGS = {
    "number": 3.0,
    "punctuation": 0.5,
    "entropy": 4.0,
    "reasoning": 0.25,
    "markers": ["think", "done"],
}


def rows(count: int = 16, **changes: Any) -> list[dict[str, list[int]]]:
    """With markers: some before the labels, some never closed, some rows with none."""
    made = models.rows(count, longest=14, **changes)
    for i, row in enumerate(made):
        places = {0: (0, OPENS), 1: (2, OPENS), 2: (len(row["labels"]) - 2, CLOSES)}
        for kind in {0: (0, 2), 1: (1,), 2: (1, 2), 3: ()}[i % 4]:
            at, token = places[kind]
            row["input_ids"][at] = token
            row["labels"][at] = -100 if row["labels"][at] == -100 else token
    return made


def sharp(model: nn.Module) -> nn.Module:
    """As sure of some tokens as trained models are, and unsure of others."""
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


def in_blocks(ids: Sequence[int]) -> list[bool]:
    found, is_open = [], False
    for i in ids:
        found.append(is_open and i != CLOSES)
        is_open = i == OPENS or (is_open and i != CLOSES)
    return found


class ByHand:
    """Loss and metrics of rows in one step, from loops over float64 logits at temperature 2."""

    def __init__(self, data: list[dict[str, list[int]]], settings: dict[str, Any]) -> None:
        self.student, teacher = models.llama().double(), sharp(models.llama(1)).double()
        classes = token_classes(models.tokenizer(), models.VOCAB).tolist()
        sums, weights, self.factors, self.inside = [], [], [], []
        for row in data:
            ids = torch.tensor([row["input_ids"]])
            z = self.student(input_ids=ids).logits[0]
            with torch.no_grad():
                w = teacher(input_ids=ids).logits[0]
            inside = in_blocks(row["input_ids"])
            for at in range(1, len(row["labels"])):
                token = row["labels"][at]
                if token == -100:
                    continue
                p = w[at - 1].softmax(-1)
                entropy = -sum(x * math.log(x) for x in p.tolist())
                self.factors.append(1 + settings.get("entropy", 0.0) * entropy / math.log(len(p)))
                self.inside.append(inside[at])
                weight = (token % 4) * 0.75 * settings.get(CLASSES[classes[token]], 1.0)
                weight *= settings["reasoning"] if inside[at] else 1.0
                weights.append(weight * self.factors[-1])
                q, p = (z[at - 1] / 2).log_softmax(-1), (w[at - 1] / 2).softmax(-1)
                soft = 4 * (p * (p.log() - q)).sum()
                sums.append(weights[-1] * (soft + F.cross_entropy(z[at - 1], torch.tensor(token))))
        self.loss = torch.stack(sums).sum() / 2 / sum(weights)
        assert 0 < sum(self.inside) < len(self.inside)
        assert max(self.factors) - min(self.factors) > 1

    def metrics(self) -> dict[str, float]:
        return {
            "loss": self.loss.item(),
            "entropy_factor": sum(self.factors) / len(self.factors),
            "reasoning_share": sum(self.inside) / len(self.inside),
        }


def weighted(folder: Path, kind: Any = DistillTrainer, **changes: Any) -> DistillTrainer:
    given = {"data": rows(), "tokenizer": models.tokenizer(), "token_weights": SETTINGS} | changes
    trainer = make(folder, kind, **given)
    sharp(trainer.teacher.model)
    return trainer


@KINDS
def test_loss_and_gradients_are_those_of_loops(tmp_path: Path, kind: Any) -> None:
    """Own weights, class, place and entropy together, over two micro-batches."""
    trainer, want = weighted(tmp_path, kind), ByHand(rows()[:8], SETTINGS)
    batches = [Weighted()(rows()[i : i + 4]) for i in (0, 4)]
    count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    trainer.model.train()
    loss = sum(trainer.compute_loss(trainer.model, x, num_items_in_batch=count) for x in batches)
    assert loss.item() == pytest.approx(want.loss.item(), rel=SUM_ERROR)
    loss.backward()
    want.loss.backward()
    exact = dict(want.student.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        error = (parameter.grad.double() - exact[name].grad).norm() / exact[name].grad.norm()
        assert error <= 1e-5, (name, error)  # measured: 1.2e-6


@KINDS
def test_training_and_evaluation_log_what_loops_give(tmp_path: Path, kind: Any) -> None:
    trainer = weighted(tmp_path, kind, gradient_accumulation_steps=2, max_steps=1)
    trainer.eval_dataset = rows(8)
    metrics, want = trainer.evaluate(), ByHand(rows()[:8], SETTINGS).metrics()
    parts = [ByHand(rows()[i : i + 4], SETTINGS).metrics()["loss"] for i in (0, 4)]
    assert metrics["eval_loss"] == pytest.approx(want["loss"], rel=SUM_ERROR)
    assert abs(sum(parts) / 2 - want["loss"]) > 100 * SUM_ERROR, "not the mean of the batches"
    for name in ("entropy_factor", "reasoning_share"):
        assert metrics[f"eval_{name}"] == pytest.approx(want[name], rel=SUM_ERROR)
    trainer.train()
    logs = trainer.state.log_history[-2]
    assert {name: logs[name] for name in want} == pytest.approx(want, rel=SUM_ERROR)


@pytest.mark.parametrize(("size", "steps"), [(4, 2), (1, 8)])
def test_accumulation_does_not_change_the_weights(tmp_path: Path, size: int, steps: int) -> None:
    def run(size: int, steps: int, kind: Any = DistillTrainer) -> dict[str, Tensor]:
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = weighted(tmp_path, kind, **sizes)
        trainer.train()
        return models.weights(trainer.model)

    one = run(8, 1)
    assert models.difference(one, run(size, steps)) <= TOLERANCE
    assert models.difference(one, run(size, steps, MicroBatchMean)) > 100 * TOLERANCE


def test_a_tokens_weight_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    trainer = weighted(tmp_path, token_weights={"entropy": 4.0})
    collate = models.Pad(width=14)

    def weights(data: list[dict[str, list[int]]]) -> Tensor:
        batch = collate(data)
        trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        return batch[KEPT].weights

    together = weights(rows(4))
    alone = torch.cat([weights([row]) for row in rows(4)])
    # logits are 1.5e-5 apart at most (tests.teachers.asking.ROUNDING); an entropy moves by less
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reads", ["loss", "predictions"])
def test_the_teacher_sees_each_micro_batch_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: str
) -> None:
    trainer = weighted(
        tmp_path, gradient_accumulation_steps=2, max_steps=2, watchdog={"action": "off"}
    )
    trainer.train()
    asked: list[Tensor] = []
    checked: list[Any] = []
    monkeypatch.setattr(trainer, "_check_batch", checked.append)
    forward = type(trainer.teacher.model).forward

    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is trainer.teacher.model and len(kwargs["input_ids"]) > 1:  # else it is probed
            asked.append(kwargs["input_ids"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(trainer.teacher.model), "forward", noted)
    if reads == "predictions":
        trainer.compute_metrics = lambda _: {}
    trainer.evaluate(rows(8))
    assert [len(x) for x in asked] == [4, 4]
    asked.clear()
    trainer.args.max_steps, trainer.state.global_step = 2, 0
    trainer.train()
    first = Weighted()(rows()[:4])["input_ids"]
    assert len(asked) == 4
    assert len(checked) == 2 + 4  # so is its alignment
    assert torch.equal(asked[0], first)


def test_a_signal_is_kept_until_its_loss_only(tmp_path: Path) -> None:
    trainer = weighted(tmp_path)
    batches = [Weighted()(rows()[i : i + 4]) for i in (0, 4)]
    count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    assert all(batch[KEPT].signal.hidden.ndim == 2 for batch in batches)
    losses = []
    for _ in range(2):  # the second time the teacher is asked again
        losses.append(trainer.compute_loss(trainer.model, batches[0], num_items_in_batch=count))
        assert [batch[KEPT].signal is None for batch in batches] == [True, False]
    bare = {name: value for name, value in batches[0].items() if name != KEPT}
    losses.append(trainer.compute_loss(trainer.model, bare, num_items_in_batch=count))
    assert losses[0].item() == losses[1].item() == losses[2].item()
    assert trainer._get_num_items_in_batch(batches, torch.device("cpu")) == count  # not squared
    assert all(batch[KEPT].signal is not None for batch in batches)  # asked for the new step


def test_a_batch_whose_teacher_is_asked_again_is_weighed_again() -> None:
    weighing = TokenWeighing(TokenWeights(None, None), 1.0, 8)
    batch: dict[str, Any] = {"labels": torch.ones(1, 6)}
    flat, sure = Signal(logits=torch.zeros(5, 8)), Signal(logits=99 * torch.eye(5, 8))
    weighing.ahead([batch], lambda x: x, lambda _: flat)
    for signal, factor in ((flat, 2.0), (sure, 1.0)):  # the first is kept for one loss
        weighed, found = weighing.of(batch, lambda: sure)
        assert found is signal
        assert weighed.weights is not None
        assert weighed.weights[0, 1:].tolist() == pytest.approx([factor] * 5)


def test_at_their_defaults_they_are_off(tmp_path: Path) -> None:
    given = {"data": rows(), "tokenizer": models.tokenizer()}
    markers = SETTINGS["markers"]
    off = {"entropy": 0, "reasoning": 1, "markers": markers}
    one = final(tmp_path, token_weights=off, **given)
    assert models.difference(one, final(tmp_path, **given)) == 0.0
    for on in ({"entropy": 1.0}, {"reasoning": 0.5, "markers": markers}):
        other = final(tmp_path, token_weights=on, **given)
        assert models.difference(one, other) > 100 * TOLERANCE


class Compares(OPSDTrainer):
    """Asks the teacher again at each loss: what was kept must be what it says now."""

    compared = 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        kept = inputs[KEPT]
        again = self._ask({name: value for name, value in inputs.items() if name != KEPT})
        assert torch.equal(kept.signal.hidden, again.hidden)
        assert torch.equal(kept.signal.head.weight, again.head.weight)
        type(self).compared += 1
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("teacher", ["live", "ema", "lora_scale", "base"])
def test_on_policy_the_signal_is_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: str
) -> None:
    """Completions serve two steps; the teacher moves between them. Dropout is on."""
    monkeypatch.setattr(Compares, "compared", 0)
    follow = {"ema": {"ema_decay": 0.2}, "lora_scale": {"lora_scale": "linear:0.0->1.0@4"}}
    args = OPSDConfig(
        **models.options(
            tmp_path,
            max_steps=4,
            teacher=teacher,
            self_teacher=follow.get(teacher),
            gradient_accumulation_steps=2,
            max_completion_length=8,
            learning_rate=0.01,
            rollout={"temperature": 1.0, "steps_per_rollout": 2, "importance_clip": 2.0},
            token_weights={"entropy": 4.0, "reasoning": 2.0, "markers": ["1", "2"]},
        )
    )
    student = models.llama(attention_dropout=0.2)
    student = models.lora(student) if teacher == "lora_scale" else student
    data, tokenizer = models.problems(), models.tokenizer()
    trainer = Compares(
        student, args, train_dataset=data, eval_dataset=data[:6], processing_class=tokenizer
    )
    trainer.train()
    assert Compares.compared == 8
    logs = models.steps(trainer)
    factors = [step["entropy_factor"] for step in logs]
    assert all(1.0 < x < 5.0 for x in factors)
    assert "importance_ratio" in logs[1]
    metrics = trainer.evaluate()
    assert Compares.compared == 10
    assert 1.0 < metrics["eval_entropy_factor"] < 5.0
    assert 0.0 <= metrics["eval_reasoning_share"] <= 1.0


def test_a_block_that_the_prompt_opens(tmp_path: Path) -> None:
    """The prompt has no labels; the reply's words up to the closing marker are inside."""
    settings = {"reasoning": 0.0, "markers": ["think", "so"]}
    args = OPSDConfig(
        **models.options(tmp_path, on_policy=False, max_steps=1, token_weights=settings)
    )
    row = {"prompt": "What is 1 + 2 ? think", "hint": "Hint : 3", "completion": "first 1 so 3 ."}
    tokenizer = models.tokenizer()
    trainer = OPSDTrainer(models.llama(), args, train_dataset=[row] * 4, processing_class=tokenizer)
    trainer.train()
    (step,) = models.steps(trainer)
    assert step["tokens"] == 4 * 4  # so, 3, the dot and the end token
    assert step["reasoning_share"] == pytest.approx(2 / 6)


def test_padding_is_outside_of_every_block() -> None:
    """Even if its token is a marker, in front of the row's own text."""
    weigh = TokenWeights(None, models.tokenizer(), 0.5, ("<pad>", "done"))
    ids, mask = torch.tensor([[0, 0, 5, 6], [5, 0, 6, 7]]), torch.tensor([[0, 0, 1, 1], [1] * 4])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(ids == 0, -100)}
    assert weigh(batch).tolist() == [[0, 0, 1, 1], [1, 0, 0.5, 0.5]]
    del batch["attention_mask"]
    assert weigh(batch).tolist() == [[0, 0, 0.5, 0.5], [1, 0, 0.5, 0.5]]


def cached(folder: Path, temperatures: tuple[float, float]) -> CachedTeacher:
    codec = HeadSamples(top_k=8, num_samples=4, temperature_range=temperatures)
    given = {"codec": codec, "data_collator": models.Pad()}
    cache_teacher(sharp(models.llama(1)), rows(), folder / "cache", **given)
    return CachedTeacher(folder / "cache")


def test_a_cached_teachers_entropy(tmp_path: Path) -> None:
    """Of what is stored; near that of the live teacher, which has 61 entries."""
    logs = []
    for teacher in (cached(tmp_path, (1.0, 2.0)), sharp(models.llama(1))):
        args = DistillConfig(
            **models.options(tmp_path, max_steps=1, token_weights={"entropy": 4.0})
        )
        trainer = DistillTrainer(models.llama(), args, models.Pad(), rows(), teacher=teacher)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    factors = [x["entropy_factor"] for x in logs]
    assert factors[0] == pytest.approx(factors[1], rel=0.03)
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=0.05)


def test_a_cache_that_has_not_temperature_1(tmp_path: Path) -> None:
    args = DistillConfig(**models.options(tmp_path, token_weights={"entropy": 1.0}))
    teacher = cached(tmp_path, (1.5, 2.0))
    with pytest.raises(ValueError, match=r"at temperature 1, the cache serves 1.5 to 2: write"):
        DistillTrainer(models.llama(), args, models.Pad(), rows(), teacher=teacher)


@pytest.mark.parametrize(
    "markers",
    [["<think>"], ["a", "a"], ["", "a"], ["a", 3], "ab", ["a", "b", "c"]],
)
def test_markers_are_checked(markers: Any) -> None:
    message = r"token_weights.markers must be two different texts, not empty, got "
    with pytest.raises(ValueError, match=message):
        DistillConfig(output_dir="out", report_to="none", token_weights={"markers": markers})


def test_what_they_cannot_be_combined_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entropy = {"token_weights": {"entropy": 1.0}}
    with pytest.raises(ValueError, match="reach neither label smoothing nor compute_loss_func"):
        weighted(tmp_path, label_smoothing_factor=0.1, **entropy).train()
    with pytest.raises(ValueError, match="token_weights of classes and of reasoning need a token"):
        weighted(tmp_path, tokenizer=None, token_weights={"reasoning": 2.0})
    args = DistillConfig(**models.options(tmp_path, alpha=0.0, **entropy))
    with pytest.raises(ValueError, match="token_weights need a teacher"):
        DistillTrainer(models.llama(), args, models.Pad(), rows())
    trainer = weighted(tmp_path)
    batch = Weighted()(rows()[:4])
    with pytest.raises(ValueError, match=r"need input_ids as the labels, got shape \[4, 3\]"):
        trainer.task.weighing.weigh(batch | {"input_ids": batch["input_ids"][:, :3]})
    trainer.task.weighing.entropy = 1.0
    ask = trainer.teacher.signal
    monkeypatch.setattr(trainer, "_ask", lambda _: ask(trainer.model, cut(batch)))
    with pytest.raises(ValueError, match=r"each of the student's \d+ scored tokens, got \d+"):
        trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    monkeypatch.setattr(DistillTrainer, "get_cp_size", lambda _: 2)
    with pytest.raises(ValueError, match=r"must have whole rows, got rows .* split over 2 proc"):
        weighted(tmp_path, token_weights={"word": 2.0})


def cut(batch: dict[str, Tensor]) -> Any:
    """A side that lacks some of the scored tokens."""
    side = sides.student_side(batch)
    predicts = side.predicts.clone()
    predicts[0] = False
    return side._replace(predicts=predicts)
