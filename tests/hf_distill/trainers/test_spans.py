"""Training by likelihoods of spans: on-policy and off, one step row by row, what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_distill import (
    CrossTokenizerCollator,
    DistillConfig,
    DistillTrainer,
    HintCollator,
    ModelTeacher,
    OPSDConfig,
    OPSDTrainer,
    RemoteTeacher,
    RoutedTeacher,
    SelfTeacher,
    SpanCollator,
)
from hf_distill.cache import CachedTeacher, cache_teacher
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.letters import letters, reader

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

WORDS, LETTERS = models.tokenizer(), letters()
KL = {"alpha": 1.0, "temperature": 1.0}


def collator(other: Any = LETTERS, hint: Any = "{hint}", **options: Any) -> SpanCollator:
    return SpanCollator(WORDS, other, hint, **options)


def opsd(folder: Path, taught_by: Any = None, **changes: Any) -> OPSDTrainer:
    data = changes.pop("data", models.problems())
    made, student = changes.pop("collator", collator()), changes.pop("student", None)
    teacher = ModelTeacher(reader(), tokenizer=LETTERS) if taught_by is None else taught_by
    settings = {"divergence": "spans", "max_completion_length": 12} | KL | changes
    return OPSDTrainer(
        student or models.llama(),
        OPSDConfig(**models.options(folder, **settings)),
        made,
        data,
        data[:4],
        processing_class=WORDS,
        teacher=teacher,
    )


def distil(folder: Path, taught_by: Any = None, **changes: Any) -> DistillTrainer:
    data, made = models.problems(), changes.pop("collator", collator())
    return DistillTrainer(
        models.llama(),
        DistillConfig(**models.options(folder, **{"divergence": "spans"} | KL | changes)),
        made,
        data,
        data[:4],
        processing_class=WORDS,
        teacher=reader() if taught_by is None else taught_by,
    )


def dense_loss(student: nn.Module, rows: list[dict]) -> tuple[float, int]:
    """A step's loss in float64, a row at a time: words are spans, behind them the ends are one."""
    total, count, common = 0.0, 0, collator().common_ids
    teacher = copy.deepcopy(reader()).double()
    for row in rows:
        log_probs = []
        reply = WORDS(row["completion"])["input_ids"]
        context = f"{row['prompt']}\n\n{row['hint']}"
        theirs = [*LETTERS(" " + row["completion"])["input_ids"], 0]
        sides = (
            (student, WORDS(row["prompt"])["input_ids"], [*reply, 2]),
            (teacher, LETTERS(context)["input_ids"], theirs),
        )
        for model, prompt, ids in sides:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0]
            said = logits[len(prompt) - 1 : -1].log_softmax(-1)
            log_probs.append((said, said[torch.arange(len(ids)), torch.tensor(ids)]))
        at = 0
        for i, word in enumerate(row["completion"].split()):
            letters_of = log_probs[1][1][at : at + len(word) + 1]
            total += float(log_probs[0][1][i] - letters_of.sum())
            at += len(word) + 1
        q, p = log_probs[0][0][-1], log_probs[1][0][-1]
        mine, theirs = list(common), list(common.values())
        total += float((q[mine].exp() * (q[mine] - p[theirs])).sum() / q[mine].exp().sum())
        count += len(reply) + 1
    return total, count


def test_a_step_is_the_sum_of_the_spans(tmp_path: Path) -> None:
    student = models.llama()
    assert collator().common_ids[2] == 0  # the ends
    trainer = opsd(tmp_path, student=student, on_policy=False, max_steps=1)
    double = copy.deepcopy(student).double()
    total, count = dense_loss(double, models.problems()[:4])
    trainer.train()
    (log,) = models.steps(trainer)
    assert log["loss"] == pytest.approx(total / count, rel=2e-6)
    assert log["tokens"] == count
    assert log["paired"] == 1.0
    assert log["one_to_one"] == pytest.approx(4 / count)
    assert log["span_gap"] > 1


