"""OPSDTrainer on dialogues whose hints stand at a turn, and with hints that were cut."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_distill import Hint, HintCollator, OPSDConfig, OPSDTrainer
from hf_distill.data.hint_collator import TRUNCATED
from metal_ops import DivergenceSpec, reference
from tests.hf_distill.trainers import models


def trainer(folder: Path, collator: HintCollator, rows: list[dict[str, Any]], **changes: Any):
    settings = {"max_completion_length": 6, "per_device_train_batch_size": 2} | changes
    return OPSDTrainer(
        models.llama(),
        OPSDConfig(**models.options(folder, **settings)),
        collator,
        rows,
        rows[:3],
        models.tokenizer(),
    )


def dialogue(i: int) -> dict[str, Any]:
    """Two turns; the second, message 3, is the wrong one of every other row."""
    a, b = 1 + i % 4, 1 + (i * 3) % 5
    return {
        "prompt": [{"role": "user", "content": f"What is {a} + {b} ?"}],
        "completion": [
            {"role": "assistant", "content": f"{a + b}"},
            {"role": "user", "content": f"What is {a} ?"},
            {"role": "assistant", "content": f"The answer is {b} ."},
        ],
        "hint": f"Hint : {a} , done ." if i % 2 else f"Hint : {a}",
    }


def test_the_loss_is_the_divergence_of_the_targeted_turn_in_both_contexts(tmp_path: Path):
    """By the two models' logits on rows written by hand, for the scored turn's tokens only."""
    tokenizer, rows = models.tokenizer(), [dialogue(i) for i in range(2)]
    collator = HintCollator(tokenizer, Hint("hint", turn=2, separator=" "), scored="hinted")
    opsd = trainer(tmp_path, collator, rows, on_policy=False, max_steps=1)
    model, total, count = opsd.model, 0.0, 0
    for row in rows:
        question, turn, answer = row["completion"]
        reply = tokenizer(f"{answer['content']} <|im_end|>")["input_ids"]
        logits = []
        for hint in ("", f" {row['hint']}"):
            asked = turn | {"content": turn["content"] + hint}
            messages = [*row["prompt"], question, asked]
            context = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )["input_ids"]
            with torch.no_grad():
                whole = model(torch.tensor([[*context, *reply]])).logits[0]
            logits.append(whole[len(context) - 1 : -1])
        total += reference.divergence(*logits, DivergenceSpec("jsd")).sum().item()
        count += len(reply)
    opsd.train()
    logged = opsd.state.log_history[0]
    assert logged["tokens"] == count
    assert logged["soft"] == pytest.approx(total / count, rel=1e-4)
    assert total > 0.01


@pytest.mark.parametrize("on_policy", [True, False])
def test_hints_that_were_cut_are_logged(tmp_path: Path, on_policy: bool):
    rows = models.problems(4)
    options = {"truncation": "hint", "max_hint_length": 3}
    collator = HintCollator(models.tokenizer(), Hint(separator=" "), **options)
    cut = collator(rows)[TRUNCATED]
    assert 0 < cut.sum() < 4
    opsd = trainer(tmp_path, collator, rows, on_policy=on_policy, max_steps=2, logging_steps=2)
    opsd.train()
    assert opsd.state.log_history[0]["hints_truncated"] == cut.float().mean().item()
    shown = cut[:3].float().mean().item()
    assert opsd.evaluate()["eval_hints_truncated"] == pytest.approx(shown)
