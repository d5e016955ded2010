"""Teacher "base" of a student with adapters is the model before they were added, and stays it."""

import copy
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, KasaConfig, LoraGAConfig
from torch import nn

from hf_distill import SelfTeacher
from hf_distill.teachers import initial_adapters
from hf_distill.teachers.initial_adapters import adapters_off, trainable
from tests.hf_distill.teachers.asking import FAR, ROUNDING, SIDE, prepared, scored_logits, step
from tests.hf_distill.trainers import models

pytestmark = [
    pytest.mark.filterwarnings(models.PEFT_WARNING),
    # PEFT advises on settings that are chosen here on purpose
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.nn"),
]

QV = ["q_proj", "v_proj"]


def adapted(model: Any, **options: Any) -> Any:
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": QV} | options)
    torch.manual_seed(5)
    return get_peft_model(model, config)


def with_lora(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: adapted(model, **options)


def other(kind: str, **options: Any) -> Callable[[nn.Module], nn.Module]:
    """Adapters that are not LoRA."""

    def make(model: Any) -> Any:
        config = getattr(peft, f"{kind}Config")
        torch.manual_seed(5)
        return get_peft_model(
            model, config(**{"task_type": "CAUSAL_LM", "target_modules": QV} | options)
        )

    return make


def with_gradients(model: Any) -> Any:
    """LoRA-GA, whose start is made of gradients."""
    generator = torch.Generator().manual_seed(6)
    for layer in model.model.layers:
        for name in QV:
            linear = getattr(layer.self_attn, name)
            linear._peft_loraga_grad = torch.randn(linear.weight.shape, generator=generator)
    return adapted(model, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())


def with_covariances(model: Any) -> Any:
    """CorDA, with the decomposition that its preprocessing would leave."""
    for layer in model.model.layers:
        for name in QV:
            linear = getattr(layer.self_attn, name)
            u, s, vh = torch.linalg.svd(linear.weight.detach().float(), full_matrices=False)
            linear.eigens = SimpleNamespace(U_WC=u[:, :4], S_WC=s[:4].clone(), V_WC=vh[:4].T)
    return adapted(model, init_lora_weights="corda", corda_config=CordaConfig())


def two_active(model: Any) -> Any:
    student = adapted(model, init_lora_weights=False)
    student.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj", "q_proj"]))
    student.base_model.set_adapter(["default", "second"])
    return student


def pissa_and_a_new_one(model: Any) -> Any:
    student = adapted(model, init_lora_weights="pissa")
    student.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj", "q_proj"]))
    student.base_model.set_adapter(["default", "second"])
    return student


def injected(model: Any, **options: Any) -> Any:
    config = LoraConfig(**{"r": 4, "target_modules": QV} | options)
    torch.manual_seed(5)
    return peft.inject_adapter_in_model(config, model)


def and_the_norm(model: Any) -> Any:
    """The user trains a norm of the base with the adapters."""
    student = adapted(model)
    student.get_base_model().model.norm.weight.requires_grad_(True)
    return student


GPT2 = {"target_modules": ["c_attn"], "fan_in_fan_out": True}

# name: (how it is added, to which model)
ADAPTERS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[], nn.Module]]] = {
    "lora": (with_lora(), models.llama),
    "random start": (with_lora(init_lora_weights=False), models.llama),
    "orthogonal": (with_lora(init_lora_weights="orthogonal"), models.llama),
    "gaussian, rslora": (with_lora(init_lora_weights="gaussian", use_rslora=True), models.llama),
    "dora": (with_lora(use_dora=True), models.llama),
    "mica": (with_lora(init_lora_weights="mica"), models.llama),
    "patterns": (with_lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}), models.llama),
    "bias of the adapters": (with_lora(lora_bias=True), models.llama),
    "all biases": (with_lora(bias="all", **GPT2), models.gpt2),
    "biases of targets": (with_lora(bias="lora_only", **GPT2), models.gpt2),
    "biases and the head's": (with_lora(bias="all"), models.phi),
    "saved head": (with_lora(modules_to_save=["lm_head"]), models.llama),
    "saved head that is tied": (with_lora(modules_to_save=["lm_head"]), models.tied),
    "some tokens": (with_lora(trainable_token_indices=[5, 6]), models.llama),
    "two active": (two_active, models.llama),
    "a norm of the base": (and_the_norm, models.llama),
    "injected": (injected, models.llama),
    "injected, random start": (lambda m: injected(m, init_lora_weights=False), models.llama),
    "injected, biases": (lambda m: injected(m, bias="all", **GPT2), models.gpt2),
    "injected pissa": (lambda m: injected(m, init_lora_weights="pissa"), models.llama),
    "pissa": (with_lora(init_lora_weights="pissa"), models.llama),
    "pissa of a Conv1D": (with_lora(init_lora_weights="pissa", **GPT2), models.gpt2),
    "pissa and biases": (with_lora(init_lora_weights="pissa", bias="all", **GPT2), models.gpt2),
    "pissa_niter_4": (with_lora(init_lora_weights="pissa_niter_4"), models.llama),
    "pissa, rslora": (with_lora(init_lora_weights="pissa", use_rslora=True), models.llama),
    "pissa, saved head": (
        with_lora(init_lora_weights="pissa", modules_to_save=["lm_head"]),
        models.llama,
    ),
    "pissa, dora": (with_lora(init_lora_weights="pissa", use_dora=True), models.llama),
    "pissa beside a new one": (pissa_and_a_new_one, models.llama),
    "olora": (with_lora(init_lora_weights="olora"), models.llama),
    "lora_ga": (with_gradients, models.llama),
    "corda": (with_covariances, models.llama),
    "fourierft": (other("FourierFT", n_frequency=20), models.llama),
    "c3a": (other("C3A", block_size=8), models.llama),
    "vblora": (other("VBLoRA", vector_length=8, num_vectors=16, r=2), models.llama),
    "layer norms": (other("LNTuning", target_modules=["norm", "input_layernorm"]), models.llama),
    "ia3": (other("IA3", feedforward_modules=[]), models.llama),
}
# sums of 32 products of size 4 in a layer, written as a difference and a product: some roundings
# of 2^-24 * 4 each, which two layers make ten times larger
APART = {"rtol": 0, "atol": 1e-4}


