"""Image features that are kept for a step: when they are used again, and when not."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from hf_distill.models.shared_images import FEATURES, SharedImages
from tests.hf_distill.trainers import image_models, models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)


def test_the_same_images_only_are_used_again() -> None:
    lm = image_models.model("llava").requires_grad_(False)
    batch = image_models.Processed("llava")(image_models.rows("llava"))
    labels = batch.pop("labels")
    shared, calls = SharedImages(lm), []
    hook = lm.model.vision_tower.register_forward_hook(lambda *_: calls.append(labels))
    with shared.kept():
        first, again = lm(**batch).logits, lm(**batch).logits
        assert len(calls) == shared.num_shared == 1
        assert torch.equal(first, again)
        with shared.kept():  # an inner block is the outer one
            lm(**batch)
        assert len(calls) == 1
        lm(**batch | {"pixel_values": batch["pixel_values"].clone()})
        assert len(calls) == 2
        lm(**batch)
        assert len(calls) == 3
        batch["pixel_values"].mul_(2)
        assert not torch.equal(lm(**batch).logits, first)
        assert len(calls) == 4
        with torch.autocast("cpu", torch.bfloat16):
            lm(**batch)
        assert len(calls) == 5
    hook.remove()
    assert FEATURES not in vars(lm.model)
    lm.model.multi_modal_projector.linear_1.weight.requires_grad_(True)
    assert not shared.can_be_shared


def test_adapters_of_the_tower_may_be_off_for_one_side() -> None:
    lm = image_models.model("llava")
    get_peft_model(lm, LoraConfig(target_modules=r".*vision.*q_proj")).requires_grad_(False)
    assert not SharedImages(lm).can_be_shared


def test_a_parameter_of_the_model_itself_is_looked_at() -> None:
    """LLaVA-NeXT's, which ends the rows of patches, has a gradient from the student's forward."""
    sizes = image_models.model("llava").config.to_dict()
    names = ("text_config", "vision_config", "image_token_index", "vision_feature_select_strategy")
    lm = LlavaNextForConditionalGeneration(LlavaNextConfig(**{x: sizes[x] for x in names}))
    lm.requires_grad_(False)
    assert SharedImages(lm).can_be_shared
    lm.model.image_newline.requires_grad_(True)
    assert not SharedImages(lm).can_be_shared


def test_a_text_model_has_none() -> None:
    assert not SharedImages(models.llama()).can_be_shared
