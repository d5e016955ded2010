"""A model as the teacher: frozen, of any dtype, loaded by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hf_distill import ModelTeacher
from hf_distill.losses import DivergenceLoss, Terms, Tokens
from hf_distill.models.forward import Reader
from hf_distill.models.signals import Signal
from hf_distill.teachers import model
from metal_ops import DivergenceSpec
from metal_ops.backends.blocks import sizes
from tests.hf_distill.teachers.asking import IDS, PREDICTS, ROUNDING, SIDE, prepared, scored_logits
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)


def test_a_model_teacher_is_frozen_and_has_no_dropout() -> None:
    teacher_model = models.llama(1, attention_dropout=0.9).train()
    student = models.llama()
    teacher = prepared(ModelTeacher(teacher_model), student)
    first, second = (teacher.signal(student, SIDE).dense() for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, scored_logits(models.llama(1)), **ROUNDING)
    assert not any(p.requires_grad for p in teacher_model.parameters())
    assert teacher.state_dict() == {}


def test_a_model_teacher_from_a_folder(tmp_path) -> None:
    models.llama(1).save_pretrained(tmp_path)
    teacher = prepared(ModelTeacher(str(tmp_path)), models.llama())
    signal = teacher.signal(models.llama(), SIDE)
    torch.testing.assert_close(signal.dense(), scored_logits(models.llama(1)), **ROUNDING)


def test_a_name_is_loaded_in_a_dtype(tmp_path: Path) -> None:
    models.llama(1).save_pretrained(tmp_path)
    for dtype in ("bfloat16", torch.bfloat16):
        teacher = ModelTeacher(str(tmp_path), dtype=dtype)
        assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in ModelTeacher(str(tmp_path)).model.parameters()} == {torch.float32}


TARGETS = IDS[:, 1:][PREDICTS[:, :-1]]
WEIGHTS = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25])


def dense_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Half of the forward KL at temperature 2, half of the cross-entropy, in float64."""
    log_q, log_p = ((x.double() / 2).log_softmax(-1) for x in (student, teacher))
    soft = (log_p.exp() * (log_p - log_q)).sum(-1)
    hard = F.cross_entropy(student.double(), TARGETS, reduction="none")
    return (WEIGHTS.double() * (soft + hard) / 2).sum()


@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("refusal", [None, "the test asks for logits"])
def test_a_teacher_in_16_bit_beside_a_student_in_32(
    refusal: str | None, product: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the head's product in float32, and rounded to bfloat16, as on CPUs that have it."""
    known = {"architecture": "x86_64", "avx512_bf16": product == torch.bfloat16}
    monkeypatch.setattr(sizes, "_capabilities", lambda: known)
    student = models.llama()
    teacher = prepared(ModelTeacher(models.llama(1).bfloat16()), student, refusal)
    signal = teacher.signal(student, SIDE)
    if refusal is None:
        assert signal.hidden.dtype == signal.head.weight.dtype == torch.bfloat16
        said = (signal.hidden.to(product) @ signal.head.weight.to(product).T).double()
    else:
        assert signal.logits.dtype == torch.bfloat16
        said = signal.logits.double()
    torch.testing.assert_close(said.float(), scored_logits(models.llama(1)), rtol=0, atol=0.1)
    want = dense_loss(student(input_ids=IDS).logits[PREDICTS], said)
    (expected,) = torch.autograd.grad(want, student.lm_head.weight)

    loss, reader = DivergenceLoss(DivergenceSpec("forward_kl", temperature=2.0), 0.5), Reader("s")
    assert reader.reads_hidden(student, SIDE.inputs)

    def read(mine: Signal) -> Terms:
        assert (mine.hidden is None) == (refusal is not None)
        return loss(mine, signal, Tokens(TARGETS, WEIGHTS))

    terms = reader.run(student, SIDE, read, at_head=refusal is None)
    (gradient,) = torch.autograd.grad(terms.loss, student.lm_head.weight)
    # 16 eps of float32, of sums of 61 terms with logits up to 2; the teacher's 16 bits are in both
    torch.testing.assert_close(terms.loss.double(), want, rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=2e-6)
    assert expected.abs().max() > 1e-2
    exact = dense_loss(student(input_ids=IDS).logits[PREDICTS], scored_logits(models.llama(1)))
    assert abs(exact - want) > 1e-5  # a teacher in float32 would show


class Loaded:
    """In place of `from_pretrained`: keeps the arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arguments: dict[str, Any] = {}
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", self)

    def __call__(self, name: str, **kwargs: Any) -> nn.Module:
        self.arguments = {"name": name, **kwargs}
        return models.llama(1)


def test_quantization_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Loaded(monkeypatch)
    monkeypatch.setattr(model, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match="'4bit' needs the package bitsandbytes: pip install"):
        ModelTeacher("some/model", quantization="4bit")
    assert not loaded.arguments


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_arguments_of_loading(monkeypatch: pytest.MonkeyPatch, dtype: str | None) -> None:
    loaded = Loaded(monkeypatch)
    monkeypatch.setattr(model, "is_bitsandbytes_available", lambda: True)
    own = {} if dtype is None else {"dtype": torch.float16}
    ModelTeacher("some/model", dtype, revision="main")
    assert loaded.arguments == {"name": "some/model", "revision": "main", **own}
    ModelTeacher("some/model", dtype, quantization="4bit")
    config = loaded.arguments.pop("quantization_config")
    assert loaded.arguments == {"name": "some/model", **own}
    assert (config.load_in_4bit, config.load_in_8bit) == (True, False)
    assert config.bnb_4bit_compute_dtype == (torch.bfloat16 if dtype is None else torch.float16)
    ModelTeacher("some/model", dtype, quantization="8bit")
    config = loaded.arguments["quantization_config"]
    assert (config.load_in_4bit, config.load_in_8bit) == (False, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"dtype": "int8"},
            "dtype must be a floating-point dtype of torch or its name, got 'int8'",
        ),
        ({"dtype": "half_precision"}, "dtype must be .* got 'half_precision'"),
        ({"quantization": "2bit"}, r"quantization must be one of \('8bit', '4bit'\), got '2bit'"),
    ],
)
def test_unknown_arguments_of_loading(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelTeacher("some/model", **arguments)


@pytest.mark.parametrize("name", ["dtype", "quantization", "revision"])
def test_a_model_is_taken_as_it_is(name: str) -> None:
    message = f"{name} is for a teacher given by name; a LlamaForCausalLM is taken as it is"
    with pytest.raises(ValueError, match=message):
        ModelTeacher(models.llama(), **{name: "bfloat16"})
