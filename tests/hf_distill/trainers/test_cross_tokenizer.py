"""Training with a teacher of another tokenizer, and every set-up that is refused."""

import copy
import logging
import math
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
)
from hf_distill.cache import CachedTeacher, cache_teacher
from hf_distill.models.signals import Signal
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.letters import SIZE, letters, reader

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

WORDS, LETTERS = models.tokenizer(), letters()
BOTH = r"'' \(\w+, 43 ids\) and '' \(\w+, 49 ids\)"


def distil(folder: Path, student: Any = None, taught_by: Any = None, **changes: Any) -> Any:
    collator = changes.pop("collator", None) or CrossTokenizerCollator(WORDS, LETTERS)
    data, tokenizer = changes.pop("data", models.problems()), changes.pop("tokenizer", WORDS)
    return DistillTrainer(
        models.llama() if student is None else student,
        DistillConfig(**models.options(folder, **{"divergence": "uld"} | changes)),
        collator,
        data,
        data[:4],
        processing_class=tokenizer,
        teacher=reader() if taught_by is None else taught_by,
    )


def dense_loss(student: nn.Module, teacher: nn.Module, rows: list, settings: DistillConfig) -> Any:
    """The loss of a step, row by row in float64: the paper's, over the labelled tokens."""
    total, count = 0.0, 0
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    for row in rows:
        logits, labels = [], []
        for tokenizer, model, end in ((WORDS, student, 2), (LETTERS, teacher, 0)):
            prompt = tokenizer(row["prompt"])["input_ids"]
            reply = [*tokenizer(row["completion"])["input_ids"], end]
            with torch.no_grad():
                said = model(input_ids=torch.tensor([[*prompt, *reply]])).logits[0]
            logits.append(said[len(prompt) - 1 : -1])
            labels.append(torch.tensor(reply))
        hard = nn.functional.cross_entropy(logits[0], labels[0], reduction="sum")
        both = min(map(len, logits))
        q, p = (
            (x[:both] / settings.temperature).softmax(-1).sort(dim=-1, descending=True).values
            for x in logits
        )
        q, p = (nn.functional.pad(x, (0, max(SIZE, models.VOCAB) - x.shape[1])) for x in (q, p))
        soft = settings.temperature**2 * (q - p).abs().sum()
        total += settings.alpha * soft + (1 - settings.alpha) * hard
        count += len(labels[0])
    return total.item() / count


@pytest.mark.parametrize("smoothing", [0.0, 1e-12], ids=["hidden states", "logits"])
def test_a_step_is_the_papers_loss(tmp_path: Path, smoothing: float) -> None:
    student = models.llama()
    trainer = distil(tmp_path, student, label_smoothing_factor=smoothing, max_steps=1)
    want = dense_loss(student, reader(), models.problems()[:4], trainer.args)
    trainer.train()
    (log,) = models.steps(trainer)
    assert log["loss"] == pytest.approx(want, rel=3e-6)
    assert 0 < log["teacher_entropy"] < 4
    assert log["paired"] == 1.0  # a word has no more words than letters
    assert log["tokens"] == sum(len(WORDS(x["completion"])["input_ids"]) + 1
                                for x in models.problems()[:4])  # fmt: skip
    assert not {"top1_agreement", "clipped"} & log.keys()


def test_a_student_with_more_tokens_than_its_teacher(tmp_path: Path) -> None:
    collator = CrossTokenizerCollator(LETTERS, WORDS)
    trainer = distil(
        tmp_path, reader(0), models.llama(1), collator=collator, tokenizer=LETTERS, max_steps=1
    )
    trainer.train()
    (log,) = models.steps(trainer)
    rows = models.problems()[:4]
    lengths = [[len(t(x["completion"])["input_ids"]) + 1 for x in rows] for t in (LETTERS, WORDS)]
    assert log["tokens"] == sum(lengths[0])
    paired = sum(map(min, zip(*lengths, strict=True)))
    assert log["paired"] == pytest.approx(paired / sum(lengths[0]))
    assert log["paired"] < 0.6
    soft = log["soft"] / log["paired"]
    assert 0.01 < soft < 8  # temperature² times at most 2


