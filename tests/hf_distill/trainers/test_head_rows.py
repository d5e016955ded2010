"""How many positions reach an output head in a step: those that are scored, once a side."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_distill import OPSDConfig, OPSDTrainer
from metal_ops.backends import chunked
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.reading import OPSDReadsLogits

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "matmul", "linear")


class HeadRows(TorchDispatchMode):
    """Adds up the rows of products with as many columns as the vocabulary has entries."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in PRODUCTS and out.shape[-1] == models.VOCAB:
            self.rows += out.numel() // models.VOCAB
        return out


@pytest.fixture
def head_rows(monkeypatch: Any) -> HeadRows:
    """It looks inside the op too, where an outer mode cannot."""
    mode, original = HeadRows(), chunked.linear

    def watched(*args: Any) -> Any:
        with mode:
            return original(*args)

    monkeypatch.setattr(chunked, "linear", watched)
    return mode


def train(folder: Path, kind: Any, rows: HeadRows, adapted: bool, **given: Any) -> list[Any]:
    """Return of each step after the first, which tries things out, its rows and scored tokens."""
    found = []

    class Counted(kind):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            rows.rows = 0
            with rows:
                loss = super().compute_loss(model, inputs, *args, **kwargs)
            found.append((rows.rows, int((inputs["labels"] != -100).sum())))
            assert inputs["labels"].numel() > 2 * found[-1][1]  # prompts and padding
            return loss

    model: Any = models.llama()
    teacher = given.pop("model_teacher", None)
    trainer = Counted(
        models.lora(model) if adapted else model,
        OPSDConfig(**models.options(folder, max_completion_length=4, **given)),
        train_dataset=models.problems(),
        processing_class=models.tokenizer(),
        teacher=teacher,
    )
    trainer.train()
    return found[1:]


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", [OPSDTrainer, OPSDReadsLogits], ids=["hidden", "logits"])
@pytest.mark.parametrize("teacher", ["base", "live", "ema", "another model"])
def test_only_scored_positions_reach_a_head(
    tmp_path: Path, head_rows: HeadRows, teacher: str, kind: Any, adapted: bool
) -> None:
    other = {"model_teacher": models.llama(1)} if teacher == "another model" else {}
    own = {} if other else {"teacher": teacher}
    found = train(tmp_path, kind, head_rows, adapted, **own, **other)
    assert len(found) == 2
    assert all(rows == 2 * scored for rows, scored in found)
    assert all(torch.tensor(found).flatten() > 0)
