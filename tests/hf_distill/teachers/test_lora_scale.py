"""The student with weaker adapters: the base at 0, itself at 1, the scaled product between."""

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hf_distill import SelfTeacher
from tests.hf_distill.teachers.asking import FAR, IDS, PREDICTS, SIDE, prepared, scored_logits, step
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

TARGETS = {
    "linear": ["q_proj", "v_proj", "up_proj"],
    "embedding": ["embed_tokens", "q_proj"],
    "head": ["lm_head", "q_proj"],
}


@torch.no_grad()
def scaled_by_hand(student: nn.Module, scale: float) -> Tensor:
    """The logits of a plain model whose weights are base + scale * scaling * B A."""
    plain = models.llama()
    modules = dict(plain.named_modules())
    for path, layer in student.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            update = layer.get_delta_weight("default")
            modules[path].weight.add_(scale * update)
    return scored_logits(plain)


@pytest.mark.parametrize("refusal", [None, "the test asks for logits"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_the_product_is_scaled(scale: float, targets: str, refusal: str | None) -> None:
    options = {"target_modules": TARGETS[targets], "use_rslora": targets == "linear"}
    student = models.lora(models.llama(), **options).train()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_embedding_A" in name:  # it begins at zero
                parameter.normal_(0, 0.1)
    teacher = prepared(SelfTeacher("lora_scale", lora_scale=scale), student, refusal)
    step(student)
    signal = teacher.signal(student, SIDE)
    assert (signal.hidden is None) == (refusal is not None or targets == "head")
    if signal.head is not None:
        assert signal.head.weight is student.get_output_embeddings().weight
    # sums of 32 products of order 1 in another order, through two layers
    torch.testing.assert_close(signal.dense(), scaled_by_hand(student, scale), rtol=0, atol=1e-4)
    for other in {0.0, 0.3, 1.0} - {scale}:
        assert (signal.dense() - scaled_by_hand(student, other)).abs().max() > FAR
    assert student.training


def test_the_ends_are_the_base_and_the_student_bit_for_bit() -> None:
    student = models.lora(models.llama())
    signals = [
        prepared(SelfTeacher(kind, lora_scale=scale), student, "logits").signal(student, SIDE)
        for kind, scale in (("base", 0.5), ("lora_scale", 0), ("live", 0.5), ("lora_scale", 1))
    ]
    base, none, live, full = (signal.logits for signal in signals)
    assert torch.equal(base, none)
    assert torch.equal(live, full)
    assert (base - live).abs().max() > FAR


def test_scalings_come_back_as_they_were() -> None:
    """0.1 * 3 / 3 is not 0.1: dividing what was multiplied would show."""
    student = models.lora(models.llama(), lora_alpha=0.4)
    layers = [m for m in student.modules() if isinstance(m, LoraLayer)]
    layers[0].scaling["default"] = 0.7  # a user's own
    before = [dict(layer.scaling) for layer in layers]
    logits = student(input_ids=IDS).logits
    for scale in (0.3, 0.1, 0.0):
        prepared(SelfTeacher("lora_scale", lora_scale=scale), student).signal(student, SIDE)
    assert [layer.scaling for layer in layers] == before
    assert torch.equal(student(input_ids=IDS).logits, logits)


def test_the_scale_follows_a_schedule() -> None:
    student = models.lora(models.llama())
    teacher = prepared(SelfTeacher("lora_scale", lora_scale="linear:0.8->0.2@2"), student)
    for scale in (0.8, 0.5, 0.2, 0.2):
        fixed = prepared(SelfTeacher("lora_scale", lora_scale=scale), student)
        for _ in range(2):  # asking is no step
            said = teacher.signal(student, SIDE).dense()
        assert torch.equal(said, fixed.signal(student, SIDE).dense())
        teacher.update(student)


def test_the_step_is_saved_and_restored() -> None:
    student = models.lora(models.llama())
    teacher, fresh, start = (
        prepared(SelfTeacher("lora_scale", lora_scale="linear:0->1@4"), student) for _ in range(3)
    )
    for _ in range(3):
        teacher.update(student)
    assert teacher.state_dict()["step"].item() == 3
    fresh.load_state_dict(teacher.state_dict())
    said = [t.signal(student, SIDE).dense() for t in (teacher, fresh, start)]
    assert torch.equal(said[0], said[1])
    assert (said[0] - said[2]).abs().max() > FAR
    with pytest.raises(ValueError, match="'step' for lora_scale; 2 differ, the first is 'other'"):
        fresh.load_state_dict({"other": torch.zeros(())})


def adapted(**changes: Any) -> nn.Module:
    options = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    return get_peft_model(models.llama(), LoraConfig(**options | changes))


def merged() -> nn.Module:
    model = models.lora(models.llama())
    model.merge_adapter()
    return model


def ia3() -> nn.Module:
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    return get_peft_model(models.llama(), config)


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (models.llama, "got a LlamaForCausalLM"),
        (ia3, r"got IA3 \('default'\)"),
        (lambda: adapted(use_dora=True), "got DoraLinearVariant in .*q_proj"),
        (
            lambda: adapted(modules_to_save=["lm_head"]),
            r"nothing else trained.*got modules_to_save",
        ),
        (lambda: adapted(trainable_token_indices=[3, 4]), r"got trainable_token_indices \[3, 4\]"),
        (lambda: adapted(bias="lora_only"), "bias 'none', got 'lora_only'"),
        (merged, "not merged into the weights; .*q_proj is merged"),
    ],
)
def test_what_has_no_scale_is_refused(make: Any, got: str) -> None:
    with pytest.raises(
        ValueError, match=f"teacher lora_scale needs a model with plain LoRA.*{got}"
    ):
        prepared(SelfTeacher("lora_scale"), make())


def test_an_adapter_that_is_not_active_is_not_looked_at() -> None:
    model = adapted()
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    teacher = prepared(SelfTeacher("lora_scale"), model)
    assert teacher.signal(model, SIDE).dense().shape == (int(PREDICTS.sum()), models.VOCAB)