@pytest.mark.parametrize("on_policy", [False, True])
def test_one_tokenizer_is_the_reverse_kl(tmp_path: Path, on_policy: bool) -> None:
    runs = []
    for made, divergence in ((collator(WORDS), "spans"), (HintCollator(WORDS), "reverse_kl")):
        teacher = ModelTeacher(models.llama(1), tokenizer=WORDS)
        trainer = opsd(tmp_path, teacher, collator=made, divergence=divergence, on_policy=on_policy)
        trainer.train()
        runs.append((models.steps(trainer), models.weights(trainer.model)))
    (logs, weights), (others, other_weights) = runs
    for mine, theirs in zip(logs, others, strict=True):
        for name in ("loss", "soft", "student_entropy", "teacher_entropy", "tokens"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), name
        assert mine["one_to_one"] == 1.0
    assert models.difference(weights, other_weights) < 2e-6
    assert models.difference(weights, models.weights(models.llama())) > 1e-3


@pytest.mark.parametrize("chat", [False, True])
def test_on_policy_the_teacher_reads_its_own_tokens(tmp_path: Path, chat: bool) -> None:
    trainer = opsd(tmp_path, data=models.problems(chat=chat), log_completions=1)
    seen: list[dict] = []
    read = trainer._check_batch

    def noted(inputs: dict) -> None:
        seen.append(inputs)
        read(inputs)

    trainer._check_batch = noted
    trainer.train()
    assert len(seen) == 3
    for batch in seen:
        mask = batch["teacher_attention_mask"].bool()
        texts = ["".join(LETTERS.convert_ids_to_tokens(x[m].tolist()))
                 for x, m in zip(batch["teacher_input_ids"], mask, strict=True)]  # fmt: skip
        hints = [row["hint"] for row in models.problems()]
        assert all(any(hint in text for hint in hints) for text in texts)
        assert all(("<role>assistant\n" in text) == chat for text in texts)
    logs = models.steps(trainer)
    assert all(log["soft"] > 0 and 0 < log["paired"] < 1 for log in logs)


def test_micro_batches_are_the_batch(tmp_path: Path) -> None:
    runs = []
    for size, steps in ((8, 1), (4, 2)):
        trainer = distil(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps
        )
        trainer.train()
        runs.append((models.steps(trainer), models.weights(trainer.model)))
    for one, other in zip(runs[0][0], runs[1][0], strict=True):
        assert one == pytest.approx(other, rel=2e-5)
    assert models.difference(runs[0][1], runs[1][1]) < 2e-6


def test_a_student_learns_its_own_texts_likelihoods(tmp_path: Path) -> None:
    """On-policy: the estimate of the KL falls."""
    settings = {"max_steps": 20, "learning_rate": 1e-2, "max_completion_length": 5}
    trainer = opsd(tmp_path, **settings, rollout={"temperature": 1.0})
    trainer.train()
    soft = [log["soft"] for log in models.steps(trainer)]
    assert sum(soft[-4:]) < 0.5 * sum(soft[:4])


