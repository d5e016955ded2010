"""Masked LMs, token classifiers and seq2seq models, beside each row alone and plain Trainer."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from hf_distill import DistillTrainer
from hf_distill.models import vocab_size
from hf_distill.teachers import ModelTeacher
from hf_distill.trainers.placed_labels import decoder_ids
from tests.hf_distill.trainers import models, placed
from tests.hf_distill.trainers.classifying import SUM_ERROR
from tests.hf_distill.trainers.placed import CASES, ONE_OF_A_KIND, SEQ2SEQ, by_hand

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

GRADIENT = 2e-5  # relative to the largest of a parameter; measured: at most 2e-6
TOLERANCE, BUG_FACTOR = 2e-6, 50  # of weights after steps of 1e-3


class Grads(DistillTrainer):
    """Keeps the gradients of its first step, before they are clipped."""

    grads: dict[str, Tensor]

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, *args, **kwargs)
        self.grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return loss


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_each_row_alone(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, data = CASES[case]
    monkeypatch.setattr(placed, "DistillTrainer", Grads)
    settings = {"alpha": 0.3, "temperature": 3.0, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer: Any = placed.trainer(tmp_path, make(), make(1), data, **settings)
    trainer.train()
    logs = trainer.state.log_history[0]
    want, grads = by_hand(make(), make(1), data[:8], 3.0, 0.3)
    assert {name: logs[name] for name in want} == pytest.approx(want, rel=SUM_ERROR)
    assert logs["loss"] == pytest.approx(0.3 * want["soft"] + 0.7 * want["hard"], rel=SUM_ERROR)
    assert trainer.grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert (trainer.grads[name] - grad).abs().max() <= GRADIENT * grad.abs().max() + 1e-8, name


HIDDEN = {"masked bert": True, "masked distilbert": True, "places bert": False, "t5": True}
HIDDEN |= {"bart": True, "whisper": False}


@pytest.mark.parametrize("case", HIDDEN)
def test_what_is_read(tmp_path: Path, case: str) -> None:
    """Hidden states where the head is a plain one, and no logits of unlabelled positions."""
    make, data = CASES[case]
    trainer: Any = placed.trainer(tmp_path, make(), make(1), data, max_steps=1)
    trainer.train()
    assert (trainer._reader.refusal is None) == HIDDEN[case]


def test_what_is_added_behind_the_head_is_read_as_logits(tmp_path: Path) -> None:
    student, teacher = (SEQ2SEQ["bart"](x) for x in (0, 1))
    for model in (student, teacher):
        model.final_logits_bias.normal_()
    data = placed.pairs()
    want, _ = by_hand(models.copied(student), teacher, data[:4], 2.0, 0.5)
    trainer: Any = placed.trainer(tmp_path, student, teacher, data, max_steps=1)
    trainer.train()
    assert "not a scale and softcap" in trainer._reader.refusal
    logs = trainer.state.log_history[0]
    assert {name: logs[name] for name in want} == pytest.approx(want, rel=SUM_ERROR)


class MicroBatchMean(DistillTrainer):
    """The classical bug: every micro-batch divided by its own number of positions."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        loss = super().compute_loss(model, inputs, return_outputs, None)
        return loss / self.args.gradient_accumulation_steps


@pytest.mark.parametrize("case", ONE_OF_A_KIND)
def test_accumulation_does_not_change_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    make, data = CASES[case]

    def run(rows: int, steps: int) -> dict[str, Tensor]:
        settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        trainer = placed.trainer(tmp_path, make(), make(1), data[:8], **settings)
        trainer.train()
        return models.weights(trainer.model)

    one, two = run(8, 1), run(5, 2)
    monkeypatch.setattr(placed, "DistillTrainer", MicroBatchMean)
    assert models.difference(one, two) <= TOLERANCE
    assert models.difference(one, run(5, 2)) > BUG_FACTOR * TOLERANCE


class Decoding(placed.Pad):
    """Adds what a decoder reads: with a loss of the user's plain Trainer hands on no labels."""

    def __init__(self, lm: Any) -> None:
        self.lm = lm

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__(rows)
        return batch | {"decoder_input_ids": self.lm._shift_right(batch["labels"])}


def doubled(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs.logits.flatten(0, -2)
    return 2 * F.cross_entropy(logits, labels.flatten(), reduction="sum") / num_items_in_batch


HARD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "labels": ({}, {}),
    "smoothed": ({"label_smoothing_factor": 0.3}, {}),
    "function": ({}, {"compute_loss_func": doubled}),
}


