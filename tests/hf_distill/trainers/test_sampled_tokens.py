"""The losses of sampled tokens in the trainer: metrics, paths and config."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_distill import DistillConfig, DistillTrainer, HintCollator, OPSDConfig, OPSDTrainer
from hf_distill.losses import SAMPLED_KINDS
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.reading import ReadsLogits

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

TOLERANCE = 2e-6  # of weights after three steps of 1e-3; measured: 1e-7
SUM_ERROR = 5e-6  # relative, of a float32 mean over some 40 tokens, exponential in k3
UNKNOWN = {"student_entropy", "teacher_entropy", "top1_agreement"}


KINDS = pytest.mark.parametrize("kind", [DistillTrainer, ReadsLogits])


def make(
    folder: Path, kind: type[DistillTrainer] = DistillTrainer, family: str = "llama", **changes: Any
) -> DistillTrainer:
    family = models.FAMILIES[family]
    args = DistillConfig(**models.options(folder, **changes))
    data, evaluated = models.rows(), models.rows(6, seed=1)
    return kind(family(), args, models.Pad(), data, evaluated, teacher=family(1))


def by_hand(data: list[dict[str, list[int]]], divergence: str, clip: float) -> dict[str, float]:
    """Means over the scored tokens of the untrained models, temperature 3, scaled by 9."""
    student, teacher = models.llama().double(), models.llama(1).double()
    rows = []
    for row in data:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            z, w = (m(input_ids=ids).logits[0, :-1][labels != -100] for m in (student, teacher))
        at = torch.arange(len(z)), labels[labels != -100]
        log_q, log_p = ((x / 3).softmax(-1)[at].log() for x in (z, w))
        advantage = log_p - log_q
        k3 = advantage.exp() - 1 - advantage
        if divergence == "k3":
            soft, clipped = k3.clamp(max=clip), k3 > clip
        else:
            soft, clipped = -advantage.clamp(-clip, clip) * log_q, advantage.abs() > clip
        hard = -z.softmax(-1)[at].log()
        rows.append(torch.stack([9 * soft, hard, advantage, clipped.double()]))
    names = ("soft", "hard", "advantage", "clipped")
    return dict(zip(names, torch.cat(rows, -1).mean(-1).tolist(), strict=True))


@KINDS
@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("divergence", SAMPLED_KINDS)
def test_metrics_that_exist_are_those_computed_by_hand(
    tmp_path: Path, kind: type[DistillTrainer], divergence: str, clip: float | None
) -> None:
    trainer = make(
        tmp_path,
        kind,
        divergence=divergence,
        temperature=3.0,
        alpha=0.3,
        clip={"bound": clip, "level": "token"},
        gradient_accumulation_steps=2,
        max_steps=1,
    )
    evaluated = trainer.evaluate()
    trainer.train()
    data = (models.rows()[:8], models.rows(6, seed=1))
    for logs, rows, prefix in zip(
        (trainer.state.log_history[-2], evaluated), data, ("", "eval_"), strict=True
    ):
        want = by_hand(rows, divergence, clip or float("inf"))
        if clip is None:
            assert want.pop("clipped") == 0.0
            assert f"{prefix}clipped" not in logs
        else:
            assert 0.05 < want["clipped"] < 1.0
        found = {name: logs[prefix + name] for name in want}
        # an advantage is the difference of two float32 logs between 4 and 8, each rounded by 2^-22;
        # the loss multiplies it by 9 and by a log of some 4
        assert found == pytest.approx(want, rel=SUM_ERROR, abs=9 * 4 * 2 * 2**-22)
        assert not {prefix + name for name in UNKNOWN} & logs.keys()
        if not prefix:
            mixed = 0.3 * want["soft"] + 0.7 * want["hard"]
            assert logs["loss"] == pytest.approx(mixed, rel=SUM_ERROR)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("divergence", SAMPLED_KINDS)
@pytest.mark.parametrize("family", ["llama", "tied", "gemma2", "cohere", "phi"])
def test_hidden_states_and_logits_give_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, divergence: str, alpha: float
) -> None:
    monkeypatch.setattr("hf_distill.losses.chunks.CHUNK_ENTRIES", 10 * models.VOCAB)

    def run(kind: type[DistillTrainer], divergence: str) -> dict:
        trainer = make(tmp_path, kind, family, divergence=divergence, alpha=alpha, max_steps=1)
        trainer.train()
        return models.weights(trainer.model)

    logits = run(ReadsLogits, divergence)
    assert models.difference(run(DistillTrainer, divergence), logits) <= TOLERANCE
    assert models.difference(run(DistillTrainer, "reverse_kl"), logits) > 100 * TOLERANCE


def test_alpha_one_logs_no_hard_loss(tmp_path: Path) -> None:
    trainer = make(tmp_path, divergence="k3", alpha=1.0, max_steps=1)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert {"soft", "advantage", "tokens"} <= logs.keys()
    assert not {"hard", "clipped", *UNKNOWN} & logs.keys()


def test_self_distillation(tmp_path: Path) -> None:
    """A live teacher without a hint is the student: nothing to learn, no advantage."""
    advantages = []
    for hint in ("Hint : 3", None):
        rows = [{k: v for k, v in row.items() if k != "hint"} for row in models.problems()]
        collator = HintCollator(models.tokenizer(), lambda row, hint=hint: hint)
        args = OPSDConfig(
            **models.options(
                tmp_path,
                divergence="policy_gradient",
                teacher="live",
                max_completion_length=4,
                max_steps=1,
            )
        )
        trainer = OPSDTrainer(
            models.lora(models.llama()), args, collator, rows, processing_class=models.tokenizer()
        )
        trainer.train()
        advantages.append(trainer.state.log_history[0]["advantage"])
    # float32 logits of order 10, padded differently on the two sides
    assert abs(advantages[1]) <= 1e-5 < 1e-2 < abs(advantages[0])


@pytest.mark.parametrize("level", ["vocab_entry", "token_rescale"])
def test_a_clip_of_the_vocabulary_is_refused(level: str) -> None:
    clip = {"bound": 0.1, "level": level}
    with pytest.raises(ValueError, match=f"clip of k3 must have level 'token', got '{level}'"):
        DistillConfig(output_dir="out", report_to="none", divergence="k3", clip=clip)
