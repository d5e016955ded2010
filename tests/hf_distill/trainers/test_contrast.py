"""Training with a wrong hint: one forward for both contexts, formulas, schedules, refusals."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_distill import (
    Attempt,
    CachedTeacher,
    Contrast,
    DistillConfig,
    DistillTrainer,
    Feedback,
    Hint,
    HintCollator,
    OPSDConfig,
    OPSDTrainer,
    cache_teacher,
)
from hf_distill.data.alignment import AlignmentError
from hf_distill.data.sides import CONTRAST_ABSENT, CONTRAST_PREFIX, UNCONTRASTED, contrast_prefix
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

SUM_ERROR = 5e-6  # relative, of a float32 mean over some 20 tokens; measured: 3e-7


def problems(count: int = 8) -> list[dict[str, Any]]:
    """The second half of the rows has wrong hints that are the right ones."""
    made = models.problems(count)
    for i, row in enumerate(made):
        row["wrong"] = row["hint"] if i >= count // 2 else "Hint : 9 9"
    return made


def make(folder: Path, hint: Any = "wrong", kind: str = "weight", **changes: Any) -> OPSDTrainer:
    """A trainer whose rows have the wrong hints of their column, or of another source."""
    teacher, collate = changes.pop("given", None), changes.pop("collate", lambda x: x)
    student = changes.pop("student", None) or models.lora(models.llama())
    settings = {"on_policy": False, "contrast": {"kind": kind}, "max_steps": 1} | changes
    return OPSDTrainer(
        student,
        OPSDConfig(**models.options(folder, **settings)),
        collate(HintCollator(models.tokenizer(), "hint", contrast=hint)),
        problems(),
        problems(),
        models.tokenizer(),
        teacher=teacher,
    )


def loss_of(trainer: OPSDTrainer, rows: list[dict[str, Any]]) -> Tensor:
    return trainer.compute_loss(trainer.model.eval(), trainer.data_collator(rows))


def scored_log_probs(trainer: OPSDTrainer, batch: dict[str, Tensor], prefix: str) -> list[Tensor]:
    """Float64 log-probabilities at each row's scored tokens, each row read by itself."""
    model: Any = trainer.model
    found = []
    with torch.no_grad(), model.disable_adapter() if prefix else nullcontext():
        for i, ids in enumerate(batch[f"{prefix}input_ids"]):
            at = batch[f"{prefix}completion_index"][i]
            ids = ids[batch[f"{prefix}attention_mask"][i].bool()]
            logits = model(input_ids=ids[None]).logits[0].double()
            found.append(logits[at[at >= 0] - 1].log_softmax(-1))
    return found


def by_hand(
    trainer: OPSDTrainer, batch: dict[str, Tensor], kind: str, share: float, number: int = 1
) -> float:
    """The mean over tokens of the JSD, weighed or to the target, with the mean of K contexts."""
    prefixes = ["", "teacher_", *(contrast_prefix(k) for k in range(number))]
    sides = [scored_log_probs(trainer, batch, x) for x in prefixes]
    missing = batch.get(CONTRAST_ABSENT, torch.zeros(len(sides[0]), number, dtype=torch.bool))
    total, count = 0.0, 0
    for labels, absent, q, p, *w in zip(batch["labels"], missing, *sides, strict=True):
        there = [x.exp() for x, away in zip(w, absent, strict=True) if not away]
        tokens, d = labels[labels != -100], p - (sum(there) / len(there)).log()
        factor = torch.ones(len(tokens), dtype=torch.float64)
        if kind == "target":
            d = d - d.mean(-1, keepdim=True)
            p = (share * (q + 10 * torch.tanh(d / 10)) + (1 - share) * p).log_softmax(-1)
        else:
            g = torch.tanh(d.gather(1, tokens[:, None])[:, 0].abs() / 1.3)
            factor = 1 - share + share * torch.where(g > 0.02, g, 0.0)
        m = ((p.exp() + q.exp()) / 2).log()
        jsd = (p.exp() * (p - m) + q.exp() * (q - m)).sum(-1) / 2
        total, count = total + float((factor * jsd).sum()), count + len(tokens)
    return total / count


