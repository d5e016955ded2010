"""Weights of tokens, given and by class: the loss is their mean over the whole optimizer step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from hf_distill import DistillConfig, DistillTrainer, OPSDConfig, OPSDTrainer
from hf_distill.data.token_classes import CLASSES, token_classes
from hf_distill.data.token_weights import TokenWeights, total_weight
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.reading import ReadsLogits

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

TOLERANCE = 2e-6  # of weights after three steps of 1e-3; measured: 1.8e-7
SUM_ERROR = 2e-6  # relative, of a float32 mean over some 40 tokens


def by_id(ids: Tensor) -> Tensor:
    """Uneven weights, a quarter of them 0."""
    return (ids % 4) * 0.75


class Weighted(models.Pad):
    """A collator that adds the weights of the labels."""

    def __init__(self, weigh: Any = by_id) -> None:
        super().__init__()
        self.weigh = weigh

    def __call__(self, batch: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        made = super().__call__(batch)
        return made | {"token_weights": self.weigh(made["labels"].clamp_min(0))}


KINDS = pytest.mark.parametrize("kind", [DistillTrainer, ReadsLogits])


def make(
    folder: Path,
    kind: type[DistillTrainer] = DistillTrainer,
    collator: Any = None,
    data: Any = None,
    tokenizer: Any = None,
    **changes: Any,
) -> DistillTrainer:
    return kind(
        models.llama(),
        DistillConfig(**models.options(folder, **changes)),
        Weighted() if collator is None else collator,
        models.rows() if data is None else data,
        models.rows(6, seed=1),
        tokenizer,
        teacher=models.llama(1),
    )


def final(*args: Any, **changes: Any) -> dict[str, Tensor]:
    trainer = make(*args, **changes)
    trainer.train()
    return models.weights(trainer.model)


def by_hand(data: list[dict[str, list[int]]], weigh: Any = by_id) -> dict[str, float]:
    """Soft and hard loss at temperature 2 of the untrained models: weighted and plain means."""
    student, teacher = models.llama().double(), models.llama(1).double()
    soft, hard, weights = [], [], []
    for row in data:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            z, w = (m(input_ids=ids).logits[0, :-1][labels != -100] for m in (student, teacher))
        q, p = (z / 2).softmax(-1), (w / 2).softmax(-1)
        labels = labels[labels != -100]
        soft.append(4 * (p * (p / q).log()).sum(-1))
        hard.append(F.cross_entropy(z, labels, reduction="none"))
        weights.append(weigh(labels).double())
    soft, hard, weights = (torch.cat(x) for x in (soft, hard, weights))
    some = weights != 0
    return {
        "loss": ((soft + hard) / 2 * weights).sum().item() / weights.sum().item(),
        "soft": soft[some].mean().item(),
        "hard": hard[some].mean().item(),
        "tokens": int(some.sum()),
    }


@KINDS
def test_the_loss_is_the_weighted_mean_of_a_step(
    tmp_path: Path, kind: type[DistillTrainer]
) -> None:
    trainer = make(tmp_path, kind, gradient_accumulation_steps=2, max_steps=1)
    trainer.train()
    logs, want = trainer.state.log_history[0], by_hand(models.rows()[:8])
    assert {name: logs[name] for name in want} == pytest.approx(want, rel=SUM_ERROR)
    plain = by_hand(models.rows()[:8], lambda ids: torch.ones(len(ids)))
    assert abs(plain["loss"] - want["loss"]) > 1000 * SUM_ERROR
    assert 0 < want["tokens"] < plain["tokens"]


def test_evaluation_is_weighted(tmp_path: Path) -> None:
    metrics, want = make(tmp_path).evaluate(), by_hand(models.rows(6, seed=1))
    assert metrics["eval_loss"] == pytest.approx(want["loss"], rel=SUM_ERROR)
    assert metrics["eval_tokens"] == want["tokens"]


class MicroBatchMean(DistillTrainer):
    """The bug: every micro-batch divided by its own weights."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        loss = super().compute_loss(model, inputs, return_outputs, None)
        return loss / self.args.gradient_accumulation_steps


