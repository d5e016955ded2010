"""Losses of both trainers are those of rows alone, for models that count positions in many ways."""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_distill import DistillConfig, DistillTrainer, HintCollator, OPSDConfig, OPSDTrainer
from tests.hf_distill.models import numbering
from tests.hf_distill.models.test_positions import SharedRounding
from tests.hf_distill.trainers import models

# of a loss of some nats; logits differ by 1e-5 of the largest, see `models.test_positions`
TOLERANCE = 2e-5
KINDS = ["llama", "opt", "mamba", "roberta", "gpt2", "bert", "bart", "rwkv", "recurrent gemma"]


def distiller(
    folder: Path, student: nn.Module, teacher: nn.Module, side: str = "right", **changes: Any
) -> DistillTrainer:
    args = DistillConfig(**models.options(folder, alpha=1.0, temperature=1.0, **changes))
    return DistillTrainer(student, args, models.Pad(side), numbering.rows(), teacher=teacher)


@torch.no_grad()
def kl_of_rows(student: nn.Module, teacher: nn.Module) -> float:
    """KL(teacher || student) per labelled token, from each row by itself."""
    total, count = 0.0, 0
    for row in numbering.rows():
        ids = torch.tensor([row["input_ids"]])
        q, p = [m(input_ids=ids).logits[0, 1:-1].log_softmax(-1) for m in (student, teacher)]
        total += float((p.exp() * (p - q)).sum())
        count += len(p)
    return total / count


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", KINDS)
def test_distilling_compares_rows_as_they_are_alone(
    tmp_path: Path, family: str, side: str, evaluates: bool
) -> None:
    student, teacher = numbering.make(family), numbering.make(family, 1)
    run = distiller(tmp_path, student, teacher, side)
    batch = models.Pad(side)(numbering.rows())
    if family in numbering.NEITHER and side == "left":
        with pytest.raises(ValueError, match="padded on the left"):
            run.compute_loss(student, batch)
        return
    if evaluates:
        found = run.evaluate(numbering.rows())["eval_soft"]
    else:
        found = float(run.compute_loss(student, batch).detach())
    assert found == pytest.approx(kl_of_rows(student, teacher), abs=TOLERANCE)


def test_sides_decide_for_themselves(tmp_path: Path) -> None:
    student, teacher = numbering.make("gpt2"), numbering.make("roberta", 1)
    run = distiller(tmp_path, student, teacher, "left")
    batch = models.Pad("left")(numbering.rows())
    found = float(run.compute_loss(student, batch).detach())
    assert found == pytest.approx(kl_of_rows(student, teacher), abs=TOLERANCE)
    refused = distiller(tmp_path, numbering.make("gpt2"), numbering.make("bart", 1), "left")
    with pytest.raises(ValueError, match="teacher: a BartForCausalLM does not read"):
        refused.compute_loss(refused.model, batch)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
def test_an_empty_first_row_counts_nothing(tmp_path: Path, family: str, side: str) -> None:
    batch = models.Pad(side)(numbering.rows())
    batch["attention_mask"][0], batch["labels"][0] = 0, -100
    found = []
    for first in (0, 1):
        student, teacher = numbering.make(family), numbering.make(family, 1)
        given = {name: x[first:] for name, x in batch.items()}
        run = distiller(tmp_path, student, teacher, side)
        found.append(float(run.compute_loss(student, given).detach()))
    assert found[0] == pytest.approx(found[1], abs=TOLERANCE)


def test_a_row_beyond_the_learnt_positions_names_the_side(tmp_path: Path) -> None:
    def short() -> nn.Module:
        sizes: dict[str, Any] = numbering.GPT | {"n_positions": 10}
        return GPT2LMHeadModel(GPT2Config(**sizes))

    pairs = {
        "student": (short(), numbering.make("llama")),
        "teacher": (numbering.make("llama"), short()),
    }
    for whose, (student, teacher) in pairs.items():
        run = distiller(tmp_path, student, teacher)
        with pytest.raises(ValueError, match=rf"{whose}: a row has 13 tokens, but .* for 10"):
            run.train()


