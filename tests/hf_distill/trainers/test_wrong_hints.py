"""Training with several wrong hints: formulas, forwards, memory, rows that have fewer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_distill import Attempt, Contrast, Feedback, Hint, HintCollator, OPSDConfig, OPSDTrainer
from hf_distill.data.sides import CONTRAST_ABSENT, CONTRAST_SAME, UNCONTRASTED
from hf_distill.models.signals import Signal
from hf_distill.trainers.views import _mean
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.test_contrast import (
    SUM_ERROR,
    by_hand,
    forwards,
    loss_of,
    make,
)

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

THREE = [Contrast(hint=Hint("wrong", optional=True)), Contrast("corrupted_number", number=2)]
LOGITS = {"label_smoothing_factor": 0.1}


def problems(count: int = 4) -> list[dict[str, Any]]:
    """Of the first row the number in the hint has a second one; the second has no wrong hint."""
    made = models.problems(count)
    for i, row in enumerate(made):
        row["hint"] = f"Hint : {2 + i}"
        row["wrong"] = "think first" if i != 1 else None
    return made


@pytest.mark.parametrize(
    ("kind", "changes"), [("weight", {}), ("target", {}), ("weight", LOGITS), ("target", LOGITS)]
)
def test_the_loss_is_that_of_the_formula(tmp_path: Path, kind: str, changes: Any) -> None:
    trainer = make(tmp_path, THREE, kind, contrast_weight=0.7, **changes)
    batch = trainer.data_collator(problems())
    assert (
        batch[CONTRAST_ABSENT].tolist() == [[False] * 3, [False, False, True]] + [[False] * 3] * 2
    )
    assert batch[UNCONTRASTED].tolist() == [False] * 4
    want = by_hand(trainer, batch, kind, 0.7, number=3)
    assert loss_of(trainer, problems()).item() == pytest.approx(want, rel=SUM_ERROR)
    one = loss_of(make(tmp_path, THREE[0], kind, contrast_weight=0.7), problems()).item()
    assert abs(one - want) > 1000 * SUM_ERROR * want


@pytest.mark.parametrize("changes", [{}, LOGITS, {"hidden_layers": "last"}])
@pytest.mark.parametrize("kind", ["weight", "target"])
def test_equal_hints_teach_nothing(tmp_path: Path, kind: str, changes: Any) -> None:
    """Bit for bit; also where a row has fewer wrong hints than another."""
    same = [Contrast(hint="hint"), Contrast(hint=Hint("again", optional=True))]
    weight = {"hidden_weight": 0.0} if changes.get("hidden_layers") else {}
    trainer = make(tmp_path, same, kind, weight_decay=0.0, alpha=1.0, **changes, **weight)
    rows = [x | {"again": x["hint"] if i % 2 else None} for i, x in enumerate(problems())]
    loss = loss_of(trainer, rows)
    assert bool(trainer.data_collator(rows)[UNCONTRASTED].all())
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


@pytest.mark.parametrize("changes", [{}, LOGITS])
def test_equal_contexts_are_the_same_whatever_the_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any
) -> None:
    """A forward of other rows may round otherwise; here each adds noise of its own."""
    same = [Contrast(hint="hint"), Contrast(hint=Hint("again", optional=True))]
    trainer = make(tmp_path, same, **changes)
    rows = [x | {"again": x["hint"] if i % 2 else None} for i, x in enumerate(problems())]
    loss_of(trainer, rows)
    ask = trainer._views._asked

    def noisy(*args: Any) -> Signal:
        signal = ask(*args)
        name = "logits" if changes else "hidden"
        said = getattr(signal, name)
        return replace(signal, **{name: said + 0.1 * torch.randn_like(said)})

    monkeypatch.setattr(trainer._views, "_asked", noisy)
    batch = trainer._read(trainer.model, trainer.data_collator(rows), None, False)
    signal = trainer._signal(trainer.model, batch)
    assert len(signal.contrasts) == (1 if changes else 2)
    for each in signal.contrasts:
        there = slice(None) if each.absent is None else ~each.absent
        assert torch.equal(each.dense()[there], signal.dense()[there])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # the first two contexts as with one wrong hint, and the others behind them
        ({}, [(8, False), (8, False), (4, True)]),
        (LOGITS, [(8, False), (4, False), (4, False), (4, True)]),
    ],
)
def test_how_often_the_teacher_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any, expected: Any
) -> None:
    trainer = make(tmp_path, THREE, **changes)
    first = loss_of(trainer, problems()).item()
    seen = forwards(trainer, monkeypatch)
    assert loss_of(trainer, problems()).item() == first
    assert seen == expected


@pytest.mark.parametrize("changes", [{}, LOGITS])
def test_logits_of_all_contexts_are_not_there_at_once(tmp_path: Path, changes: Any) -> None:
    """Hidden states are kept, or the mean of the logits."""
    trainer = make(tmp_path, THREE, **changes)
    loss_of(trainer, problems())
    batch = trainer._read(trainer.model, trainer.data_collator(problems()), None, False)
    signal = trainer._signal(trainer.model, batch)
    if changes:
        assert signal.hidden is None
        assert len(signal.contrasts) == 1
    else:
        assert len(signal.contrasts) == 3
        assert all(x.logits is None and x.hidden is not None for x in signal.contrasts)


def test_logits_are_cut_to_the_vocabulary_before_their_mean() -> None:
    """The mean of distributions over the entries that are used, each renormalised."""
    drawn = [torch.randn(3, 9, generator=torch.Generator().manual_seed(x)) * 3 for x in (0, 1, 2)]
    found = _mean((Signal(logits=x) for x in drawn), None, 6).logits
    want = torch.stack([x[:, :6].double().softmax(-1) for x in drawn]).mean(0).log()
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)


def test_a_list_of_one_is_that_contrast(tmp_path: Path) -> None:
    one, listed = make(tmp_path, "wrong"), make(tmp_path, [Contrast(hint="wrong")])
    rows = [x | {"wrong": "think first"} for x in problems()]
    batches = [x.data_collator(rows) for x in (one, listed)]
    assert batches[0].keys() == batches[1].keys()
    assert CONTRAST_SAME not in batches[1]
    assert loss_of(one, rows).item() == loss_of(listed, rows).item()


def judge(attempts: list[Attempt]) -> list[Feedback]:
    """Of four attempts at a prompt the first has succeeded."""
    return [Feedback(columns={"score": float(i % 4 == 0)}) for i, _ in enumerate(attempts)]


def test_failed_siblings_of_a_rollout(tmp_path: Path) -> None:
    """The successful attempt has three of them, a failed one two; an evaluation has none."""
    wrong = Contrast(hint="Hint : {failed_siblings}", number=3)
    rollout = {"num_completions": 4, "temperature": 1.5}
    args = {"max_steps": 1, "max_completion_length": 4, "rollout": rollout, "log_completions": 1}
    trainer = OPSDTrainer(
        models.llama(),
        OPSDConfig(**models.options(tmp_path, **args)),
        HintCollator(models.tokenizer(), "hint", contrast=wrong),
        problems(),
        problems(),
        models.tokenizer(),
        environment=judge,
    )
    trainer.train()
    (batch,) = trainer._window.batches
    texts = [episode.texts[0] for episode in trainer._window.episodes[0]]
    assert len({*texts}) == 4, "or equal hints are one"
    assert (~batch[CONTRAST_ABSENT]).sum(1).tolist() == [3, 2, 2, 2]
    assert [x["uncontrasted"] for x in models.steps(trainer)] == [0.0]
    assert trainer.evaluate()["eval_uncontrasted"] == 1.0
    assert "failed_siblings" not in (tmp_path / "completions.jsonl").read_text()