@pytest.mark.parametrize(("rows", "steps"), [(4, 2), (1, 8)])
def test_accumulation_does_not_change_the_weights(tmp_path: Path, rows: int, steps: int) -> None:
    def run(rows: int, steps: int, kind: type[DistillTrainer] = DistillTrainer) -> dict:
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        return final(tmp_path, kind, **sizes)

    one = run(8, 1)
    assert models.difference(one, run(rows, steps)) <= TOLERANCE
    assert models.difference(one, run(rows, steps, MicroBatchMean)) > 100 * TOLERANCE


def test_weights_of_one_change_nothing(tmp_path: Path) -> None:
    ones = final(tmp_path, collator=Weighted(lambda ids: torch.ones(ids.shape)))
    assert models.difference(ones, final(tmp_path, collator=models.Pad())) == 0.0
    assert models.difference(ones, final(tmp_path)) > 100 * TOLERANCE


@KINDS
def test_models_are_not_shown_the_weights(
    tmp_path: Path, kind: type[DistillTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    forward = nn.Module.__call__

    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if type(self).__name__ == "LlamaForCausalLM":
            seen.append(set(kwargs))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", noted)
    make(tmp_path, kind, max_steps=1).train()
    names = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
    names.add("labels")  # the probe of the model's own loss
    assert len(seen) >= 2
    assert set().union(*seen) <= names


def test_a_column_of_a_dataset_is_kept(tmp_path: Path) -> None:
    rows = models.rows(longest=6)
    for row in rows:
        row["token_weights"] = by_id(torch.tensor(row["input_ids"])).tolist()
        row["other"] = [0]
    seen: list[Any] = []

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        seen.append(set(batch[0]))
        return Weighted()(batch)

    make(tmp_path, collator=collate, data=Dataset.from_list(rows), max_steps=1).train()
    assert seen[0] == {"input_ids", "attention_mask", "labels", "token_weights"}


def zeros(ids: Tensor) -> Tensor:
    return torch.zeros(ids.shape)


def negative(ids: Tensor) -> Tensor:
    return torch.where(ids == ids[2].max(), -1.5, 1.0)


def test_weights_that_are_all_zero_are_a_loss_of_zero(tmp_path: Path) -> None:
    trainer = make(tmp_path, collator=Weighted(zeros), weight_decay=0.0)
    before = models.weights(trainer.model)
    trainer.train()
    assert [log["loss"] for log in models.steps(trainer)] == [0.0] * 3
    assert [log["unscored_batches"] for log in models.steps(trainer)] == [1] * 3
    assert models.difference(before, models.weights(trainer.model)) == 0.0


@pytest.mark.parametrize(
    ("weigh", "settings", "message"),
    [
        (negative, {}, "token_weights must be at least 0 and finite, got -1.5 in row"),
        (lambda ids: by_id(ids) * torch.nan, {}, "at least 0 and finite, got nan in row 0"),
        (lambda ids: by_id(ids)[:, 1:], {}, r"must have the labels' shape \[4, 14\], got \[4, 13"),
        (by_id, {"label_smoothing_factor": 0.1}, "reach neither label smoothing nor compute"),
    ],
)
def test_bad_weights_are_named(
    tmp_path: Path, weigh: Any, settings: dict[str, Any], message: str
) -> None:
    collator = Weighted(weigh)
    collator.width = 14
    with pytest.raises(ValueError, match=message):
        make(tmp_path, collator=collator, **settings).train()


def test_weights_that_are_zero_in_one_micro_batch_only(tmp_path: Path) -> None:
    """The step has tokens; its first micro-batch has none."""
    calls: list[int] = []

    def weigh(ids: Tensor) -> Tensor:
        calls.append(1)
        return zeros(ids) if len(calls) == 1 else by_id(ids)

    trainer = make(tmp_path, collator=Weighted(weigh), gradient_accumulation_steps=2, max_steps=1)
    trainer.train()
    want = by_hand(models.rows()[4:8])
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want["loss"], rel=SUM_ERROR)


def test_weights_need_a_teacher(tmp_path: Path) -> None:
    args = DistillConfig(**models.options(tmp_path, alpha=0.0))
    trainer = DistillTrainer(models.llama(), args, Weighted(), models.rows())
    with pytest.raises(ValueError, match="token_weights need a teacher"):
        trainer.train()
    args = DistillConfig(**models.options(tmp_path, alpha=0.0, token_weights={"word": 2.0}))
    with pytest.raises(ValueError, match="token_weights need a teacher"):
        DistillTrainer(models.llama(), args, models.Pad(), models.rows())


CLASS_WEIGHTS = {"special": 0.0, "number": 3.0, "punctuation": 0.5, "word": 1.5}


def by_class(ids: Tensor) -> Tensor:
    table = torch.tensor([CLASS_WEIGHTS.get(name, 1.0) for name in CLASSES])
    return table[token_classes(models.tokenizer(), models.VOCAB)][ids]


def test_class_weights_are_token_weights(tmp_path: Path) -> None:
    settings = {"token_weights": CLASS_WEIGHTS, "tokenizer": models.tokenizer()}
    drawn = {int(i) for row in models.rows() for i in row["input_ids"]}
    assert len(set(by_class(torch.tensor(sorted(drawn))).tolist())) == 4
    ours = final(tmp_path, collator=models.Pad(), **settings)
    assert models.difference(ours, final(tmp_path, collator=Weighted(by_class))) == 0.0
    both = final(tmp_path, **settings)
    given = Weighted(lambda ids: by_id(ids) * by_class(ids))
    assert models.difference(both, final(tmp_path, collator=given)) == 0.0
    assert models.difference(both, ours) > 100 * TOLERANCE


def test_class_weights_of_one_are_off(tmp_path: Path) -> None:
    ones = dict.fromkeys(CLASSES, 1)
    trainer = make(tmp_path, collator=models.Pad(), token_weights=ones, max_steps=1)
    trainer.train()
    assert (
        models.difference(
            models.weights(trainer.model), final(tmp_path, collator=models.Pad(), max_steps=1)
        )
        == 0.0
    )


def test_class_weights_need_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="need a tokenizer as processing_class, got None"):
        make(tmp_path, token_weights={"word": 2.0})


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["space", "drift", "reasoning"])
def test_weights_of_the_settings_are_checked(value: float, name: str) -> None:
    message = rf"token_weights.{name} must be at least 0 and finite, got {value}"
    with pytest.raises(ValueError, match=message):
        DistillConfig(output_dir="out", report_to="none", token_weights={name: value})


def test_self_distillation_counts_classes_too(tmp_path: Path) -> None:
    """The end token, one a row, is special: without weight it is not counted."""
    counts = []
    for weights in (None, {"special": 0.0}):
        args = OPSDConfig(
            **models.options(tmp_path, on_policy=False, max_steps=1, token_weights=weights)
        )
        trainer = OPSDTrainer(
            models.llama(),
            args,
            train_dataset=models.problems(),
            processing_class=models.tokenizer(),
        )
        trainer.train()
        counts.append(trainer.state.log_history[0]["tokens"])
    assert counts[0] - counts[1] == 4


def test_ids_without_a_token_are_special() -> None:
    weigh = TokenWeights([5.0, 1.0, 1.0, 1.0, 2.0], models.tokenizer())
    labels = torch.tensor([[7, 60, 1000, -100, 2]])
    found = weigh({"labels": labels})
    assert found.tolist() == [[2.0, 5.0, 5.0, 0.0, 5.0]]
    assert total_weight([{"labels": labels}] * 2, [found, None]) == 15 + 3  # never a row's first
    assert weigh({"prompt_ids": labels}) is None
    assert weigh([{"prompt": "a"}]) is None