def test_routed_teachers(tmp_path: Path) -> None:
    data = [row | {"who": "ab"[i % 2]} for i, row in enumerate(models.problems())]
    routes = RoutedTeacher({"a": reader(1), "b": reader(1)}, "who")
    logs = []
    for teacher in (routes, None):
        trainer = opsd(tmp_path, teacher, data=data, max_steps=1, max_completion_length=5)
        trainer.train()
        logs.append(models.steps(trainer))
    for mine, theirs in zip(*logs, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_one_tokenizer_with_heads_padded_differently(tmp_path: Path) -> None:
    """Both are cut to the tokenizer's ids, as by every divergence."""
    runs = []
    for made, divergence in ((collator(WORDS), "spans"), (HintCollator(WORDS), "reverse_kl")):
        teacher = ModelTeacher(models.llama(1, vocab_size=70), tokenizer=WORDS)
        settings = {"collator": made, "divergence": divergence, "on_policy": False}
        trainer = opsd(tmp_path, teacher, **settings, max_steps=1)
        trainer.train()
        runs.append(models.steps(trainer)[0]["loss"])
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_reused_completions_and_a_clip(tmp_path: Path) -> None:
    rollout = {"temperature": 1.0, "steps_per_rollout": 2, "importance_clip": 2.0}
    trainer = opsd(tmp_path, rollout=rollout, clip={"bound": 2.0, "level": "token"}, alpha=0.5)
    trainer.train()
    logs = models.steps(trainer)
    assert logs[1]["importance_ratio"] != pytest.approx(1.0, rel=1e-4)
    assert all(0 < log["clipped"] < 1 for log in logs)
    assert trainer.evaluate()["eval_soft"] > 0


# Refusals


def test_the_loss_and_the_collator_need_each_other(tmp_path: Path) -> None:
    words = "'spans' and a SpanCollator need each other, got {} with a {}"
    for made, name in (
        (HintCollator(WORDS), "HintCollator"),
        (CrossTokenizerCollator(WORDS, LETTERS), "CrossTokenizerCollator"),
    ):
        with pytest.raises(ValueError, match=words.format("'spans'", name)):
            distil(tmp_path, collator=made)
    for on_policy in (False, True):
        with pytest.raises(ValueError, match=words.format("'jsd'", "SpanCollator")):
            opsd(tmp_path, divergence="jsd", on_policy=on_policy)
    own = lambda rows: collator()(rows)
    with pytest.raises(ValueError, match=words.format("'spans'", "function")):
        distil(tmp_path, collator=own, remove_unused_columns=False)
    other = distil(tmp_path, collator=own, remove_unused_columns=False, divergence="uld")
    with pytest.raises(ValueError, match=r"divergence 'spans' .* each other, got a batch with t"):
        other.train()


def test_settings_that_are_not_of_spans(tmp_path: Path) -> None:
    for changes, words in (
        ({"beta": 0.3}, "'spans' has no beta: leave it at 0.5, got 0.3"),
        ({"clip": {"bound": 1.0, "level": "vocab_entry"}}, "the clip of spans must have level"),
        ({"taid": {}}, "taid needs divergence 'forward_kl', got 'spans'"),
        ({"contrast": {"kind": "target"}}, "needs a divergence over the whole vocabulary"),
    ):
        with pytest.raises(ValueError, match=words):
            opsd(tmp_path, **changes)
    for changes, words in (
        ({"token_weights": {"entropy": 0.5}}, "token_weights.entropy is the teacher's .* got 0.5"),
        ({"token_weights": {"drift": 0.5}}, "token_weights.drift needs .* of another tokenizer"),
        ({"hidden_layers": "last"}, "hidden_layers needs .* one tokenizer, .* 43 ids"),
    ):
        with pytest.raises(ValueError, match=words):
            opsd(tmp_path, **changes)


def test_teachers_that_cannot_be_asked(tmp_path: Path) -> None:
    remote = RemoteTeacher("http://localhost:1/v1", "tiny", 5)
    with pytest.raises(ValueError, match=r"'spans' reads the .* of which a RemoteTeacher knows"):
        opsd(tmp_path, remote)
    remote.close()
    made = HintCollator(WORDS, ())
    cache_teacher(models.llama(1), models.problems(), tmp_path / "c", data_collator=made,
                  codec="full")  # fmt: skip
    with pytest.raises(ValueError, match="own tokens, which a CachedTeacher has not read"):
        distil(tmp_path, CachedTeacher(tmp_path / "c"))


def test_tokenizers_are_those_of_the_models(tmp_path: Path) -> None:
    teacher = ModelTeacher(reader(), tokenizer=WORDS)
    with pytest.raises(ValueError, match=r"one tokenizer for the teacher, got .* 43 .* 49 ids"):
        opsd(tmp_path, teacher)
    with pytest.raises(ValueError, match="teacher's tokenizer must have at most its model's 48"):
        opsd(tmp_path, reader(vocab_size=48))


def test_what_needs_one_tokenizer(tmp_path: Path) -> None:
    words = r"the student itself and needs its tokenizer, got .* 43 ids\) and .* 49 ids"
    with pytest.raises(ValueError, match=words):
        opsd(tmp_path, SelfTeacher("base"))
    with pytest.raises(ValueError, match=r"a forecast compares .* got a SpanCollator"):
        opsd(tmp_path).forecast()
    own = opsd(tmp_path, SelfTeacher("base"), collator=collator(WORDS), max_steps=1)
    own.train()
    assert models.steps(own)[0]["one_to_one"] == 1.0