@pytest.mark.parametrize("name", ADAPTERS)
def test_base_is_the_model_before_training(name: str) -> None:
    add, make = ADAPTERS[name]
    want = scored_logits(make())
    student = add(make()).train()
    teacher = prepared(SelfTeacher("base"), student)
    flags = {n: p.requires_grad for n, p in student.named_parameters()}
    trained = trainable(student)
    for seed in range(2):
        torch.testing.assert_close(teacher.signal(student, SIDE).dense(), want, **APART)
        before = models.weights(student)
        teacher.signal(student, SIDE)
        assert models.difference(models.weights(student), before) == 0
        step(student, seed)
    assert (scored_logits(student) - want).abs().max() > FAR
    assert {n: p.requires_grad for n, p in student.named_parameters()} == flags
    kept = teacher.state_dict()
    assert sum(x.numel() for x in kept.values()) <= sum(p.numel() for p in trained.values())
    assert all(module.training for module in student.modules())


def test_prompts_that_are_taken_out_with_the_adapters() -> None:
    add = other("AdaptionPrompt", target_modules=None, adapter_len=4, adapter_layers=2)
    student = add(models.llama())
    teacher = prepared(SelfTeacher("base"), student, "the test asks for logits")
    assert teacher.state_dict() == {}
    step(student)
    said = teacher.signal(student, SIDE).dense()
    torch.testing.assert_close(said, scored_logits(models.llama()), **ROUNDING)


@pytest.mark.parametrize("name", [name for name in ADAPTERS if "lora" in name or "pissa" in name])
def test_what_needs_no_copy_has_none(name: str) -> None:
    add, make = ADAPTERS[name]
    teacher = prepared(SelfTeacher("base"), add(make()))
    taken = any(x in name for x in ("pissa", "olora", "lora_ga", "corda"))
    assert bool(teacher.state_dict()) == taken


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "name", ["pissa", "pissa of a Conv1D", "pissa, rslora", "olora", "lora_ga", "corda"]
)
def test_a_share_of_what_was_learnt(name: str, scale: float) -> None:
    """The weights are those of the model before, and this share of the change to each."""
    add, make = ADAPTERS[name]
    student: Any = add(make())
    teacher = prepared(SelfTeacher("lora_scale", lora_scale=scale), student)
    step(student)
    plain: Any = make()
    with torch.no_grad():
        for path, module in plain.named_modules():
            layer: Any = student.get_base_model().get_submodule(path)
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                now = layer.get_base_layer().weight + cast(Any, layer).get_delta_weight("default")
                module.weight.lerp_(now, scale)
    said = teacher.signal(student, SIDE).dense()
    torch.testing.assert_close(said, scored_logits(plain), **APART)
    assert ((said - scored_logits(make())).abs().max() > FAR) == (scale > 0)


@pytest.mark.parametrize("name", ["pissa", "pissa and biases", "all biases", "injected, biases"])
def test_a_resumed_run_has_the_same_base(name: str) -> None:
    add, make = ADAPTERS[name]
    want = scored_logits(make())
    first = add(make())
    state = prepared(SelfTeacher("base"), first).state_dict()
    step(first)
    student = add(make())
    teacher = prepared(SelfTeacher("base"), student)
    student.load_state_dict(first.state_dict())
    teacher.load_state_dict(state)
    torch.testing.assert_close(teacher.signal(student, SIDE).dense(), want, **APART)


def test_a_checkpoint_of_another_start_is_an_error() -> None:
    state = prepared(SelfTeacher("base"), ADAPTERS["pissa"][0](models.llama(1))).state_dict()
    teacher = prepared(SelfTeacher("base"), ADAPTERS["pissa"][0](models.llama(0)))
    with pytest.raises(ValueError, match="as in the run that wrote the checkpoint"):
        teacher.load_state_dict(state)


