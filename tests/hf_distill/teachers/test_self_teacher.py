"""What each teacher says, what it keeps, and that the student is left as it was."""

import logging

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from hf_distill import ModelTeacher, SelfTeacher
from hf_distill.data.sides import Side
from hf_distill.models.signals import Signal
from hf_distill.teachers import adapters_off
from tests.hf_distill.teachers.asking import (
    FAR,
    IDS,
    PREDICTS,
    ROUNDING,
    SIDE,
    prepared,
    scored_logits,
    step,
)
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

EMA_STUDENTS = {
    "llama": models.llama,
    "tied": models.tied,
    "phi": models.phi,
    "lora": lambda: models.lora(models.llama()),
    "lora on a tied model": lambda: models.lora(models.tied()),
    "lora and a saved head": lambda: models.lora(models.llama(), modules_to_save=["lm_head"]),
    "lora and saved norms": lambda: models.lora(models.llama(), modules_to_save=["norm"]),
    "lora on the head": lambda: models.lora(models.llama(), target_modules=["lm_head", "q_proj"]),
}
REFUSALS = pytest.mark.parametrize("refusal", [None, "the test asks for logits"])


@REFUSALS
def test_base_of_an_adapted_model_is_the_model_without_adapters(refusal: str | None) -> None:
    student = models.lora(models.llama())
    teacher = prepared(SelfTeacher("base"), student, refusal)
    want = scored_logits(models.llama())
    for seed in range(2):
        torch.testing.assert_close(teacher.signal(student, SIDE).dense(), want, **ROUNDING)
        step(student, seed)
        teacher.update(student)
    assert (scored_logits(student) - want).abs().max() > FAR
    assert teacher.state_dict() == {}


def test_adapters_come_back_with_the_flags_they_had() -> None:
    student = models.lora(models.llama()).train()
    frozen = [p for n, p in student.named_parameters() if "lora_A" in n and ".0." in n]
    assert frozen
    for parameter in frozen:
        parameter.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in student.named_parameters()}
    before = scored_logits(student)
    teacher = prepared(SelfTeacher("base"), student)
    teacher.signal(student, SIDE)
    assert {n: p.requires_grad for n, p in student.named_parameters()} == flags
    assert torch.equal(scored_logits(student), before)
    with pytest.raises(RuntimeError, match="inside"), adapters_off(student):
        raise RuntimeError("inside")
    assert {n: p.requires_grad for n, p in student.named_parameters()} == flags
    assert torch.equal(scored_logits(student), before)