@pytest.mark.parametrize("kind", ["weight", "target"])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_the_loss_is_that_of_the_formula(tmp_path: Path, kind: str, share: float) -> None:
    trainer, rows = make(tmp_path, kind=kind, contrast_weight=share), problems()[2:6]
    want = by_hand(trainer, trainer.data_collator(rows), kind, share)
    assert loss_of(trainer, rows).item() == pytest.approx(want, rel=SUM_ERROR)
    plain = loss_of(make(tmp_path, None), rows).item()
    assert abs(plain - want) > 1000 * SUM_ERROR * want


@pytest.mark.parametrize("kind", ["weight", "target"])
def test_equal_hints_teach_nothing(tmp_path: Path, kind: str) -> None:
    """Bit for bit, although the two contexts are rows of one batch."""
    trainer = make(tmp_path, kind=kind, max_steps=2, weight_decay=0.0)
    trainer.train_dataset = problems()[4:]
    before = models.weights(trainer.model)
    trainer.train()
    assert models.difference(before, models.weights(trainer.model)) == 0.0
    logs = models.steps(trainer)
    assert [x["uncontrasted"] for x in logs] == [1.0, 1.0]
    assert [x["loss"] for x in logs] == [0.0, 0.0]
    assert [x["grad_norm"] for x in logs] == [0.0, 0.0]