def test_micro_batches_are_the_batch(tmp_path: Path) -> None:
    runs = []
    for size, steps in ((8, 1), (4, 2)):
        trainer = distil(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps
        )
        before = models.weights(trainer.model)
        trainer.train()
        runs.append((models.steps(trainer), models.weights(trainer.model)))
    for one, other in zip(runs[0][0], runs[1][0], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert models.difference(runs[0][1], runs[1][1]) < 2e-6
    assert models.difference(runs[0][1], before) > 1e-3


def test_learning_from_a_teacher_with_other_tokens(tmp_path: Path) -> None:
    """The soft loss alone falls, and its gradient is not that of the hard loss."""
    settings = {"max_steps": 40, "learning_rate": 5e-3, "alpha": 1.0, "temperature": 1.0}
    trainer = distil(tmp_path, **settings)
    before = trainer.evaluate()["eval_soft"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_soft"] < 0.7 * before
    assert after["eval_loss"] == pytest.approx(after["eval_soft"], rel=1e-4)


def test_messages_and_their_templates(tmp_path: Path) -> None:
    trainer = distil(tmp_path, data=models.problems(chat=True))
    trainer.train()
    assert trainer.state.global_step == 3


def test_routed_teachers_with_one_tokenizer(tmp_path: Path) -> None:
    data = [row | {"who": "ab"[i % 2]} for i, row in enumerate(models.problems())]
    routes = RoutedTeacher({"a": reader(1), "b": reader(1)}, "who")
    one = distil(
        tmp_path, taught_by=routes, data=data,
        collator=routes.collator(CrossTokenizerCollator(WORDS, LETTERS)),
    )  # fmt: skip
    other = distil(tmp_path)
    for trainer in (one, other):
        trainer.train()
    for mine, theirs in zip(models.steps(one), models.steps(other), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_one_tokenizer_is_allowed_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hf_distill"):
        both = distil(
            tmp_path, None, models.llama(1), collator=CrossTokenizerCollator(WORDS, WORDS)
        )
    said = [r.getMessage() for r in caplog.records if "one tokenizer" in r.getMessage()]
    assert len(said) == 1
    assert "'forward_kl' would compare those of each token" in said[0]
    plain = distil(
        tmp_path, None, models.llama(1), collator=HintCollator(WORDS, ()),
        remove_unused_columns=False,
    )  # fmt: skip
    for trainer in (both, plain):
        trainer.train()
    for mine, theirs in zip(models.steps(both), models.steps(plain), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize(
    ("size", "temperature", "is_said"), [(70, 2.0, True), (70, 1.0, False), (49, 2.0, False)]
)
def test_a_temperature_that_leaves_little_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int, temperature: float, is_said: bool
) -> None:
    with caplog.at_level(logging.WARNING, "hf_distill"):
        distil(tmp_path, None, reader(vocab_size=size), temperature=temperature)
    said = [r.getMessage() for r in caplog.records if "gradient vanishes" in r.getMessage()]
    assert bool(said) == is_said
    assert not said or "temperature 2: " in said[0]
    assert not said or "(70 entries, the student's 61); take 1" in said[0]


def test_a_hinted_self_teacher(tmp_path: Path) -> None:
    settings = {"divergence": "uld", "on_policy": False}
    trainer = OPSDTrainer(
        models.llama(),
        OPSDConfig(**models.options(tmp_path, **settings)),
        None,
        models.problems(),
        processing_class=WORDS,
    )
    trainer.train()
    assert all(log["soft"] > 1e-3 and log["paired"] == 1.0 for log in models.steps(trainer))


# Refusals


def named(folder: Path, tokenizer: Any, model: nn.Module, name: str = "teacher") -> str:
    path = folder / name
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_different_tokenizers_with_another_divergence(tmp_path: Path) -> None:
    words = rf"one tokenizer for divergence 'forward_kl' \(divergence 'uld' .*, got {BOTH}: '\S+' "
    teacher = ModelTeacher(reader(vocab_size=61), tokenizer=LETTERS)
    for collator in (models.Pad(), HintCollator(WORDS, ())):
        with pytest.raises(ValueError, match=words):
            distil(tmp_path, None, teacher, divergence="forward_kl", collator=collator)
    with pytest.raises(ValueError, match=f"needs divergence 'uld', got 'jsd' with {BOTH}"):
        distil(tmp_path, None, reader(), divergence="jsd")


def test_a_names_own_tokenizer_is_compared(tmp_path: Path) -> None:
    other, same = (
        named(tmp_path, tokenizer, models.llama(1), name)
        for tokenizer, name in ((LETTERS, "letters"), (models.tokenizer(), "words"))
    )
    settings = {"divergence": "forward_kl", "collator": HintCollator(WORDS, ())}
    with pytest.raises(ValueError, match=r"got '' \(.*, 43 ids\) and '\S*letters' \(\w+, 49 ids\)"):
        distil(tmp_path, None, other, **settings)
    assert distil(tmp_path, None, same, **settings)._vocabulary.size is None
    # what is given goes before what lies beside the weights
    distil(tmp_path, None, ModelTeacher(other, tokenizer=models.tokenizer()), **settings)
    distil(tmp_path, None, other, **settings, tokenizer=None)


def test_a_name_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    models.gpt2(1).save_pretrained(tmp_path)  # whose tokenizer class comes out with one id
    assert ModelTeacher(str(tmp_path)).tokenizer() is None


def test_the_first_difference_is_named(tmp_path: Path) -> None:
    more = models.tokenizer()
    more.add_tokens(["new"])
    teacher = ModelTeacher(models.llama(1), tokenizer=more)
    words = "'new' is no token of the one, id 43 of the other"
    with pytest.raises(ValueError, match=words):
        distil(
            tmp_path, None, teacher, divergence="jsd", collator=HintCollator(WORDS, ())
        )  # fmt: skip


def test_uld_needs_a_batch_of_both_tokenizers(tmp_path: Path) -> None:
    teacher = ModelTeacher(reader(), tokenizer=LETTERS)
    trainer = distil(
        tmp_path, None, teacher, collator=HintCollator(WORDS, ()), remove_unused_columns=False
    )
    with pytest.raises(ValueError, match=f"need batches of a CrossTokenizerCollator, got {BOTH}"):
        trainer.train()


def test_a_batch_of_both_tokenizers_needs_uld(tmp_path: Path) -> None:
    collator = CrossTokenizerCollator(WORDS, LETTERS)
    settings = {"divergence": "jsd", "remove_unused_columns": False}
    trainer = distil(
        tmp_path, None, models.llama(1), collator=lambda rows: collator(rows), **settings
    )
    with pytest.raises(ValueError, match="teacher_own_tokens needs divergence 'uld'"):
        trainer.train()


def test_the_collators_tokenizers_are_those_of_the_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one tokenizer for the student, got .* 49 .* 43 ids"):
        distil(tmp_path, tokenizer=LETTERS)
    teacher = ModelTeacher(reader(), tokenizer=WORDS)
    with pytest.raises(ValueError, match=r"one tokenizer for the teacher, got .* 43 .* 49 ids"):
        distil(tmp_path, None, teacher)
    words = "the teacher's tokenizer must have at most its model's 48 entries, got .* 49 ids"
    with pytest.raises(ValueError, match=words):
        distil(tmp_path, None, reader(vocab_size=48))
    words = "the student's tokenizer must have at most its model's 42 entries, got .* 43 ids"
    with pytest.raises(ValueError, match=words):
        distil(tmp_path, models.llama(vocab_size=42))


def test_settings_that_uld_does_not_read(tmp_path: Path) -> None:
    for changes, words in (
        ({"beta": 0.3}, "'uld' has no beta: leave it at 0.5, got 0.3"),
        ({"clip": {"bound": 1.0, "level": "token"}}, "'uld' has no clip.bound: .* got 1.0"),
    ):
        for config in (DistillConfig, OPSDConfig):
            with pytest.raises(ValueError, match=words):
                config(**models.options(tmp_path, divergence="uld", **changes))


def test_teachers_that_say_too_little(tmp_path: Path) -> None:
    remote = RemoteTeacher("http://localhost:1/v1", "tiny", 5)
    words = "'uld' reads the .* of the whole vocabulary, of which a {}Teacher knows some: take an"
    with pytest.raises(ValueError, match=words.format("Remote")):
        distil(tmp_path, None, remote, temperature=1.0)
    remote.close()
    collator = HintCollator(WORDS, ())
    cache_teacher(models.llama(1), models.problems(), tmp_path / "c", data_collator=collator)
    with pytest.raises(ValueError, match=words.format("Cached")):
        distil(tmp_path, None, CachedTeacher(tmp_path / "c"), collator=collator)


def test_hidden_layers_need_one_tokenizer(tmp_path: Path) -> None:
    settings = {"hidden_layers": "last"}
    with pytest.raises(ValueError, match=f"^hidden_layers needs .* one tokenizer, .* got {BOTH}"):
        distil(tmp_path, **settings)
    collator = CrossTokenizerCollator(WORDS, LETTERS)
    hidden_by_a_function = distil(
        tmp_path,
        collator=lambda rows: collator(rows),
        remove_unused_columns=False,
        **settings,
    )
    with pytest.raises(ValueError, match=r"hidden_layers needs .* got a batch with teacher_own"):
        hidden_by_a_function.train()
    same = CrossTokenizerCollator(WORDS, WORDS)
    trainer = distil(tmp_path, None, models.llama(1), collator=same, **settings)
    trainer.train()
    assert all(log["hidden"] > 0 for log in models.steps(trainer))


def test_unsure_teachers_of_other_tokens_weigh_those_beside_theirs(tmp_path: Path) -> None:
    trainer = distil(
        tmp_path, reader(0), models.llama(1), collator=CrossTokenizerCollator(LETTERS, WORDS),
        tokenizer=LETTERS, token_weights={"entropy": 0.5}, max_steps=1, temperature=1.0,
    )  # fmt: skip
    trainer.train()
    (log,) = models.steps(trainer)
    # the mean of 1 + 0.5 H / ln V over the tokens with a pair, and of 1 over the others
    share = log["teacher_entropy"] / math.log(models.VOCAB)
    assert log["entropy_factor"] == pytest.approx(1 + 0.5 * log["paired"] * share, rel=1e-5)
    assert share > 0.1
    assert log["paired"] < 0.6
    paired = torch.tensor([0, 1, 0, 1]).bool()
    said = Signal(logits=torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]), paired=paired)
    factor = trainer.task.weighing._entropy_factor(said, 4)
    assert factor.tolist() == pytest.approx([1.0, 1.5, 1.0, 1.0])


def test_taid_is_not_of_other_tokens(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="taid needs divergence 'forward_kl', got 'uld'"):
        DistillConfig(**models.options(tmp_path, divergence="uld", taid={}))


def test_temperature_and_alpha_may_move(tmp_path: Path) -> None:
    moving = {"temperature": "linear:3.0->1.0@2", "alpha": "linear:1.0->0.0@2"}
    trainer = distil(tmp_path, **moving)
    trainer.train()
    first, _, last = models.steps(trainer)
    assert first["loss"] == pytest.approx(first["soft"], rel=1e-5)
    assert last["loss"] == pytest.approx(last["hard"], rel=1e-5)
    with pytest.raises(ValueError, match="a schedule of beta needs a divergence that reads it"):
        distil(tmp_path, beta="linear:0.1->0.9@2")


def test_what_needs_one_tokenizer_can_ask(tmp_path: Path) -> None:
    different = distil(tmp_path)._vocabulary
    with pytest.raises(ValueError, match=f"^hidden_layers needs .* one tokenizer, .* got {BOTH}"):
        different.check_one_tokenizer("hidden_layers")
    collator = CrossTokenizerCollator(WORDS, WORDS)
    distil(tmp_path, None, models.llama(1), collator=collator)._vocabulary.check_one_tokenizer("x")


@pytest.mark.parametrize(("student", "teacher"), [(61, 40), (42, 61)])
def test_a_vocabulary_smaller_than_the_tokenizer(
    tmp_path: Path, student: int, teacher: int
) -> None:
    words = (
        rf"got {student} entries .* {teacher} for the teacher; .* ids can be left out, .* 43 ids"
    )
    with pytest.raises(ValueError, match=words):
        distil(
            tmp_path,
            models.llama(vocab_size=student),
            models.llama(1, vocab_size=teacher),
            divergence="jsd",
            collator=HintCollator(WORDS, ()),
        )
    with pytest.raises(ValueError, match="with their tokenizer as processing_class, entries that"):
        distil(
            tmp_path,
            models.llama(vocab_size=student),
            models.llama(1, vocab_size=teacher),
            divergence="jsd",
            collator=models.Pad(),
            tokenizer=None,
        )