@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("case", ONE_OF_A_KIND)
def test_alpha_zero_is_trainer(tmp_path: Path, case: str, hard: str) -> None:
    """Without accumulation, in which Trainer adds up the means of these models' micro-batches."""
    (make, data), (settings, extra) = CASES[case], HARD[hard]
    args = TrainingArguments(**models.options(tmp_path, **settings))
    lm = make()
    plain = Trainer(lm, args, Decoding(lm) if case == "t5" else placed.Pad(), data, **extra)
    plain.train()
    trained = placed.trainer(tmp_path, make(), make(1), data, alpha=0.0, **settings, **extra)
    trained.train()
    assert (
        models.difference(models.weights(plain.model), models.weights(trained.model)) <= TOLERANCE
    )


@pytest.mark.parametrize("case", ONE_OF_A_KIND)
def test_an_evaluation_is_the_mean_of_all_its_positions(tmp_path: Path, case: str) -> None:
    make, data = CASES[case]
    trainer = placed.trainer(tmp_path, make(), make(1), data, eval_dataset=data[:6], alpha=0.3)
    found = trainer.evaluate()
    want, _ = by_hand(make(), make(1), data[:6], 2.0, 0.3)
    mixed = 0.3 * want["soft"] + 0.7 * want["hard"]
    assert found["eval_loss"] == pytest.approx(mixed, rel=SUM_ERROR)
    assert found["eval_hard"] == pytest.approx(want["hard"], rel=SUM_ERROR)


def accuracy(said: Any) -> dict[str, float]:
    logits = said.predictions[0] if isinstance(said.predictions, tuple) else said.predictions
    known = said.label_ids != -100
    return {"accuracy": float((logits.argmax(-1) == said.label_ids)[known].mean())}


@pytest.mark.parametrize("case", ONE_OF_A_KIND)
def test_users_metrics_get_logits_and_labels_as_they_were(tmp_path: Path, case: str) -> None:
    make, data = CASES[case]
    extra = {"eval_dataset": data[:6], "compute_metrics": accuracy}
    found = placed.trainer(tmp_path, make(), make(1), data, **extra).evaluate()
    right, every = 0, 0
    for row in data[:6]:
        labels = torch.tensor([x for x in row["labels"] if x != -100])
        right += int((placed.said(make(), row).argmax(-1) == labels).sum())
        every += len(labels)
    assert found["eval_accuracy"] == pytest.approx(right / every)


@pytest.mark.parametrize("case", ONE_OF_A_KIND)
def test_resumed_bit_for_bit_and_reloaded(tmp_path: Path, case: str) -> None:
    make, data = CASES[case]
    whole = placed.trainer(tmp_path / "a", make(), make(1), data, max_steps=4)
    whole.train()
    settings = {"save_strategy": "steps", "save_steps": 2}
    placed.trainer(tmp_path / "b", make(), make(1), data, max_steps=2, **settings).train()
    again = placed.trainer(tmp_path / "b", make(), make(1), data, max_steps=4, **settings)
    again.train(resume_from_checkpoint=True)
    want = models.weights(whole.model)
    assert models.difference(want, models.weights(again.model)) == 0.0
    whole.save_model(str(tmp_path / "saved"))
    loaded = type(whole.model).from_pretrained(tmp_path / "saved")
    assert models.difference(want, models.weights(loaded)) == 0.0


@pytest.mark.parametrize("case", ["masked bert", "places bert", "bart"])
def test_adapters(tmp_path: Path, case: str) -> None:
    make, data = CASES[case]
    names = ["q_proj"] if case == "bart" else ["query"]

    def adapted() -> Any:
        torch.manual_seed(4)
        return get_peft_model(
            make(), LoraConfig(r=2, target_modules=names, init_lora_weights=False)
        )

    want, grads = by_hand(adapted(), make(1), data[:4], 2.0, 0.5)
    trainer = placed.trainer(tmp_path, adapted(), make(1), data, max_steps=1, max_grad_norm=0.0)
    before = models.weights(trainer.model)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["soft"] == pytest.approx(want["soft"], rel=SUM_ERROR)
    after = models.weights(trainer.model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name, grad in grads.items() if grad.any()}
    assert moved
    assert all("lora" in name for name in moved)


WIDER: dict[str, tuple[dict[str, Any], str]] = {
    "masked bert": ({"hidden_size": 48}, "hidden_states"),
    "bart": ({"d_model": 48}, "decoder_hidden_states"),
}