def forwards(trainer: OPSDTrainer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Rows of each forward of the model, and whether it has a gradient."""
    seen: list[tuple[int, bool]] = []
    kind = type(trainer.model.get_base_model())
    forward = kind.forward

    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append((len(kwargs["input_ids"]), torch.is_grad_enabled()))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", noted)
    return seen


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [(8, False), (4, True)]),
        # states of layers are of one context
        ({"hidden_layers": "last"}, [(4, False), (4, False), (4, True)]),
    ],
)
def test_the_teacher_reads_both_contexts_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: Any
) -> None:
    trainer = make(tmp_path, **changes)
    first = loss_of(trainer, problems()[:4]).item()  # the probes are done
    seen = forwards(trainer, monkeypatch)
    assert loss_of(trainer, problems()[:4]).item() == first
    assert seen == expected


@pytest.mark.slow
def test_logits_and_hidden_states_have_the_same_loss(tmp_path: Path) -> None:
    for kind in ("weight", "target"):
        hidden = loss_of(make(tmp_path, kind=kind), problems()[:4]).item()
        smoothed = make(tmp_path, kind=kind, label_smoothing_factor=0.1)
        assert loss_of(smoothed, problems()[:4]).item() == pytest.approx(hidden, rel=SUM_ERROR)


@pytest.mark.slow
def test_the_share_follows_a_schedule(tmp_path: Path) -> None:
    """From the plain loss to the contrast; an evaluation has the last value."""
    trainer = make(tmp_path, contrast_weight="linear:0.0->1.0@2", max_steps=3, learning_rate=0.0)
    plain = make(tmp_path, None, max_steps=3, learning_rate=0.0)
    fixed = make(tmp_path)
    for each in (trainer, plain):
        each.train()
    logs, others = models.steps(trainer), models.steps(plain)
    assert [x["contrast_weight"] for x in logs] == [0.0, 0.5, 1.0]
    assert logs[0]["loss"] == others[0]["loss"]
    assert logs[2]["loss"] < others[2]["loss"]
    assert "contrast_factor" not in logs[0]
    assert trainer.evaluate()["eval_loss"] == fixed.evaluate()["eval_loss"]


@pytest.mark.parametrize(
    "source",
    [
        "other_row",
        pytest.param("corrupted_number", marks=pytest.mark.slow),
        pytest.param("reference", marks=pytest.mark.slow),
        "sibling",
    ],
)
def test_sources_in_rollouts(tmp_path: Path, source: str) -> None:
    """Both contexts end in what was sampled; evaluations too."""
    rollout = {"num_completions": 2}
    trainer = OPSDTrainer(
        models.llama(),
        OPSDConfig(
            **models.options(tmp_path, max_steps=1, max_completion_length=4, rollout=rollout)
        ),
        HintCollator(models.tokenizer(), "hint", contrast=contrast_of(source)),
        problems(),
        problems(4),
        models.tokenizer(),
        environment=judge if source == "sibling" else None,
    )
    trainer.train()
    (step,) = models.steps(trainer)
    assert 0.0 < step["contrast_factor"] < 1.0
    assert step["uncontrasted"] == (0.5 if source == "sibling" else 0.0)
    # an evaluation samples one completion a prompt
    metrics = trainer.evaluate()
    assert metrics["eval_uncontrasted"] == (1.0 if source == "sibling" else 0.0)
    assert (metrics["eval_soft"] > 0) == (source != "sibling")


def judge(attempts: list[Attempt]) -> list[Feedback]:
    """Every second attempt has succeeded."""
    return [Feedback(columns={"score": float(i % 2)}) for i, _ in enumerate(attempts)]


def contrast_of(source: str) -> Any:
    if source == "sibling":
        return Hint("Hint : {failed_sibling}", optional=True)
    return Contrast(source)


def test_a_row_whose_contrast_scores_other_tokens_is_an_error(tmp_path: Path) -> None:
    class Broken(HintCollator):
        def __call__(self, rows: Any) -> dict[str, Tensor]:
            batch = super().__call__(rows)
            at = batch[f"{CONTRAST_PREFIX}completion_index"][0, 0]
            batch[f"{CONTRAST_PREFIX}input_ids"][0, at] += 1
            return batch

    def broken(collator: HintCollator) -> HintCollator:
        collator.__class__ = Broken
        return collator

    with pytest.raises(AlignmentError, match="in the contrast, student and teacher must score"):
        make(tmp_path, collate=broken).train()


def test_batches_without_hints_have_the_same_keys() -> None:
    """Processes count alike what had no wrong hint."""
    collator = HintCollator(models.tokenizer(), contrast="wrong")
    bare = [{k: v for k, v in row.items() if k != "hint"} for row in problems(2)]
    batch, hinted = collator(bare), collator(problems(2))
    assert batch.keys() == hinted.keys()
    assert batch["teacher_input_ids"].tolist() == batch["input_ids"].tolist()
    assert bool(batch[UNCONTRASTED].all())


def test_students_are_not_shown_the_contrast(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    batch = trainer.task.read(trainer.data_collator(problems()[:4]), None, 1)
    assert set(batch.student.inputs) == {"input_ids", "attention_mask"}
    assert set(batch.teacher.inputs) == {"input_ids", "attention_mask"}
    assert batch.inputs[UNCONTRASTED].tolist() == [False] * 4


def cached(folder: Path) -> CachedTeacher:
    collator = HintCollator(models.tokenizer(), "hint")
    cache_teacher(models.llama(1), problems(), folder / "cache", data_collator=collator)
    return CachedTeacher(folder / "cache")


REFUSALS: list[tuple[Callable[[Path], dict[str, Any]], str]] = [
    (
        lambda x: {"given": cached(x)},
        "a second context, and that says the whole .* a CachedTeacher",
    ),
    (lambda _: {"kind": "target", "divergence": "k3"}, "needs a divergence over the whole vocab"),
    (
        lambda _: {"kind": "target", "support": "teacher_topk", "top_k": 4},
        "whole vocabulary and no taid, got divergence 'jsd', support 'teacher_topk'",
    ),
    (
        lambda _: {"kind": "target", "divergence": "forward_kl", "taid": {}},
        r"support 'full' and taid \{\}",
    ),
    (lambda _: {"contrast_weight": 1.5}, r"contrast_weight must be in \[0, 1\], got 1.5"),
]


def test_other_trainers_do_not_read_it(tmp_path: Path) -> None:
    collator = HintCollator(models.tokenizer(), "hint", contrast="wrong")
    args = DistillConfig(**models.options(tmp_path))
    with pytest.raises(ValueError, match=r"a contrast needs an OPSDTrainer .* got a DistillConfig"):
        DistillTrainer(models.llama(), args, collator, problems(), teacher=models.llama(1))


@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_what_it_cannot_be_combined_with(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **changes(tmp_path))


def test_settings_of_the_other_kind_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, contrast={"kind": "target", "scale": 2.0})
    assert "a setting is not used: contrast.scale is of another contrast.kind" in caplog.text
