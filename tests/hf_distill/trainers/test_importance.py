"""Reused completions: the ratio to the student that sampled them, clipped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill import OPSDConfig, OPSDTrainer
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.reading import OPSDReadsLogits
from tests.metal_ops.ops.watching import Watch

SUM_ERROR = 3e-6  # relative, of a float32 mean over some 40 tokens


KINDS = pytest.mark.parametrize("kind", [OPSDTrainer, OPSDReadsLogits])


def make(
    folder: Path, kind: type[OPSDTrainer] = OPSDTrainer, clip: float | None = 1.2, **changes: Any
) -> OPSDTrainer:
    model = changes.pop("model", None)
    settings = {"on_policy": False, "rollout": {"importance_clip": clip}} | changes
    return kind(
        models.llama() if model is None else model,
        OPSDConfig(**models.options(folder, **settings)),
        train_dataset=models.problems(),
        processing_class=models.tokenizer(),
        teacher=None if "teacher" in changes else models.llama(1),
    )


def batch_of(trainer: OPSDTrainer) -> dict[str, Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def dense(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """[B, T] log-probabilities of the labels in float64, row by row without padding."""
    result = torch.full(batch["labels"].shape, torch.nan, dtype=torch.float64)
    exact = models.copied(model).double()
    for i, mask in enumerate(batch["attention_mask"].bool()):
        ids = batch["input_ids"][i][mask]
        with torch.no_grad():
            log_probs = exact(input_ids=ids[None]).logits[0].log_softmax(-1)
        for at in range(1, len(ids)):
            if batch["labels"][i, at] != -100:
                result[i, at] = log_probs[at - 1, ids[at]]
    return result


def moved(model: Any, size: float = 0.3) -> None:
    """The student after a step."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * parameter.std() * torch.randn_like(parameter))


@KINDS
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_behaviour_is_that_of_a_dense_computation(
    tmp_path: Path, kind: type[OPSDTrainer], family: str
) -> None:
    trainer = make(tmp_path, kind, model=models.FAMILIES[family]())
    batch = batch_of(trainer)
    trainer.model.train()
    found = trainer.behaviour_log_probs(batch)
    assert trainer.model.training
    assert not found.requires_grad
    want = dense(trainer.model, batch)
    assert torch.equal(found.isnan(), want.isnan())
    assert torch.equal(found.isnan(), (batch["labels"] == -100))
    # float32 logits of order 10; measured: 7e-6
    torch.testing.assert_close(found.double(), want, rtol=0, atol=1e-4, equal_nan=True)


def test_behaviour_is_without_dropout(tmp_path: Path) -> None:
    calm, noisy = (make(tmp_path, model=models.llama(attention_dropout=p)) for p in (0.0, 0.9))
    noisy.model.train()
    found = [trainer.behaviour_log_probs(batch_of(trainer)) for trainer in (calm, noisy)]
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


def test_behaviour_needs_no_logits_of_all_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_distill.losses.chunks.CHUNK_ENTRIES", 3000)
    trainer = make(tmp_path, model=models.llama(vocab_size=3000), teacher="live")
    batch = batch_of(trainer)
    trainer.behaviour_log_probs(batch)  # the probe's few tokens, before the watch
    with Watch() as watch:
        trainer.behaviour_log_probs(batch)
    scored = int((batch["labels"] != -100).sum())
    assert max(watch.sizes) <= 4 * 3000 < scored * 3000


@KINDS
@pytest.mark.parametrize("alpha", [0.4, 1.0])
@pytest.mark.parametrize("divergence", ["jsd", "k3"])
def test_a_student_that_has_not_moved_has_the_same_loss(
    tmp_path: Path, kind: type[OPSDTrainer], alpha: float, divergence: str
) -> None:
    results = []
    for clip in (1.2, None):
        trainer = make(tmp_path, kind, clip, alpha=alpha, divergence=divergence)
        model, batch = trainer.model.train(), batch_of(trainer)
        batch["behaviour_log_probs"] = trainer.behaviour_log_probs(batch)
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (loss, grads), (other, other_grads) = results
    assert torch.equal(loss, other)
    assert models.difference(grads, other_grads) == 0.0