def opsd(folder: Path, model: nn.Module, data: Sequence[Any] = (), **changes: Any) -> OPSDTrainer:
    settings = {"max_completion_length": 4, "max_steps": 1} | changes
    tokenizer = models.tokenizer()
    return OPSDTrainer(
        model,
        OPSDConfig(**models.options(folder, **settings)),
        HintCollator(tokenizer),
        list(data) or models.problems(),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("on_policy", [False, True])
def test_a_hinted_row_beyond_the_learnt_positions(tmp_path: Path, on_policy: bool) -> None:
    data = [row | {"hint": "Hint : " + "1 + " * 40} for row in models.problems()]
    run = opsd(tmp_path, models.gpt2(), data, on_policy=on_policy)
    with pytest.raises(ValueError, match=r"teacher.* has \d+ tokens.*64"):
        run.train()


class Kept(OPSDTrainer):
    """Keeps its first batch and loss."""

    first: tuple[dict[str, Tensor], float] | None = None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        batch = {k: x.clone() for k, x in inputs.items() if isinstance(x, Tensor)}
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.first is None:
            self.first = batch, float(loss.detach())
        return loss


@torch.no_grad()
def jsd_of_rows(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """JSD of the two sides per scored token, from each row by itself."""
    total, count = 0.0, 0
    for i in range(len(batch["input_ids"])):
        said = []
        for side in ("", "teacher_"):
            keep = batch[f"{side}attention_mask"][i].bool()
            index = batch[f"{side}completion_index"][i]
            logits = model(input_ids=batch[f"{side}input_ids"][i][keep][None]).logits[0]
            said.append(logits[index[index > 0] - 1].log_softmax(-1))
        middle = torch.logaddexp(*said) - torch.log(torch.tensor(2.0))
        total += sum(0.5 * float((x.exp() * (x - middle)).sum()) for x in said)
        count += len(middle)
    return total / count


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("family", KINDS)
def test_no_kind_is_refused_where_rows_are_padded_on_the_right(
    tmp_path: Path, family: str, on_policy: bool
) -> None:
    model = numbering.make(family)
    before = copy.deepcopy(model).eval()
    args = OPSDConfig(
        **models.options(tmp_path, on_policy=on_policy, max_completion_length=4, max_steps=1)
    )
    collator = HintCollator(models.tokenizer())
    run = Kept(model, args, collator, models.problems(), processing_class=collator.tokenizer)
    run.train()
    assert run.first is not None
    batch, loss = run.first
    assert (batch["attention_mask"] == 0).any()
    assert loss == pytest.approx(jsd_of_rows(before, batch), abs=TOLERANCE)


def warnings_of(caplog: pytest.LogCaptureFixture, run: OPSDTrainer) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run.train()
    texts = [record.getMessage() for record in caplog.records]
    return [text for text in texts if text.startswith("batches: rows padded on the right must")]


def test_rounding_that_a_batch_shares_is_named(tmp_path: Path, caplog: Any) -> None:
    model: Any = models.llama()
    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = SharedRounding
    (text,) = warnings_of(caplog, opsd(tmp_path, model, on_policy=False))
    assert "without any padding a row beside another is" in text
    assert "position" not in text
    assert "quantized weights" in text


class OfTheWidth(nn.Module):
    """Stands in for a choice among equals that depends on how many columns there are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (1 + 0.05 * (x.shape[1] % 7))


def test_what_depends_on_the_width_is_named(tmp_path: Path, caplog: Any) -> None:
    model: Any = models.llama()
    model.model.layers[0].mlp = OfTheWidth(model.model.layers[0].mlp)
    (text,) = warnings_of(caplog, opsd(tmp_path, model, on_policy=False))
    assert "other ids in the padding change nothing, so the width of the batch is" in text


class FromThePadding(nn.Module):
    """Counts positions from the number of the row's padding on, unless it is given them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        if position_ids is None and kwargs.get("attention_mask") is not None:
            number = (kwargs["attention_mask"] == 0).sum(1, keepdim=True)
            position_ids = torch.arange(input_ids.shape[1]) + number
        return self.inner(input_ids=input_ids, position_ids=position_ids, **kwargs)


def test_positions_that_padding_shifts_are_mended(tmp_path: Path, caplog: Any) -> None:
    model: Any = models.gpt2()
    model.transformer = FromThePadding(model.transformer)
    assert warnings_of(caplog, opsd(tmp_path, model, on_policy=False)) == []


class SeesPadding(nn.Module):
    """Adds what stands in the padding to every token."""

    def __init__(self, inner: nn.Module, weight: float) -> None:
        super().__init__()
        self.inner, self.weight = inner, weight

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        out = self.inner(input_ids=input_ids, **kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            hidden = ((input_ids + 1).clamp(max=3) * (mask == 0)).sum(1)[:, None, None]
            out.last_hidden_state = out.last_hidden_state + self.weight * hidden
        return out


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (2e-3, r"padding: rows padded on the right must give .*; other ids in it change them"),
        (1.0, r"student: a GPT2LMHeadModel does not read a row that is padded on the right"),
    ],
)
def test_padding_behind_a_row_that_reaches_it_is_an_error(
    tmp_path: Path, weight: float, message: str
) -> None:
    """The first is less than what quantized weights do; it shows where other ids are tried."""
    model: Any = models.gpt2()
    model.transformer = SeesPadding(model.transformer, weight)
    with pytest.raises(ValueError, match=message):
        opsd(tmp_path, model, on_policy=False).train()
