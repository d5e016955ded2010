"""Anchor rows: supervised tokens beside the on-policy loss, in the student's own forward."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_distill import OPSDConfig, OPSDTrainer
from hf_distill.data.anchor_rows import has_anchor, join_anchor_rows
from hf_distill.data.batches import unpad
from hf_distill.data.sides import Side, student_side
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.reading import ReadsLogits

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

TOLERANCE = 2e-6  # of weights after three steps of 1e-3; measured: 1e-7
SUM_ERROR = 2e-6  # relative, of a float32 mean over some 40 tokens


def anchor_rows(prompts: Tensor, mask: Tensor, longest: int) -> list[dict[str, list[int]]]:
    """A row for each prompt, made of its ids: up to `longest` ids, the first half not scored."""
    made = []
    for ids in unpad(prompts, mask):
        ids = (ids * 4)[: 4 + (sum(ids) % (longest - 3))]
        half = len(ids) // 2
        labels = [-100] * half + ids[half:]
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return made


class Anchored(OPSDTrainer):
    """Adds anchor rows to the batches of a step, as a trainer that has the data's rows would."""

    longest = 9

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        made = []
        for batch in batches:
            rows = anchor_rows(
                batch["input_ids"][:, :6], batch["attention_mask"][:, :6], self.longest
            )
            made.append({f"anchor_{k}": v for k, v in models.Pad()(rows).items()})
        own = sum((x["anchor_labels"][:, 1:] != -100).sum() for x in made)
        total = self.accelerator.reduce(own.to(device), reduction="sum")
        return [b | a | {"anchor_count": total} for b, a in zip(batches, made, strict=True)], count


class AnchoredReadsLogits(ReadsLogits, Anchored):
    pass


KINDS = pytest.mark.parametrize("kind", [Anchored, AnchoredReadsLogits])


def make(
    folder: Path, kind: type[OPSDTrainer] = Anchored, model: Any = None, **changes: Any
) -> OPSDTrainer:
    settings = {"max_completion_length": 6, "rollout": {"temperature": 0.0}} | changes
    return kind(
        models.lora(models.llama()) if model is None else model,
        OPSDConfig(**models.options(folder, **settings)),
        train_dataset=models.problems(),
        eval_dataset=models.problems(4),
        processing_class=models.tokenizer(),
    )


