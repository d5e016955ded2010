"""The hidden loss in the trainers: its value, gradients, projections, checkpoints and errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_distill import DistillConfig, DistillTrainer, OPSDConfig, OPSDTrainer
from hf_distill.data.sides import predicts_from_index, predicts_from_labels
from hf_distill.losses.hidden_states import FILE
from hf_distill.teachers import RoutedTeacher
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.reading import ReadsLogits

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

STEP_ERROR = 5e-6  # relative, of float32 sums over some 40 tokens; measured: 6e-7


def student(**changes: Any) -> nn.Module:
    return models.llama(num_hidden_layers=4, **changes)


def teacher(**changes: Any) -> nn.Module:
    return models.llama(1, **{"num_hidden_layers": 6, "hidden_size": 32} | changes)


def make(
    folder: Path,
    model: nn.Module | None = None,
    other: nn.Module | None = None,
    kind: type[DistillTrainer] = DistillTrainer,
    **changes: Any,
) -> DistillTrainer:
    settings = {"hidden_layers": [[1, 2], [3, 5]], "max_steps": 1} | changes
    return kind(
        student() if model is None else model,
        DistillConfig(**models.options(folder, **settings)),
        models.Pad(),
        models.rows(),
        models.rows(6, seed=1),
        teacher=teacher() if other is None else other,
    )


DIFFERENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda s, t: ((s - t) ** 2).mean(-1),
    "l1": lambda s, t: (s - t).abs().mean(-1),
    "cosine": lambda s, t: 1 - (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1)),
}


def by_hand(
    model: nn.Module, other: nn.Module, batch: dict[str, Tensor], kind: str, pairs: Any
) -> Tensor:
    """[N] the difference of states, from all hidden states of both models."""
    predicts = predicts_from_labels(batch["labels"])
    ids = batch.get("teacher_input_ids")
    if ids is None:
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        seen = predicts
    else:
        inputs = {"input_ids": ids, "attention_mask": batch["teacher_attention_mask"]}
        seen = predicts_from_index(batch["teacher_completion_index"], ids.shape[1])
    with torch.no_grad():
        targets = other(**inputs, output_hidden_states=True).hidden_states
    own = {k: batch[k] for k in ("input_ids", "attention_mask")}
    found = model(**own, output_hidden_states=True).hidden_states
    return torch.stack(
        [DIFFERENCES[kind](found[a][predicts], targets[b][seen]) for a, b in pairs]
    ).mean(0)


@pytest.mark.parametrize("reads", [DistillTrainer, ReadsLogits])
@pytest.mark.parametrize("kind", DIFFERENCES)
def test_value_and_gradient_are_those_of_the_formula(
    tmp_path: Path, kind: str, reads: type[DistillTrainer]
) -> None:
    settings = {"hidden": {"loss": kind}, "hidden_weight": 0.7}
    trainer = make(tmp_path, kind=reads, **settings)
    plain = make(tmp_path, kind=reads, hidden_layers=None)
    batch = models.Pad()(models.rows()[:4])
    loss, base = (x.compute_loss(x.model, dict(batch)) for x in (trainer, plain))
    loss.backward()
    base.backward()
    model = student().double()
    per_token = by_hand(model, teacher().double(), batch, kind, [(1, 2), (3, 5)])
    (0.7 * per_token.mean()).backward()
    assert loss.item() - base.item() == pytest.approx(0.7 * per_token.mean().item(), rel=1e-5)
    assert trainer._meters[False].read(trainer.accelerator)["hidden"] == pytest.approx(
        per_token.mean().item(), rel=STEP_ERROR
    )
    grads = dict(plain.model.named_parameters())
    wanted = dict(model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        extra = wanted[name].grad
        want = grads[name].grad + (0 if extra is None else extra.float())
        assert (parameter.grad - want).norm() <= 1e-5 * want.norm(), name


def test_hinted_contexts_are_matched_by_their_index_maps(tmp_path: Path) -> None:
    args = OPSDConfig(
        **models.options(tmp_path, on_policy=False, hidden_layers=[1], hidden_weight=0.5)
    )
    model = models.llama()
    trainer = OPSDTrainer(
        model, args, train_dataset=models.problems(), processing_class=models.tokenizer()
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    assert batch["teacher_input_ids"].shape[1] > batch["input_ids"].shape[1]  # hints are there
    trainer.compute_loss(trainer.model, dict(batch))
    want = by_hand(models.llama(), models.llama(), batch, "mse", [(1, 1)]).mean().item()
    found = trainer._meters[False].read(trainer.accelerator)["hidden"]
    assert want > 1e-3
    assert found == pytest.approx(want, rel=STEP_ERROR)


def test_micro_batches_are_one_batch(tmp_path: Path) -> None:
    one = make(tmp_path, per_device_train_batch_size=8)
    two = make(tmp_path, gradient_accumulation_steps=2)
    for trainer in (one, two):
        trainer.train()
    assert two.state.log_history[0]["hidden"] == pytest.approx(
        one.state.log_history[0]["hidden"], rel=STEP_ERROR
    )
    moved = models.difference(models.weights(one.model), models.weights(student()))
    error = models.difference(models.weights(one.model), models.weights(two.model))
    assert error < 1e-3 * moved


@pytest.mark.parametrize("change", [{"hidden_weight": 0.0}, {"hidden_layers": None}])
def test_no_weight_is_off_bit_for_bit(tmp_path: Path, change: dict[str, Any]) -> None:
    found = []
    for settings in ({"hidden_layers": None, "hidden_weight": 0.1}, change, {}):
        trainer = make(tmp_path, max_steps=3, **settings)
        trainer.train()
        found.append((models.weights(trainer.model), trainer.state.log_history[0].keys()))
    assert models.difference(found[0][0], found[1][0]) == 0
    assert found[0][1] == found[1][1]
    assert models.difference(found[0][0], found[2][0]) > 1e-5
    assert "hidden" in found[2][1] - found[0][1]


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    runs = [make(tmp_path), make(tmp_path)]
    runs[1].model.activation_checkpointing_enable()
    for trainer in runs:
        trainer.train()
    one, two = (models.weights(trainer.model) for trainer in runs)
    moved = models.difference(one, models.weights(student()))
    ulp = torch.finfo(torch.float32).eps  # of weights near 1, on some processors
    assert models.difference(one, two) < max(1e-4 * moved, 1.5 * ulp) < 1e-3 * moved


def wide() -> nn.Module:
    return teacher(hidden_size=48)


def saving(folder: Path, model: nn.Module | None = None, **changes: Any) -> DistillTrainer:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3} | changes
    return make(folder, model, wide(), **settings)


@pytest.mark.parametrize("adapted", [False, True])
def test_projections_are_trained_and_resumed_but_not_exported(
    tmp_path: Path, adapted: bool
) -> None:
    def model() -> nn.Module:
        return models.lora(student()) if adapted else student()

    trainer = saving(tmp_path, model())
    layers: Any = trainer._layers
    assert [tuple(x.weight.shape) for x in layers.projections] == [(48, 32)] * 2
    before = models.weights(layers.projections)
    trainer.train()
    after = models.weights(layers.projections)
    assert models.difference(before, after) > 1e-3  # about a learning rate a step
    trainer.save_model(str(tmp_path / "export"))
    for folder in ("export", "checkpoint-3", "checkpoint-6"):
        (weights,) = (tmp_path / folder).glob("*model.safetensors")
        assert not [name for name in load_file(weights) if "projection" in name]
        assert (tmp_path / folder / FILE).is_file() == folder.startswith("checkpoint")
    assert not [name for name, _ in trainer.model.named_parameters() if "projection" in name]
    again = saving(tmp_path, model())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert models.difference(models.weights(again.model), models.weights(trainer.model)) == 0
    assert models.difference(models.weights(again._layers.projections), after) == 0  # type: ignore[union-attr]


def test_a_checkpoint_without_projections_is_an_error(tmp_path: Path) -> None:
    saving(tmp_path).train()
    (tmp_path / "checkpoint-3" / FILE).unlink()
    with pytest.raises(FileNotFoundError, match="projections must be in the checkpoint"):
        saving(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_the_best_model_has_no_projections(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    best |= {"greater_is_better": True, "metric_for_best_model": "eval_loss"}  # not the last
    trainer = saving(tmp_path, **best)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    assert not [x for x in caplog.messages if "missing" in x]
    loaded = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert models.difference(models.weights(loaded), models.weights(trainer.model)) == 0
    layers: Any = trainer._layers  # which belong to the model
    of_best = load_file(tmp_path / "checkpoint-3" / FILE)
    assert models.difference(models.weights(layers.projections), of_best) == 0


def test_the_best_model_is_loaded_where_only_models_are_saved(tmp_path: Path) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    trainer = saving(tmp_path, save_only_model=True, **best)
    trainer.train()
    assert trainer.state.best_model_checkpoint


def eager(make: Callable[..., nn.Module], **changes: Any) -> nn.Module:
    return make(attn_implementation="eager", **changes)


@pytest.mark.parametrize("heads", [4, 8])
def test_attention_transfer_is_the_divergence_of_the_maps(tmp_path: Path, heads: int) -> None:
    other = eager(teacher, num_attention_heads=heads)
    settings = {"hidden": {"attention_weight": 0.3}, "hidden_weight": 0.0}
    trainer = make(tmp_path, eager(student), other, **settings)
    plain = make(tmp_path, eager(student), other, hidden_layers=None)
    batch = models.Pad()(models.rows()[:4])
    loss, base = (x.compute_loss(x.model, dict(batch)) for x in (trainer, plain))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    maps = [m(**inputs, output_attentions=True).attentions for m in (eager(student), other)]
    predicts, total = predicts_from_labels(batch["labels"]), []
    for a, b in ((1, 2), (3, 5)):
        q, p = (
            x[i - 1].transpose(1, 2)[predicts].double() for x, i in zip(maps, (a, b), strict=True)
        )
        if heads == 8:
            q, p = q.mean(1, keepdim=True), p.mean(1, keepdim=True)
        terms = torch.where(p > 0, p * (p / q).log(), 0.0)
        total.append(terms.sum(-1).mean(-1))
    want = torch.stack(total).mean()
    assert want > 0.02
    assert (loss - base).item() == pytest.approx(0.3 * want.item(), rel=1e-4)
    assert trainer._meters[False].read(trainer.accelerator)["attention"] == pytest.approx(
        want.item(), rel=STEP_ERROR
    )


@pytest.mark.parametrize(("own", "other"), [("sdpa", "eager"), ("eager", "sdpa")])
def test_attention_without_maps_is_an_error(tmp_path: Path, own: str, other: str) -> None:
    blind = "student" if own == "sdpa" else "teacher"
    with pytest.raises(ValueError, match=f"the {blind} has 'sdpa'"):
        make(
            tmp_path,
            student(attn_implementation=own),
            teacher(attn_implementation=other),
            hidden={"attention_weight": 0.1},
        )


def test_maps_of_other_contexts_are_refused(tmp_path: Path) -> None:
    args = OPSDConfig(
        **models.options(
            tmp_path, on_policy=False, hidden_layers="last", hidden={"attention_weight": 0.1}
        )
    )
    trainer = OPSDTrainer(
        eager(models.llama),
        args,
        train_dataset=models.problems(),
        processing_class=models.tokenizer(),
    )
    with pytest.raises(ValueError, match="same rows"):
        trainer.train()


def test_teachers_without_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="RoutedTeacher has no layers"):
        make(tmp_path, other=RoutedTeacher({"a": teacher()}, column="c"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hidden_weight": -0.1}, "hidden_weight must be at least 0, got -0.1"),
        ({"hidden": {"loss": "kl"}}, "hidden.loss must be one of .* got 'kl'"),
        ({"hidden": {"attention_weight": float("nan")}}, "attention_weight .* got nan"),
        ({"hidden_layers": "first"}, "hidden_layers must be .* got 'first'"),
        ({"hidden_layers": [9]}, "student's layers 1 to 4.* got 9"),
    ],
)
def test_values_are_checked(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hidden_weight": 0.5}, "hidden_weight needs hidden_layers"),
        ({"hidden": {"loss": "cosine"}}, "hidden.loss needs hidden_layers"),
        ({"hidden": {"attention_weight": 0.5}}, "hidden.attention_weight needs hidden_layers"),
        ({}, None),
    ],
)
def test_settings_that_are_not_read_are_named(
    tmp_path: Path, settings: dict[str, Any], named: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, hidden_layers=None, **settings)
    found = [x for x in caplog.messages if "not used" in x]
    assert found == ([] if named is None else [f"a setting is not used: {named}"])
