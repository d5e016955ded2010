"""A teacher that has parameters or modules in common with the student."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from hf_distill import DistillConfig, DistillTrainer, ModelTeacher, RoutedTeacher
from tests.hf_distill.teachers.asking import ROUNDING, SIDE, prepared
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)


def adapters(model: nn.Module, name: str = "default", target: str = "q_proj") -> PeftModel:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=[target])
    return cast(PeftModel, get_peft_model(cast(Any, model), config, adapter_name=name))


def cut_out() -> tuple[Any, Any]:
    """A student of some of its teacher's own layers."""
    teacher, student = models.llama(1, num_hidden_layers=3), models.llama(0)
    student.model.layers = nn.ModuleList([teacher.model.layers[0], teacher.model.layers[2]])
    layers: Any = student.model.layers
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    return teacher, student


def inside_adapters() -> tuple[Any, Any]:
    student = adapters(models.llama(0))
    return student.get_base_model(), student


def two_wrappers() -> tuple[Any, Any]:
    model = models.llama(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT: a second time
        return adapters(model, "one"), adapters(model, "other", "v_proj")


def tied_embeddings() -> tuple[Any, Any]:
    teacher, student = models.llama(1), models.llama(0)
    student.set_input_embeddings(teacher.get_input_embeddings())
    return teacher, student


def one_tensor() -> tuple[Any, Any]:
    teacher, student = models.llama(1), models.llama(0)
    student.lm_head.weight = teacher.lm_head.weight
    return teacher, student


def assigned() -> tuple[Any, Any]:
    """Other parameters, of the same memory."""
    teacher, student = models.llama(1), models.llama(0)
    student.load_state_dict(teacher.state_dict(), assign=True)
    return teacher, student.requires_grad_(True)


def a_slice() -> tuple[Any, Any]:
    teacher, student = models.llama(1), models.llama(0, vocab_size=models.VOCAB - 1)
    student.lm_head.weight = nn.Parameter(teacher.lm_head.weight.data[1:])
    return teacher, student


SHARING = {
    cut_out: "model.layers.0.self_attn.q_proj.weight",
    inside_adapters: "model.layers.0.self_attn.q_proj.lora_A.default.weight",
    two_wrappers: "base_model.model.model.layers.0.self_attn.q_proj.lora_A.one.weight",
    tied_embeddings: "model.embed_tokens.weight",
    one_tensor: "lm_head.weight",
    assigned: "model.embed_tokens.weight",
    a_slice: "lm_head.weight",
}


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("make", SHARING)
def test_what_the_student_trains_is_not_its_teachers(make: Callable, routed: bool) -> None:
    teacher, student = make()
    flags = {name: p.requires_grad for name, p in student.named_parameters()}
    modes = {name: module.training for name, module in student.train().named_modules()}
    made = RoutedTeacher({"a": teacher}, "who") if routed else ModelTeacher(teacher)
    with pytest.raises(ValueError, match="must not share parameters") as error:
        prepared(made, student)
    assert f"the first is {SHARING[make]!r}" in str(error.value)
    assert "copy.deepcopy" in str(error.value)
    assert {name: p.requires_grad for name, p in student.named_parameters()} == flags
    assert {name: module.training for name, module in student.named_modules()} == modes


def test_two_views_of_a_buffer_that_do_not_overlap_are_not_shared() -> None:
    teacher, student = models.llama(1), models.llama(0)
    whole = torch.randn(2, *teacher.lm_head.weight.shape)
    for model, part in ((teacher, whole[0]), (student, whole[1])):
        model.lm_head.weight = nn.Parameter(part)
    prepared(ModelTeacher(teacher), student)


def frozen_embeddings() -> tuple[Any, Any]:
    teacher, student = tied_embeddings()
    student.get_input_embeddings().requires_grad_(False)
    return teacher, student


def frozen_layers() -> tuple[Any, Any]:
    """Their attention has dropout, which the student keeps and the teacher does not have."""
    teacher, student = cut_out()
    for layer in teacher.model.layers:
        layer.self_attn.attention_dropout = 0.5
    student.model.layers.requires_grad_(False)
    return teacher, student


def frozen_base() -> tuple[Any, Any]:
    """Adapters over weights that the teacher has too."""
    teacher, student = models.llama(1), models.llama(1)
    for own, other in zip(teacher.parameters(), list(student.named_parameters()), strict=True):
        path, _, name = other[0].rpartition(".")
        setattr(student.get_submodule(path), name, own)
    return teacher, adapters(student)


@pytest.mark.parametrize("make", [frozen_embeddings, frozen_layers, frozen_base])
def test_what_is_frozen_may_be_shared(make: Callable, tmp_path: Path) -> None:
    teacher, student = make()
    alone = prepared(ModelTeacher(copy.deepcopy(teacher)), models.llama()).signal(student, SIDE)
    before = models.weights(student)
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    config = DistillConfig(**models.options(tmp_path, learning_rate=0.1))
    trainer = DistillTrainer(student, config, models.Pad(), models.rows(), teacher=teacher)
    trainer.train()
    after = models.weights(student)
    assert [name for name in after if not torch.equal(after[name], before[name])] == trained
    student.train()
    assert trainer.teacher is not None
    said = trainer.teacher.signal(student, SIDE).dense()
    torch.testing.assert_close(said, alone.dense(), **ROUNDING)
    assert all(module.training for module in student.modules())
    assert not any(p.requires_grad for n, p in teacher.named_parameters() if n not in trained)


def test_the_students_dropout_stays_on_in_layers_of_the_teacher() -> None:
    teacher, student = frozen_layers()
    prepared(ModelTeacher(teacher), student.train()).signal(student, SIDE)
    one, other = (student(input_ids=SIDE.inputs["input_ids"]).logits for _ in range(2))
    assert not torch.equal(one, other)