@REFUSALS
def test_base_of_a_full_model_is_a_frozen_copy(
    refusal: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hf_distill")
    student = models.llama(attention_dropout=0.5).train()
    want = scored_logits(student)
    teacher = prepared(SelfTeacher("base"), student, refusal)
    assert "teacher base: a frozen copy, 0 MiB" in caplog.text
    for seed in range(2):
        torch.testing.assert_close(teacher.signal(student, SIDE).dense(), want, **ROUNDING)
        step(student, seed)
        teacher.update(student)
    assert (scored_logits(student) - want).abs().max() > FAR
    assert student.training
    assert all(p.requires_grad for p in student.parameters())


@REFUSALS
@pytest.mark.parametrize("family", EMA_STUDENTS)
def test_ema_is_the_average_by_hand(family: str, refusal: str | None) -> None:
    student = EMA_STUDENTS[family]()
    average = models.copied(student)
    teacher = prepared(SelfTeacher("ema", ema_decay=0.75), student, refusal)
    for seed in range(3):
        step(student, seed)
        teacher.update(student)
        with torch.no_grad():
            for mine, now in zip(average.parameters(), student.parameters(), strict=True):
                if now.requires_grad:
                    mine.copy_(0.75 * mine + 0.25 * now)
    trainable = {n: p.detach() for n, p in average.named_parameters() if p.requires_grad}
    assert teacher.state_dict().keys() == trainable.keys()
    for name, mine in trainable.items():
        # three products and sums of numbers of order 1
        torch.testing.assert_close(teacher.state_dict()[name], mine, rtol=0, atol=1e-6)
    signal = teacher.signal(student, SIDE)
    # a head that PEFT has wrapped is read by its logits
    assert (signal.hidden is None) == (refusal is not None or "head" in family)
    want = scored_logits(average)
    # the averages differ by roundings, and logits are sums over 32 of them
    torch.testing.assert_close(signal.dense(), want, rtol=0, atol=2e-5)
    assert (scored_logits(student) - want).abs().max() > FAR


def lora_scalings(model: nn.Module) -> list[dict[str, float]]:
    return [dict(m.scaling) for m in model.modules() if isinstance(m, LoraLayer)]


def test_live_follows_the_student(caplog: pytest.LogCaptureFixture) -> None:
    student = models.llama(attention_dropout=0.5).train()
    teacher = prepared(SelfTeacher("live"), student)
    assert "teacher live: a self-teacher that follows the student tends" in caplog.text
    for seed in range(2):
        signal = teacher.signal(student, SIDE)
        torch.testing.assert_close(signal.dense(), scored_logits(student), **ROUNDING)
        assert not signal.hidden.requires_grad
        step(student, seed)
    assert student.training


@pytest.mark.parametrize("kind", ["base", "ema", "live", "lora_scale"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_student_is_left_as_it_was(kind: str, fails: bool) -> None:
    student = models.lora(models.llama(attention_dropout=0.5)).train()
    teacher = prepared(SelfTeacher(kind, 0.5, 0.3), student)
    step(student)
    before = models.weights(student)
    scalings = lora_scalings(student)
    storage = {n: p.data_ptr() for n, p in student.named_parameters()}
    flags = {n: p.requires_grad for n, p in student.named_parameters()}
    adapted = scored_logits(student)
    if fails:
        wrong = Side({"input_ids": IDS + models.VOCAB}, PREDICTS)
        with pytest.raises(IndexError):
            teacher.signal(student, wrong)
    else:
        teacher.signal(student, SIDE)
    after = dict(student.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {n: p.data_ptr() for n, p in after.items()} == storage
    assert {n: p.requires_grad for n, p in after.items()} == flags
    assert lora_scalings(student) == scalings
    assert student.training
    assert torch.equal(scored_logits(student), adapted)


def test_ema_signal_survives_the_swap_back() -> None:
    student = models.phi()
    teacher = prepared(SelfTeacher("ema", 0.5), student)
    step(student)
    signal = teacher.signal(student, SIDE)
    state = teacher.state_dict()
    assert torch.equal(signal.head.weight, state["lm_head.weight"])
    assert torch.equal(signal.head.bias, state["lm_head.bias"])


def shared(signal: Signal, student: nn.Module) -> bool:
    return signal.head.weight is student.get_output_embeddings().weight


def test_only_a_head_that_is_the_students_is_shared() -> None:
    adapted = models.lora(models.llama())
    assert shared(prepared(SelfTeacher("base"), adapted).signal(adapted, SIDE), adapted)
    full = models.llama()
    assert not shared(prepared(SelfTeacher("base"), full).signal(full, SIDE), full)
    assert not shared(prepared(SelfTeacher("ema"), full).signal(full, SIDE), full)
    separate = prepared(ModelTeacher(models.llama()), full)
    assert not shared(separate.signal(full, SIDE), full)


def test_state_is_restored_and_another_is_refused() -> None:
    student = models.llama()
    teacher = prepared(SelfTeacher("ema", 0.5), student)
    step(student)
    teacher.update(student)
    saved = {name: value.clone() for name, value in teacher.state_dict().items()}
    fresh = prepared(SelfTeacher("ema", 0.5), models.llama())
    fresh.load_state_dict(saved)
    restored = fresh.state_dict()
    assert all(torch.equal(restored[name], saved[name]) for name in saved)
    step(student, 1)
    fresh.update(student)
    teacher.update(student)
    moved = teacher.state_dict()
    assert all(torch.equal(fresh.state_dict()[name], moved[name]) for name in saved)
    lacking = dict(saved)
    lacking.pop("lm_head.weight")
    with pytest.raises(ValueError, match=r"1 differ, the first is 'lm_head\.weight'"):
        fresh.load_state_dict(lacking)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("frozen",),
            r"teacher must be one of \('base', 'live', 'ema', 'lora_scale'\), got 'frozen'",
        ),
        (("ema", 1.0), r"ema_decay must be in \[0, 1\), got 1.0"),
        (("ema", -0.1), r"ema_decay must be in \[0, 1\), got -0.1"),
        (("lora_scale", 0.5, 1.1), r"lora_scale must stay in \[0, 1\], got 1.1"),
        (("lora_scale", 0.5, -0.1), r"lora_scale must stay in \[0, 1\], got -0.1"),
        (("lora_scale", 0.5, "linear:0->2@3"), r"lora_scale must stay in \[0, 1\], got linear"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfTeacher(*arguments)


def test_ema_of_16_bit_weights_moves() -> None:
    """A step of 0.005 of a difference of a twentieth is less than bfloat16 can tell."""
    student = models.llama().bfloat16()
    teacher = prepared(SelfTeacher("ema", 0.995), student)
    before = {name: p.detach().float().clone() for name, p in student.named_parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.05)
    for _ in range(100):
        teacher.update(student)
    for name, parameter in student.named_parameters():
        want = torch.lerp(before[name], parameter.detach().float(), 1 - 0.995**100)
        got = teacher.state_dict()[name]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert student.lm_head.weight.dtype == torch.bfloat16
    said = teacher.signal(student, SIDE).dense()
    assert said.dtype == torch.bfloat16
    assert student.lm_head.weight.dtype == torch.bfloat16


def test_the_distance_of_an_average() -> None:
    student = models.lora(models.llama())
    teacher = prepared(SelfTeacher("ema", 0.75), student)
    assert teacher.distance(student) == 0.0
    trained = [p for p in student.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.25)
        trained[-1][0, 1] -= 0.75  # one entry is the farthest, on the other side
    assert teacher.distance(student) == pytest.approx(0.5, abs=1e-6)
    teacher.update(student)
    assert teacher.distance(student) == pytest.approx(0.5 * 0.75, abs=1e-6)
    for kind in ("base", "live", "lora_scale"):
        assert prepared(SelfTeacher(kind), student).distance(student) is None


def test_ema_refuses_parameters_that_it_has_not_averaged() -> None:
    student = models.llama()
    student.lm_head.requires_grad_(False)
    teacher = prepared(SelfTeacher("ema", 0.5), student)
    student.lm_head.requires_grad_(True)
    message = r"same parameters must be trained .* 1 differ, the first is 'lm_head\.weight'"
    for ask in (
        teacher.update,
        teacher.distance,
        lambda model: teacher.signal(model, SIDE),
    ):
        with pytest.raises(ValueError, match=message):
            ask(student)