def per_token(model: Any, teacher: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """JSD and log-probability of each scored token, in float64, row by row."""
    soft, hard = [], []
    for i in range(len(batch["labels"])):
        sides = []
        names = (
            ("input_ids", "completion_index"),
            ("teacher_input_ids", "teacher_completion_index"),
        )
        for lm, (ids, index) in zip((model, teacher), names, strict=True):
            at = batch[index][i][batch[index][i] >= 0] - 1
            mask = batch[ids.replace("input_ids", "attention_mask")][i].bool()
            with torch.no_grad():
                logits = models.copied(lm).double()(input_ids=batch[ids][i][mask][None]).logits[0]
            sides.append(logits[at].softmax(-1))
            tokens = batch[ids][i][at + 1]
        q, p = sides
        m = (p + q) / 2
        soft.append(0.5 * (p * (p / m).log()).sum(-1) + 0.5 * (q * (q / m).log()).sum(-1))
        hard.append(q.gather(1, tokens[:, None])[:, 0].log())
    return torch.cat(soft), torch.cat(hard)


@KINDS
@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_after_a_step_the_soft_loss_is_weighed(
    tmp_path: Path, kind: type[OPSDTrainer], alpha: float
) -> None:
    trainer = make(tmp_path, kind, 1.2, alpha=alpha)
    batch = batch_of(trainer)
    before = dense(trainer.model, batch)
    batch["behaviour_log_probs"] = trainer.behaviour_log_probs(batch)
    row = int((batch["labels"][0] != -100).nonzero()[0, 0])
    batch["behaviour_log_probs"][0, row] = torch.nan  # unknown: a ratio of 1
    moved(trainer.model)
    loss = trainer.compute_loss(trainer.model.train(), batch)
    soft, now = per_token(trainer.model, trainer.teacher.model, batch)
    ratio = (now - before[batch["labels"] != -100]).exp()
    used = ratio.clamp(max=1.2)
    used[0] = 1.0
    want = (alpha * used * soft - (1 - alpha) * now).mean().item()
    assert loss.item() == pytest.approx(want, rel=5 * SUM_ERROR)
    assert abs(soft.mean() - (used * soft).mean()) > 1e-2 * soft.mean()
    trainer.log(logs := {"loss": 0.0})
    assert logs["importance_ratio"] == pytest.approx(ratio[1:].mean().item(), rel=5e-5)
    clipped = (ratio[1:] > 1.2).double().mean().item()
    assert 0 < clipped < 1
    assert logs["importance_clipped"] == pytest.approx(clipped)
    assert logs["soft"] == pytest.approx(soft.mean().item(), rel=5 * SUM_ERROR)


def test_the_ratio_has_no_gradient(tmp_path: Path) -> None:
    """Twice the soft loss where every token has become twice as likely."""
    grads = []
    for shift, clip in ((0.0, 5.0), (0.6931471805599453, 5.0), (0.6931471805599453, 1.5)):
        trainer = make(tmp_path, OPSDTrainer, clip)
        model, batch = trainer.model.train(), batch_of(trainer)
        batch["behaviour_log_probs"] = trainer.behaviour_log_probs(batch) - shift
        trainer.compute_loss(model, batch).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        for factor, other in ((2.0, grads[1]), (1.5, grads[2])):
            assert (other[name] - factor * grad).abs().max() <= 1e-5 * grad.abs().max(), name


def test_nothing_is_logged_without_a_clip(tmp_path: Path) -> None:
    trainer = make(tmp_path, clip=None, max_steps=1)
    trainer.train()
    assert not [name for name in trainer.state.log_history[0] if "importance" in name]
    known = make(tmp_path, max_steps=1)
    known.train()  # no batch carries log-probabilities
    assert not [name for name in known.state.log_history[0] if "importance" in name]


def test_another_shape_is_an_error(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    batch = batch_of(trainer)
    batch["behaviour_log_probs"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"must have the labels' shape \[4, \d+\], got \[2, 2\]"):
        trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_the_clip_is_positive(tmp_path: Path, clip: float) -> None:
    with pytest.raises(ValueError, match=f"importance_clip must be positive, got {clip}"):
        make(tmp_path, clip=clip)