def test_a_second_training_has_the_same_base() -> None:
    """The trainer prepares it again, when the adapters are no longer what they began with."""
    student = ADAPTERS["pissa"][0](models.llama())
    teacher = prepared(SelfTeacher("base"), student)
    step(student)
    prepared(teacher, student)
    want = scored_logits(models.llama())
    torch.testing.assert_close(teacher.signal(student, SIDE).dense(), want, **APART)


def trained_pissa() -> nn.Module:
    student = adapted(models.llama(), init_lora_weights="pissa")
    step(student)
    return student


def inactive_pissa() -> nn.Module:
    student = adapted(models.llama(), init_lora_weights="pissa")
    student.add_adapter("second", LoraConfig(r=2, target_modules=QV))
    student.set_adapter("second")
    return student


def pissa_switched_off() -> nn.Module:
    student = adapted(models.llama(), init_lora_weights="pissa")
    student.base_model.disable_adapter_layers()
    return student


def pissa_beside_a_trained_one() -> nn.Module:
    student: Any = pissa_and_a_new_one(models.llama())
    for name, parameter in student.named_parameters():
        if "lora_B.second" in name:
            nn.init.ones_(parameter)
    return student


def quantized() -> nn.Module:
    """Stands for LoftQ, which needs SciPy."""
    student = adapted(models.llama())
    student.peft_config["default"].init_lora_weights = "loftq"
    return student


def merged() -> nn.Module:
    student = adapted(models.llama(), init_lora_weights=False)
    student.merge_adapter()
    return student


@pytest.mark.parametrize("kind", ["base", "lora_scale"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (trained_pissa, "was trained before, and its initial values are not known"),
        (inactive_pissa, "must be active, and is not in"),
        (pissa_switched_off, "must be active, and is not in"),
        (pissa_beside_a_trained_one, "'second', which is active too, must not change"),
        (quantized, "LoftQ has quantized its weights"),
        (
            lambda: adapted(models.llama(), layer_replication=[[0, 2], [1, 2]]),
            "repeated its layers",
        ),
        (merged, "merged"),
    ],
)
def test_a_base_that_cannot_be_had_is_an_error(make: Callable, message: str, kind: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(SelfTeacher(kind), make())


def test_kasa_has_no_base() -> None:
    with pytest.raises(ValueError, match="KaSA has cut its weights' smallest singular values off"):
        prepared(SelfTeacher("base"), adapted(models.llama(), kasa_config=KasaConfig()))


@pytest.mark.parametrize("kind", ["ema", "live"])
def test_merged_adapters_are_an_error_for_every_self_teacher(kind: str) -> None:
    with pytest.raises(ValueError, match=r"call unmerge_adapter\(\) first"):
        prepared(SelfTeacher(kind), merged())


@pytest.mark.parametrize("name", ["pissa", "olora", "lora_ga", "corda", "pissa_niter_4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_known_from_a_trained_adapter(name: str, dtype: torch.dtype) -> None:
    """Also in 16 bits, where the columns of B are not quite orthogonal."""
    student = ADAPTERS[name][0](cast(nn.Module, models.llama()).to(dtype))
    prepared(SelfTeacher("base"), student)
    step(student)
    with pytest.raises(ValueError, match="was trained before"):
        prepared(SelfTeacher("base"), student)


def test_what_is_kept_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hf_distill"):
        for name in ("lora", "all biases", "pissa"):
            add, make = ADAPTERS[name]
            prepared(SelfTeacher("base"), add(make()))
    plain, biases, pissa = caplog.messages
    assert plain == "teacher base: the student with its adapters off, no extra weights"
    assert "with its adapters off, and what else is trained as it was: a copy of" in biases
    assert "{'default': 'pissa'} took out of the base's weights: a copy of 8 tensors" in pissa


def test_injected_adapters_come_back_as_they_were() -> None:
    student: Any = injected(models.llama(), init_lora_weights=False)
    want, layer = scored_logits(student), student.model.layers[0].self_attn.q_proj
    layer.enable_adapters(False)  # the user's choice
    part = scored_logits(student)
    with adapters_off(student):
        torch.testing.assert_close(
            scored_logits(student), scored_logits(models.llama()), **ROUNDING
        )
    assert layer.disable_adapters
    assert torch.equal(scored_logits(student), part)
    layer.enable_adapters(True)
    assert torch.equal(scored_logits(student), want)


def test_values_come_back_after_an_error() -> None:
    student = models.llama()
    before = copy.deepcopy(student)
    parameters = dict(student.named_parameters())
    zeros = {name: torch.zeros_like(p) for name, p in parameters.items()}
    with pytest.raises(ZeroDivisionError), initial_adapters.holding(parameters, zeros):
        print(1 // int(student.lm_head.weight.any()))
    assert models.difference(models.weights(student), models.weights(before)) == 0