@pytest.mark.parametrize("loss", ["mse", "cosine"])
@pytest.mark.parametrize("case", WIDER)
def test_hidden_states_of_a_wider_teacher(tmp_path: Path, case: str, loss: str) -> None:
    """DistilBERT's recipe: soft, hard, and hidden states, here at the labelled positions.

    One layer of the teacher is compared with two of the student's. Of seq2seq models it is the
    decoder's layers.
    """
    (make, data), (sizes, name) = CASES[case], WIDER[case]
    teacher = make(1, **sizes)
    settings = {"hidden_layers": [[1, 2], [2, 2]], "hidden_weight": 0.5, "hidden": {"loss": loss}}
    trainer: Any = placed.trainer(tmp_path, make(), teacher, data, max_steps=1, **settings)
    projections = models.copied(trainer._layers.projections)
    trainer.train()
    found = []
    for row in data[:4]:
        given = {x: torch.tensor([row[x]]) for x in ("input_ids", "attention_mask", "labels")}
        at = torch.tensor(row["labels"]) != -100
        with torch.no_grad():
            one, other = (
                model(**given, output_hidden_states=True)[name]
                for model in (make(), make(1, **sizes))
            )
            for (k, m), project in zip(((1, 2), (2, 2)), projections, strict=True):
                s, t = project(one[k][0, at]), other[m][0, at]
                error = (s - t).square().mean(-1)
                found.append(error if loss == "mse" else 1 - F.cosine_similarity(s, t, dim=-1))
    want = float(torch.cat(found).mean())
    assert trainer.state.log_history[0]["hidden"] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("case", ["masked bert", "places bert", "t5"])
def test_a_teacher_by_name_is_of_the_kind_that_its_config_names(tmp_path: Path, case: str) -> None:
    make, _ = CASES[case]
    make(1).save_pretrained(tmp_path)
    teacher = ModelTeacher(str(tmp_path))
    assert type(teacher.model) is type(make())
    assert models.difference(models.weights(teacher.model), models.weights(make(1))) == 0.0


def test_given_decoder_inputs_are_read(tmp_path: Path) -> None:
    make, data = CASES["t5"]

    class Given(placed.Pad):
        def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            batch = super().__call__(rows)
            return batch | {"decoder_input_ids": torch.full_like(batch["labels"], 7)}

    settings = {"data_collator": Given(), "max_steps": 1}
    trainer = placed.trainer(tmp_path, make(), make(1), data, **settings)
    trainer.train()
    row = data[0]
    with torch.no_grad():
        ids = torch.full((1, len(row["labels"])), 7)
        given = {"input_ids": torch.tensor([row["input_ids"]]), "decoder_input_ids": ids}
        first = make()(**given).logits[0]
    own, _ = by_hand(make(), make(1), data[:4], 2.0, 0.5)
    assert trainer.state.log_history[0]["hard"] != pytest.approx(own["hard"], rel=1e-3)
    assert first.isfinite().all()


def test_decoder_inputs_are_those_that_a_model_makes_of_labels() -> None:
    labels = torch.tensor([[5, 6, 7, 2], [8, 2, -100, -100]])
    lm: Any = placed.whisper()
    config = lm.config
    want = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
    assert torch.equal(decoder_ids(lm, labels), want)
    assert torch.equal(decoder_ids(SEQ2SEQ["t5"](), labels), SEQ2SEQ["t5"]()._shift_right(labels))
    unsaid = SimpleNamespace(config=SimpleNamespace(decoder_start_token_id=None, pad_token_id=0))
    with pytest.raises(ValueError, match=r"needs decoder_start_token_id and .* got None and 0"):
        decoder_ids(unsaid, labels)


@pytest.mark.parametrize(
    ("kind", "size"), [("places bert", placed.CLASSES), ("bart", models.VOCAB)]
)
def test_numbers_of_logits(kind: str, size: int) -> None:
    assert vocab_size(CASES[kind][0]()) == size


def test_it_learns_from_its_teacher(tmp_path: Path) -> None:
    """A masked student of one layer comes near to its teacher on what it is taught."""
    make, data = CASES["masked bert"]
    settings = {"max_steps": 60, "learning_rate": 3e-3, "alpha": 1.0}
    trainer = placed.trainer(tmp_path, make(num_hidden_layers=1), make(1), data, **settings)
    trainer.train()
    logs = [log["soft"] for log in trainer.state.log_history if "soft" in log]
    assert logs[-1] < 0.5 * logs[0]
    assert math.isfinite(logs[-1])
