"""Meters: what they count, on rows that can be counted by hand."""

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from hf_distill import DistillConfig, DistillTrainer, OPSDConfig, OPSDTrainer
from hf_distill.data.token_classes import CLASSES, token_classes
from hf_distill.monitoring import metrics as module
from hf_distill.monitoring.metrics import CompletionMeter, HintOverlapMeter, TokenMeter
from tests.hf_distill.trainers import models

NUMBER, WORD = CLASSES.index("number"), CLASSES.index("word")


def metrics(soft: list[float]) -> dict[str, Tensor]:
    """Of as many tokens, with another metric that is zero."""
    return {"soft": torch.tensor(soft), "hard": torch.zeros(len(soft))}


def test_the_divergence_is_split_by_token_class():
    classes = torch.tensor([WORD, NUMBER, WORD])  # of ids 0, 1, 2
    meter = TokenMeter(classes)
    meter.add(metrics([1.0, 2.0]), torch.tensor([0, 1]))
    meter.add(metrics([4.0, 6.0]), torch.tensor([1, 2]))
    found = meter.read(Accelerator(cpu=True))
    assert (found["soft"], found["hard"], found["tokens"]) == (13 / 4, 0.0, 4)
    assert (found["soft_number"], found["share_number"]) == (3.0, 6 / 13)
    assert (found["soft_word"], found["share_word"]) == (3.5, 7 / 13)
    assert not {"soft_space", "share_space"} & found.keys()  # no such token
    assert meter.read(Accelerator(cpu=True)) == {}


def test_a_divergence_of_zero_has_shares_of_zero():
    meter = TokenMeter(torch.tensor([WORD]))
    meter.add(metrics([0.0]), torch.tensor([0]))
    found = meter.read(Accelerator(cpu=True))
    assert (found["soft_word"], found["share_word"]) == (0.0, 0.0)


def test_without_classes_nothing_is_split():
    meter = TokenMeter()
    meter.add(metrics([1.0]), torch.tensor([0]))
    assert not any(
        name.startswith(("soft_", "share_")) for name in meter.read(Accelerator(cpu=True))
    )


def test_tokens_that_do_not_count_are_in_no_mean():
    meter = TokenMeter(torch.tensor([WORD, NUMBER]))
    counted = torch.tensor([True, False, True])
    given = metrics([1.0, 50.0, 4.0]) | {"paired": torch.tensor([1.0, 1.0, 0.0])}
    meter.add(given, torch.tensor([0, 1, 0]), counted)
    found = meter.read(Accelerator(cpu=True))
    assert found == {
        "soft": 2.5,
        "hard": 0.0,
        "tokens": 2,
        "paired": 0.5,
        "soft_word": 2.5,
        "share_word": 1.0,
    }


def test_a_mean_is_over_its_own_values():
    """A NaN is none, a micro-batch need not have all metrics, and other tokens are no tokens."""
    meter = TokenMeter()
    meter.add({"soft": torch.tensor([1.0, 3.0]), "paired": torch.ones(2)}, torch.tensor([0, 1]))
    entropy = torch.tensor([torch.nan, 6.0])
    meter.add({"soft": torch.tensor([4.0, 4.0]), "teacher_entropy": entropy}, torch.tensor([0, 1]))
    meter.add({"anchor": torch.tensor([7.0, 8.0, 9.0])})
    meter.add({"soft": torch.zeros(0), "never": torch.tensor([torch.nan])})
    found = meter.read(Accelerator(cpu=True))
    assert found == {"soft": 3.0, "teacher_entropy": 6.0, "tokens": 4, "anchor": 8.0, "paired": 1.0}
    assert meter.read(Accelerator(cpu=True)) == {}


