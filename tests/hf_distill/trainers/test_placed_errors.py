"""What masked LMs, token classifiers and seq2seq models cannot be given, and the words of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DataCollatorWithFlattening

from hf_distill import DistillConfig, DistillTrainer, HintCollator, OPSDConfig, OPSDTrainer
from tests.hf_distill.trainers import models, placed
from tests.hf_distill.trainers.placed import CASES, MASKED, ONE_OF_A_KIND, PLACES, SEQ2SEQ

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)


def llama() -> nn.Module:
    return models.llama(1)


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "another kind": (
        "masked bert",
        {"teacher": llama},
        r"got a masked LM \(BertForMaskedLM\) as student",
    ),
    "other classes": (
        "places bert",
        {"teacher": lambda: PLACES["bert"](1, num_labels=4)},
        "must have the same classes, got 3 for the student",
    ),
    "another vocabulary": (
        "masked bert",
        {"teacher": lambda: MASKED["bert"](1, vocab_size=70)},
        "must have one vocabulary, got 61 entries for the student and 70",
    ),
    "another start": (
        "t5",
        {"teacher": lambda: SEQ2SEQ["t5"](1, decoder_start_token_id=5)},
        "begin to decode with one token, got decoder_start_token_id 0 for the student and 5",
    ),
    "sampled tokens": ("t5", {"divergence": "k3"}, "is one of next tokens"),
    "weights": (
        "masked bert",
        {"token_weights": {"entropy": 1.0}},
        "token_weights are about next tokens",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_has_no_meaning_is_an_error(tmp_path: Path, case: str) -> None:
    of, changes, message = WRONG[case]
    make, data = CASES[of]
    changes = dict(changes)
    teacher = changes.pop("teacher", lambda: make(1))()
    args = {"divergence": "forward_kl"} | changes
    config = DistillConfig(**models.options(tmp_path, **args))
    with pytest.raises(ValueError, match=message):
        DistillTrainer(make(), config, placed.Pad(), data, teacher=teacher)


@pytest.mark.parametrize("case", ONE_OF_A_KIND)
def test_on_policy_needs_a_causal_lm(tmp_path: Path, case: str) -> None:
    make, data = CASES[case]
    args = OPSDConfig(**models.options(tmp_path, max_completion_length=4))
    tokenizer = models.tokenizer()
    with pytest.raises(ValueError, match="an OPSDTrainer samples completions and needs a causal"):
        OPSDTrainer(make(), args, None, models.problems(), processing_class=tokenizer)
    collator = HintCollator(tokenizer, ["think first"])
    with pytest.raises(ValueError, match="a HintCollator makes rows of next tokens"):
        placed.trainer(tmp_path, make(), make(1), data, data_collator=collator)


BATCHES = {
    "no labels": ({"labels": None}, "needs integer labels of shape .*got none"),
    "a class a row": ({"labels": torch.ones(4).long()}, r"of shape \[4\]"),
    "another shape": ({"labels": torch.ones(4, 3).long()}, "must have the shape of the ids"),
    "teacher rows": ({"teacher_input_ids": torch.ones(4, 3).long()}, "the same rows"),
}


@pytest.mark.parametrize("case", BATCHES)
def test_wrong_batches(tmp_path: Path, case: str) -> None:
    changes, message = BATCHES[case]
    make, data = CASES["masked bert"]
    trainer = placed.trainer(tmp_path, make(), make(1), data)
    batch = {x: y for x, y in (placed.Pad()(data[:4]) | changes).items() if y is not None}
    with pytest.raises(ValueError, match=message):
        trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize("case", ["masked bert", "places bert"])
def test_rows_that_would_read_each_other_are_refused(tmp_path: Path, case: str) -> None:
    make, data = CASES[case]
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in data]
    for given in ({}, {"return_flash_attn_kwargs": True, "return_position_ids": False}):
        packed = {"data_collator": DataCollatorWithFlattening(**given), "max_steps": 1}
        trainer = placed.trainer(tmp_path, make(), make(1), rows, **packed)
        with pytest.raises(ValueError, match=r"must stand alone, .* got packed rows"):
            trainer.train()