def mean_cross_entropy(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Of the anchor's tokens, row by row without padding."""
    found = []
    for batch in batches:
        pairs = zip(batch["anchor_labels"], batch["anchor_attention_mask"].bool(), strict=True)
        for ids, (labels, mask) in zip(batch["anchor_input_ids"], pairs, strict=True):
            logits = model(input_ids=ids[mask][None]).logits[0, :-1]
            found.append(F.cross_entropy(logits, labels[mask][1:], reduction="none"))
            found[-1] = found[-1][labels[mask][1:] != -100]
    return torch.cat(found).mean()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@KINDS
@pytest.mark.parametrize("longest", [7, 25])
@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_loss_and_gradient_are_those_of_two_forwards(
    tmp_path: Path, kind: type[Anchored], longest: int, alpha: float
) -> None:
    trainer = make(tmp_path, kind, anchor_weight=0.3, alpha=alpha)
    trainer.longest = longest
    model, iterator = trainer.model.train(), iter(trainer.get_train_dataloader())
    (batch,), count = trainer.get_batch_samples(iterator, 1, torch.device("cpu"))
    wider = batch["anchor_input_ids"].shape[1] > batch["input_ids"].shape[1]
    assert wider == (longest == 25)
    bare = {k: v for k, v in batch.items() if not k.startswith("anchor_")}
    both = trainer.compute_loss(model, batch, num_items_in_batch=count)
    found = gradients(model, both)
    alone = trainer.compute_loss(model, bare, num_items_in_batch=count)
    first = gradients(model, alone)
    anchor = mean_cross_entropy(model, [batch])
    second = gradients(model, anchor)
    assert both.item() == pytest.approx(alone.item() + 0.3 * anchor.item(), rel=SUM_ERROR)
    for name, grad in found.items():
        want = first[name] + 0.3 * second[name]
        assert (grad - want).abs().max() <= 1e-5 * want.abs().max(), name
        assert (grad - first[name]).abs().max() > 1e-2 * want.abs().max(), name


@KINDS
def test_accumulation_does_not_change_the_weights(tmp_path: Path, kind: type[Anchored]) -> None:
    class MicroBatchCount(kind):
        """The bug: every micro-batch divided by its own anchor tokens."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            own = (inputs["anchor_labels"][:, 1:] != -100).sum()
            changed = inputs | {"anchor_count": own * self.args.gradient_accumulation_steps}
            return super().compute_loss(model, changed, *args, **kwargs)

    def run(rows: int, steps: int, of: type[OPSDTrainer] = kind) -> dict[str, Tensor]:
        trainer = make(
            tmp_path,
            of,
            anchor_weight=2.0,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        return models.weights(trainer.model)

    one = run(4, 1)
    assert models.difference(one, run(1, 4)) <= TOLERANCE
    assert models.difference(one, run(2, 2)) <= TOLERANCE
    assert models.difference(one, run(1, 4, MicroBatchCount)) > 100 * TOLERANCE


def test_the_mean_is_logged_and_evaluation_is_without(tmp_path: Path) -> None:
    trainer = make(tmp_path, anchor_weight=0.5, max_steps=1, gradient_accumulation_steps=2)
    seen: list[dict[str, Tensor]] = []
    compute = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **k: (
        seen.append(inputs) or compute(model, inputs, **k)
    )
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(before["eval_soft"], rel=SUM_ERROR)
    assert "eval_anchor" not in before
    seen.clear()
    fresh = models.lora(models.llama())
    trainer.train()
    logs = trainer.state.log_history[-2]
    want = mean_cross_entropy(fresh, seen).item()
    assert logs["anchor"] == pytest.approx(want, rel=SUM_ERROR)
    assert logs["loss"] == pytest.approx(logs["soft"] + 0.5 * want, rel=SUM_ERROR)
    trainer.model.eval()
    with torch.no_grad():  # a batch of evaluation that carries the rows
        bare = {k: v for k, v in seen[0].items() if not k.startswith("anchor_")}
        assert compute(trainer.model, seen[0]) == compute(trainer.model, bare)


def test_weight_zero_reads_no_anchor(tmp_path: Path) -> None:
    runs = []
    for kind in (Anchored, OPSDTrainer):
        trainer = make(tmp_path, kind)
        trainer.train()
        assert "anchor" not in trainer.state.log_history[0]
        runs.append(models.weights(trainer.model))
    assert models.difference(*runs) == 0.0


@KINDS
def test_one_forward_of_the_student_without_odd_keys(
    tmp_path: Path, kind: type[Anchored], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    forward = nn.Module.__call__

    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if type(self).__name__ == "PeftModelForCausalLM":
            seen.append(kwargs)
        return forward(self, *args, **kwargs)

    watchdog = {"action": "off"}  # it asks the teacher about a row of its own
    # models are tried out in the first step
    trainer = make(tmp_path, kind, anchor_weight=1.0, max_steps=2, watchdog=watchdog)
    monkeypatch.setattr(nn.Module, "__call__", noted)
    trainer.train()
    names = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
    assert all(kwargs.keys() <= names for kwargs in seen)
    assert [len(kwargs["input_ids"]) for kwargs in seen][-2:] == [4, 8]  # teacher, student


def test_rows_are_joined_below_and_padded_on_the_right() -> None:
    ids = torch.arange(3, 9).view(2, 3)
    batch = {
        "input_ids": ids,
        "labels": ids.masked_fill(ids < 5, -100),
        "anchor_input_ids": torch.tensor([[0, 9, 8, 7]]),  # padded on the left
        "anchor_attention_mask": torch.tensor([[0, 1, 1, 1]]),
        "anchor_labels": torch.tensor([[-100, -100, 8, 7]]),
        "anchor_count": torch.tensor(1),
    }
    rows = join_anchor_rows(student_side(batch), batch)
    real = rows.inputs["attention_mask"]
    assert rows.inputs["input_ids"].tolist() == [[3, 4, 5, 0], [6, 7, 8, 0], [0, 9, 8, 7]]
    assert real.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 1]]
    assert rows.predicts.int().tolist() == [[0, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]]
    odd = Side({"input_ids": ids, "token_type_ids": ids}, rows.predicts[:2])
    with pytest.raises(ValueError, match=r"input_ids and attention_mask only.*token_type_ids"):
        join_anchor_rows(odd, batch)
    del batch["anchor_count"]
    with pytest.raises(ValueError, match="with anchor_input_ids needs anchor_count too"):
        has_anchor(batch)
    batch |= {"anchor_count": torch.tensor(1), "anchor_labels": torch.tensor([[8]])}
    with pytest.raises(ValueError, match=r"must have one shape, got \[\(1, 4\), \(1, 4\), \(1, 1"):
        has_anchor(batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"anchor_weight": -1.0}, "anchor_weight must be at least 0, got -1.0"),
        ({"anchor_weight": float("nan")}, "anchor_weight must be at least 0, got nan"),
        (
            {"anchor_weight": 0.5, "on_policy": False},
            "anchor_weight 0.5 > 0 needs on_policy: .* alpha < 1",
        ),
        (
            {"anchor_weight": 0.5, "label_smoothing_factor": 0.1},
            "anchor_weight 0.5 > 0 is a plain cross-entropy",
        ),
    ],
)
def test_what_an_anchor_excludes(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **settings)