def test_processes_that_measured_other_things_sum_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process sums what any of them has measured, in one order."""

    class OneOfTwo:
        """The accelerator of a process whose peer has measured `soft` 6 / 2 and `theirs` 5 / 1."""

        num_processes, device = 2, torch.device("cpu")

        def reduce(self, sums: Tensor, reduction: str) -> Tensor:
            assert reduction == "sum"
            return sums + torch.tensor([6.0, 2.0, 0.0, 0.0, 5.0, 1.0])

    monkeypatch.setattr(module, "gather_object", lambda names: [*names, "soft", "theirs"])
    meter = TokenMeter()
    meter.add({"soft": torch.tensor([1.0, 3.0]), "mine": torch.tensor([4.0])})
    assert meter.read(OneOfTwo()) == {"soft": 10 / 4, "mine": 4.0, "theirs": 5.0}  # pyright: ignore


def test_a_run_with_a_tokenizer_splits_its_loss(tmp_path):
    """Of the first step, against the same rows by hand."""
    args = OPSDConfig(**models.options(tmp_path, max_steps=1, on_policy=False))
    trainer = OPSDTrainer(
        models.llama(), args, None, models.problems(), processing_class=models.tokenizer()
    )
    batch = trainer.hint_collator(models.problems()[:4])
    sides = []
    for prefix, index in (("", "completion_index"), ("teacher_", "teacher_completion_index")):
        ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
        with torch.no_grad():
            logits = models.llama()(input_ids=ids, attention_mask=mask).logits
        rows = [
            logits[i, places[places >= 0] - 1].double().softmax(-1)
            for i, places in enumerate(batch[index])
        ]
        sides.append(torch.cat(rows))
    q, p = sides
    m = (p + q) / 2
    jsd = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    targets = batch["labels"][batch["labels"] != -100]
    kinds = token_classes(models.tokenizer())[targets]
    trainer.train()
    logs = trainer.state.log_history[0]
    present = {CLASSES[i] for i in kinds.tolist()}
    assert {name[5:] for name in logs if name.startswith("soft_")} == present
    assert len(present) > 1
    for name in present:
        of_class = jsd[kinds == CLASSES.index(name)]
        assert logs[f"soft_{name}"] == pytest.approx(of_class.mean().item(), rel=1e-4)
        assert logs[f"share_{name}"] == pytest.approx((of_class.sum() / jsd.sum()).item(), rel=1e-4)


def test_a_run_without_a_tokenizer_does_not(tmp_path):
    args = DistillConfig(**models.options(tmp_path, max_steps=1))
    trainer = DistillTrainer(
        models.llama(), args, models.Pad(), models.rows(), teacher=models.llama(1)
    )
    trainer.train()
    assert not [name for name in trainer.state.log_history[0] if name.startswith("soft_")]


HINT = [1, 2, 3, 4, 5, 6]  # three 4-grams


@pytest.mark.parametrize(
    ("completion", "prompt", "hint", "expected"),
    [
        ([1, 2, 3, 4, 5], [9], HINT, {"hint_overlap": 1.0}),
        ([0, 1, 2, 3, 4], [9], HINT, {"hint_overlap": 0.5}),
        ([4, 3, 2, 1, 0], [9], HINT, {"hint_overlap": 0.0}),  # the ids, in another order
        ([1, 2, 3, 4, 5], [1, 2, 3, 4], HINT, {"hint_overlap": 0.5}),  # half stands in the prompt
        ([1, 2, 3, 4], HINT, HINT, {}),  # all of the hint stands in the prompt
        ([1, 2, 3, 4], [9], [1, 2, 3], {}),  # a hint without a 4-gram
        ([1, 2, 3], [9], HINT, {}),  # a completion without one
    ],
)
def test_hint_overlap_of_a_row(completion, prompt, hint, expected):
    meter = HintOverlapMeter()
    meter.add([completion], [prompt], [hint])
    assert meter.read(Accelerator(cpu=True)) == expected


def test_hint_overlap_weighs_rows_by_their_ngrams_and_starts_anew():
    meter = HintOverlapMeter()
    meter.add([[1, 2, 3, 4, 5, 6], [7, 7, 7, 7]], [[9], [9]], [HINT, HINT])
    meter.add([[8, 1, 2, 3, 4]], [[9]], [HINT])
    assert meter.read(Accelerator(cpu=True)) == {"hint_overlap": 4 / 6}
    assert meter.read(Accelerator(cpu=True)) == {}


def test_rows_of_other_numbers_are_an_error():
    with pytest.raises(ValueError, match="shorter"):
        HintOverlapMeter().add([[1]], [], [])


def test_completions_are_counted():
    meter = CompletionMeter()
    meter.add([[5, 2], [5, 5, 5, 5]], [2])
    expected = {"completion_length": 3.0, "completion_ended": 0.5, "completions": 2}
    assert meter.read(Accelerator(cpu=True)) == expected
