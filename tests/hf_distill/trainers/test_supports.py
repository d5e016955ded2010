"""support, top_k and missing of a config: what they mean, contradict, and where they are read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import HfArgumentParser

from hf_distill import (
    CachedTeacher,
    DistillConfig,
    DistillTrainer,
    OPSDConfig,
    RemoteTeacher,
    cache_teacher,
)
from hf_distill.cache import TopK
from hf_distill.cache.errors import UnsupportedDivergence
from metal_ops import DivergenceSpec, divergence
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.own_losses import distill

SUPPORTS = [
    {"support": "teacher_topk", "top_k": 5},
    {"support": "teacher_topk", "top_k": 5, "missing": "renormalise"},
    {"support": "student_topk", "top_k": 3, "missing": "tail"},
    {"support": "union", "top_k": 4, "missing": "zero"},
    {"support": "union", "top_k": 4, "missing": "renormalise"},
]
READ = {"temperature": 1.5, "alpha": 1.0}


def first_batch(trainer: DistillTrainer) -> dict[str, Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def by_hand(batch: dict[str, Tensor], spec: DivergenceSpec) -> tuple[float, dict[str, Tensor]]:
    """The mean divergence of a batch's scored tokens and its gradient, from logits of all."""
    student, teacher, scored = models.llama(), models.llama(1), batch["labels"][:, 1:] != -100
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        said = teacher(**inputs).logits[:, :-1][scored]
    loss = divergence(student(**inputs).logits[:, :-1][scored], said, spec).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in student.named_parameters()}


@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["hidden states", "logits"])
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_the_loss_is_that_of_the_spec(
    tmp_path: Path, support: dict[str, Any], kind: str, smoothing: float
) -> None:
    settings = READ | support | {"divergence": kind, "label_smoothing_factor": smoothing}
    trainer = distill(tmp_path, None, **settings)
    batch, model = first_batch(trainer), trainer.model.train()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    spec = DivergenceSpec(kind, temperature=1.5, temperature_scaling="t2", **support)
    want, gradient = by_hand(batch, spec)
    # float32 logits of order 4 in two orders of their sums
    assert loss.item() == pytest.approx(want, rel=1e-5)
    for name, p in model.named_parameters():
        assert (p.grad - gradient[name]).abs().max() <= 1e-4 * gradient[name].abs().max(), name
    whole, _ = by_hand(batch, DivergenceSpec(kind, temperature=1.5, temperature_scaling="t2"))
    assert abs(want - whole) > 1e-3 * whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 5}, "top_k must be None with support 'full', got 5"),
        ({"support": "union"}, "support 'union' needs top_k >= 1, got None"),
        ({"support": "teacher_topk", "top_k": 0}, "'teacher_topk' needs top_k >= 1, got 0"),
        ({"support": "best"}, r"support must be one of \('full', .* got 'best'"),
        ({"missing": "drop"}, r"missing must be one of \('tail', .* got 'drop'"),
        (
            {"support": "union", "top_k": 5, "missing": "zero", "divergence": "reverse_kl"},
            "missing 'zero' must not be used with reverse_kl",
        ),
        (  # reverse_kl is where the schedule ends
            {
                "support": "union", "top_k": 5, "missing": "zero",
                "divergence": "jsd", "beta": "linear:0.5->1.0@9",
            },
            "missing 'zero' must not be used with reverse_kl",
        ),
        *(
            ({"divergence": kind, name: value}, f"'{kind}' has no {name}: leave it at")
            for kind in ("k3", "policy_gradient", "uld")
            for name, value in (("support", "union"), ("top_k", 5), ("missing", "zero"))
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [DistillConfig, OPSDConfig])
def test_contradictions_are_found_in_the_config(
    tmp_path: Path, kind: type[DistillConfig], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**models.options(tmp_path, **settings))


def test_they_are_read_from_text(tmp_path: Path) -> None:
    parser = HfArgumentParser(DistillConfig)
    words = ["--support", "union", "--top_k", "8", "--missing", "renormalise"]
    (given,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *words])
    file = tmp_path / "config.yaml"
    file.write_text(f"output_dir: {tmp_path}\nsupport: union\ntop_k: 8\nmissing: renormalise\n")
    (read,) = parser.parse_yaml_file(str(file))
    spec = DivergenceSpec(
        "forward_kl", 0.5, 2.0, "t2", support="union", top_k=8, missing="renormalise"
    )
    assert given.divergence_spec() == read.divergence_spec() == spec
    assert {k: read.to_dict()[k] for k in ("support", "top_k", "missing")} == {
        "support": "union", "top_k": 8, "missing": "renormalise",
    }  # fmt: skip
    with pytest.raises(ValueError, match="support 'union' needs top_k >= 1, got None"):
        parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--support", "union"])


def top_8(folder: Path) -> CachedTeacher:
    path, given = folder / "cache", {"codec": TopK(8), "data_collator": models.Pad()}
    if not path.exists():
        cache_teacher(models.llama(1), models.rows(), path, **given)
    return CachedTeacher(path)


@pytest.mark.parametrize("missing", ["tail", "renormalise"])
def test_a_cache_serves_the_teachers_best(tmp_path: Path, missing: str) -> None:
    """Log-probabilities are in 16 bits there, at temperature 1."""
    settings = {"support": "teacher_topk", "top_k": 5, "missing": missing}
    losses = []
    for teacher in (top_8(tmp_path), models.llama(1)):
        trainer = distill(tmp_path, None, teacher=teacher, alpha=1.0, temperature=1.0, **settings)
        trainer.train()
        losses.append([log["soft"] for log in models.steps(trainer)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    spec = DivergenceSpec("forward_kl", support="teacher_topk", top_k=5, missing=missing)
    want, _ = by_hand(first_batch(trainer), spec)
    assert losses[1][0] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"support": "student_topk", "top_k": 5}, "entries that the student chooses"),
        ({"support": "union", "top_k": 5}, "entries that the student chooses"),
        (
            {"support": "teacher_topk", "top_k": 9},
            "teacher's top 9 is asked for and 8 entries are kept",
        ),
    ],
)
def test_what_a_cache_does_not_know_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedDivergence, match=message):
        distill(tmp_path, None, teacher=top_8(tmp_path), temperature=1.0, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"support": "student_topk", "top_k": 5},
        {"support": "union", "top_k": 5},
        {"support": "teacher_topk", "top_k": 9},
    ],
    ids=str,
)
def test_what_a_server_does_not_say_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    teacher = RemoteTeacher("http://127.0.0.1:1", "teacher", top_k=8)
    words = r"its own 8 best entries of a token, .*\(python -m hf_distill serve\) serves all of"
    with pytest.raises(ValueError, match=words):
        distill(tmp_path, None, teacher=teacher, temperature=1.0, **settings)
