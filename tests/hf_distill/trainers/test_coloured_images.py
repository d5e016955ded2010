"""Self-distillation on pictures of one colour, which hints name: the student learns to see."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_distill import HintCollator, ModelTeacher, OPSDConfig, OPSDTrainer
from tests.hf_distill.data.image_processors import COLOURS, part, processor
from tests.hf_distill.trainers import image_models, models

KIND = "qwen2_vl"
NAMES = sorted(COLOURS)


def rows(count: int, seed: int, told: bool = False) -> list[dict[str, Any]]:
    """Pictures whose colour the hint names; if `told`, the prompt names another in its place."""
    generator, made = torch.Generator().manual_seed(seed), []
    for i in range(count):
        drawn, other = torch.randint(0, len(NAMES), (2,), generator=generator).tolist()
        answer = NAMES[other if told else drawn]
        question = "What is the colour ?" + (f"\n\nHint : {answer}" if told else "")
        content = [part(NAMES[drawn], 1000 * seed + i), {"type": "text", "text": question}]
        made.append(
            {
                "prompt": [{"role": "user", "content": content}],
                "hint": f"Hint : {answer}",
                "completion": [{"role": "assistant", "content": answer}],
            }
        )
    return made


def taught(steps: int = 180) -> Any:
    """A model that says the colour of the hint, whatever it sees, and some colour without one."""
    lm, collator = image_models.model(KIND), HintCollator(processor(KIND), [])
    lm.train()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(steps):
        batch = collator([*rows(12, step, told=True), *rows_of_any_answer(4, step)])
        batch.pop("completion_index")
        lm(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return lm.eval()


def rows_of_any_answer(count: int, seed: int) -> list[dict[str, Any]]:
    """Questions without a hint, whose answers have nothing to do with their pictures."""
    others = rows(count, seed + 10_000)
    pairs = zip(rows(count, seed + 20_000), others, strict=True)
    return [row | {"completion": other["completion"]} for row, other in pairs]


@torch.no_grad()
def accuracy(lm: nn.Module, given: Sequence[dict[str, Any]]) -> float:
    """The share of rows whose colour is the most probable one of the answer's first token."""
    batch = HintCollator(processor(KIND), [])(given)
    first = batch.pop("completion_index")[:, 0]
    labels = batch.pop("labels")
    at = torch.arange(len(first))
    said = lm.eval()(**batch).logits[at, first - 1].argmax(-1)
    return float((said == labels[at, first]).float().mean())


@pytest.mark.slow
def test_what_the_hint_says_is_learnt_from_the_picture(tmp_path: Path) -> None:
    student = taught()
    held_out = rows(60, 77_777)
    hinted = rows(60, 88_888, told=True)
    assert accuracy(student, hinted) > 0.9
    before = accuracy(student, held_out)
    args = OPSDConfig(
        **models.options(
            tmp_path,
            max_steps=60,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            max_completion_length=3,
            logging_steps=20,
        )
    )
    teacher = ModelTeacher(models.copied(student))
    collator, data = HintCollator(processor(KIND)), rows(800, 1)
    OPSDTrainer(student, args, collator, data, teacher=teacher).train()
    after = accuracy(student, held_out)
    print(f"accuracy {before:.2f} -> {after:.2f}")
    assert before < 0.6
    assert after > 0.9
