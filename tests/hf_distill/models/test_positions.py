"""Rows are read as they are alone, whatever way a model counts positions and on whatever side."""

import copy
import logging
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_distill.data.sides import Side
from hf_distill.models.forward import Reader
from hf_distill.models.layers import LayerWatcher
from hf_distill.models.positions import positions_of
from tests.hf_distill.models import numbering
from tests.hf_distill.trainers import models

# float32 and two layers: sums of some 50 products in another order; measured at most 2e-6 of the
# largest logit, which is up to 40
TOLERANCE = 1e-5


def read(model: nn.Module, batch: dict[str, Tensor], reader: Reader | None = None) -> list[Tensor]:
    """Logits of each row's tokens, by the product's reader."""
    everywhere = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    with torch.no_grad():
        reader = reader or Reader("student")
        logits = reader.logits(model, Side(batch, everywhere)).view(*everywhere.shape, -1)
    return [row[keep] for row, keep in zip(logits, batch["attention_mask"].bool(), strict=True)]


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference, in units of the largest logit."""
    pairs = list(zip(found, wanted, strict=True))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("fill", [0, 1, 7])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", numbering.FAMILIES)
def test_rows_are_read_as_they_are_alone(family: str, side: str, fill: int) -> None:
    model, batch = numbering.make(family), numbering.batch(side, fill)
    if family in numbering.NEITHER and side == "left":
        with pytest.raises(ValueError, match=r"student: a .* padded on the left .*padding_side='r"):
            read(model, batch)
        return
    assert apart(read(model, batch), numbering.alone(model, batch)) < TOLERANCE


@pytest.mark.parametrize("family", numbering.FAMILIES)
def test_only_a_later_batch_is_padded_on_the_left(family: str) -> None:
    model, reader = numbering.make(family), Reader("teacher")
    whole = {k: x[:1] for k, x in numbering.batch("right").items()}
    assert apart(read(model, whole, reader), numbering.alone(model, whole)) < TOLERANCE
    left = numbering.batch("left")
    if family in numbering.NEITHER:
        with pytest.raises(ValueError, match="teacher: a "):
            read(model, left, reader)
    else:
        assert apart(read(model, left, reader), numbering.alone(model, left)) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "roberta", "bart"])
def test_without_padding_on_the_left_the_models_own_are_kept_to_the_bit(family: str) -> None:
    """Masks that number packed texts or have holes, and positions of the batch's own."""
    model, batch = numbering.make(family), numbering.batch("right")
    mask = batch["attention_mask"]
    packed, holes = mask.clone(), mask.clone()
    packed[:, 4:] *= 2
    holes[0, 5], holes[1, 3] = 0, 0
    block = torch.ones(13, 13).tril().bool()[None, None].expand(3, 1, 13, 13)
    cases = [{"attention_mask": x} for x in (mask, packed, holes)] + [{}]
    if family in ("llama", "gpt2"):
        own = {"position_ids": torch.arange(3, 16)[None].expand(3, 13)}
        cases += [{"attention_mask": block}, {"attention_mask": mask} | own, own]
    everywhere = torch.ones_like(mask, dtype=torch.bool)
    for case in cases:
        inputs = {"input_ids": batch["input_ids"], **case}
        with torch.no_grad():
            want = model(**inputs).logits[everywhere]
            assert torch.equal(Reader("student").logits(model, Side(inputs, everywhere)), want)


def test_a_packed_row_may_be_padded_on_the_left() -> None:
    model, batch = numbering.make("gpt2"), numbering.batch("left")
    batch["attention_mask"][:, -4:] *= 2
    assert apart(read(model, batch), numbering.alone(model, batch)) < TOLERANCE


def hunyuan() -> nn.Module:
    """Scales its queries behind the rotary positions, by what is 1 everywhere at the start."""
    torch.manual_seed(0)
    sizes = numbering.SIZES | {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    return hf.HunYuanDenseV1ForCausalLM(hf.HunYuanDenseV1Config(**sizes)).eval()


@pytest.mark.parametrize(
    "make", [hunyuan, lambda: numbering.make("llama")], ids=["hunyuan", "llama"]
)
def test_gradients_of_rows_that_are_padded_on_the_left(make: Any) -> None:
    """Logits alone do not tell that a scale's gradient depends on where the row stands."""
    found = []
    for side in ("left", "right"):
        model, batch = make(), numbering.batch(side)
        everywhere = torch.ones_like(batch["input_ids"], dtype=torch.bool)
        logits = (
            Reader("student").logits(model, Side(batch, everywhere)).view(*everywhere.shape, -1)
        )
        logits[batch["attention_mask"].bool()].square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for left, right in zip(*found, strict=True):
        # sums of some 30 tokens in another order
        assert float((left - right).abs().max()) <= 1e-4 * float(right.abs().max())


def test_a_model_that_no_padding_suits() -> None:
    """ProphetNet's second stream depends on the width of the batch."""
    torch.manual_seed(0)
    sizes = numbering.COMMON | {"hidden_size": 32, "num_decoder_layers": 2, "dropout": 0.0}
    config = hf.ProphetNetConfig(
        **sizes,
        decoder_ffn_dim=48,
        num_decoder_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.3,
        is_decoder=True,
        is_encoder_decoder=False,
        add_cross_attention=False,
    )
    model = hf.ProphetNetForCausalLM(config).eval()
    for side in ("right", "left"):
        with pytest.raises(ValueError, match=r"student: a ProphetNetFor.* rows of one length"):
            read(model, numbering.batch(side))
    whole = {k: x[:1] for k, x in numbering.batch("right").items()}
    assert apart(read(model, whole), numbering.alone(model, whole)) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bart"])
def test_rows_without_tokens_do_not_matter(family: str) -> None:
    """An empty first row, a first row of one token, and columns where all is padding."""
    model, batch = numbering.make(family), numbering.batch("right", width=16)
    batch["attention_mask"][0] = 0
    batch["attention_mask"][1, 1:] = 0
    found, want = read(model, batch), numbering.alone(model, batch)[2:]
    assert apart(found[2:], want) < TOLERANCE
    nothing = {k: x[:1] for k, x in batch.items()}
    assert read(numbering.make(family), nothing)[0].shape[0] == 0


@pytest.mark.parametrize("family", ["roberta", "xmod", "gpt2"])
def test_the_paddings_id_in_a_text(family: str) -> None:
    """By it the model counts no position: the row alone has none there either."""
    model, pad = numbering.make(family), 1
    for side in ("right", "left"):
        batch = numbering.batch(side)
        for i, row in enumerate(batch["attention_mask"]):
            batch["input_ids"][i, int(row.argmax()) + 2] = pad
        assert apart(read(model, batch), numbering.alone(model, batch)) < TOLERANCE


QWEN = {
    "Qwen2VL": {"embed_dim": 32, "mlp_ratio": 2},
    "Qwen2_5_VL": {
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [0],
    },
    "Qwen3VL": {
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
}
IMAGE = 90
VISION = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}


def qwen(name: str) -> Any:
    torch.manual_seed(0)
    vision = VISION | {"temporal_patch_size": 2, "hidden_size": 32} | QWEN[name]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = numbering.SIZES | {"num_key_value_heads": 2, "rope_parameters": rope}
    tokens = {"image_token_id": IMAGE, "video_token_id": 91}
    around = {"vision_start_token_id": 92, "vision_end_token_id": 93}
    config = getattr(hf, f"{name}Config")(
        text_config=text, vision_config=vision, **tokens, **around
    )
    model = getattr(hf, f"{name}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and 0 < float(parameter.std()) < 0.25:
                parameter.mul_(0.25 / parameter.std())
    return model


def with_images(side: str) -> dict[str, Tensor]:
    """Two rows with an image each; the second is shorter."""
    texts = [[5, 6, 92, *[IMAGE] * 4, 93, 10, 11, 12, 13], [92, *[IMAGE] * 4, 93, 14, 15]]
    gap = [0] * 4
    second = [*texts[1], *gap] if side == "right" else [*gap, *texts[1]]
    ids = torch.tensor([texts[0], second])
    torch.manual_seed(0)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.randn(32, 96),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


@pytest.mark.parametrize("first", ["image", "text"])
@pytest.mark.parametrize("name", QWEN)
def test_images_are_read_at_the_models_own_positions(name: str, first: str) -> None:
    model, reader = qwen(name), Reader("student")
    if first == "text":
        read(model, numbering.batch("left"), reader)
    found = {}
    for side in ("right", "left"):
        batch = with_images(side)
        found[side] = read(model, batch, reader)
        with torch.no_grad():
            own = model(**batch).logits
        keep = batch["attention_mask"].bool()
        want = [row[real] for row, real in zip(own, keep, strict=True)]
        assert apart(found[side], want) < TOLERANCE
    assert apart(found["left"], found["right"]) < TOLERANCE


def gemma3() -> Any:
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    text = numbering.SIZES | {"num_key_value_heads": 2, "head_dim": 8}
    config = hf.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=IMAGE
    )
    return hf.Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("first", ["image", "text"])
def test_a_model_whose_images_see_both_ways(first: str) -> None:
    model, reader, batch = gemma3(), Reader("student"), with_images("right")
    if first == "text":
        read(model, numbering.batch("left"), reader)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    inputs |= {"pixel_values": torch.randn(2, 3, 16, 16)}
    inputs |= {"token_type_ids": batch["mm_token_type_ids"]}
    found = read(model, inputs, reader)
    with torch.no_grad():
        own = model(**inputs).logits
    keep = batch["attention_mask"].bool()
    assert apart(found, [row[real] for row, real in zip(own, keep, strict=True)]) < TOLERANCE


class NoWaiting(TorchFunctionMode):
    """Whatever would wait for a device is an error."""

    WAITS = (Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.nonzero)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.WAITS, func
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "roberta"])
def test_a_step_does_not_wait_for_the_device(family: str) -> None:
    model, reader, batch = numbering.make(family), Reader("student"), numbering.batch("left")
    read(model, batch, reader)
    with NoWaiting():
        reader.forward_inputs(model, batch)


def test_the_decision_is_one_for_all_readers_of_a_model(caplog: Any) -> None:
    model = numbering.make("gpt2")
    with caplog.at_level(logging.INFO, "hf_distill.models.positions"):
        for name in ("student", "teacher", "student"):
            read(model, numbering.batch("left"), Reader(name))
    (text,) = [record.getMessage() for record in caplog.records]
    assert text.startswith("student: positions are counted from each row's first token, because")
    copied = copy.deepcopy(model)
    assert positions_of(copied) is not positions_of(model)


def test_trying_out_leaves_no_trace() -> None:
    model, state = numbering.make("gpt2").train(), torch.get_rng_state()
    names = set(model.__dict__)
    Reader("student").forward_inputs(model, numbering.batch("left"))
    assert model.training
    assert set(model.__dict__) == names
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_watched_layers_do_not_see_the_trials() -> None:
    model, batch, reader = numbering.make("gpt2"), numbering.batch("left"), Reader("student")
    reader.watch = LayerWatcher("student", [1, 2])
    predicts = batch["attention_mask"].bool()
    states = reader.signal(model, Side(batch, predicts)).states
    assert [x.shape for x in states.hidden] == [(int(predicts.sum()), 32)] * 2


def test_rows_of_embeddings() -> None:
    for family in ("gpt2", "roberta"):
        model, batch = numbering.make(family), numbering.batch("left")
        embed: Any = model.get_input_embeddings()
        with torch.no_grad():
            rows = {"inputs_embeds": embed(batch["input_ids"])}
            rows |= {"attention_mask": batch["attention_mask"]}
            inputs = Reader("student").forward_inputs(model, rows)
            logits = model(**inputs).logits
        keep = batch["attention_mask"].bool()
        found = [row[real] for row, real in zip(logits, keep, strict=True)]
        assert apart(found, numbering.alone(model, batch)) < TOLERANCE


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta"])
def test_sixteen_bits_do_not_hide_what_padding_does(family: str) -> None:
    """Also one column of padding, which moves a row by one position."""
    model = numbering.make(family)
    coarse = copy.deepcopy(model).to(torch.bfloat16)
    batch = {k: x[:2] for k, x in numbering.batch("left", width=14).items()}
    # 8 bits of mantissa through two layers; one position off is 0.3 and more
    assert apart([x.float() for x in read(coarse, batch)], numbering.alone(model, batch)) < 0.06


@pytest.mark.filterwarnings(models.PEFT_WARNING, "ignore:`past_key_values` is dep:FutureWarning")
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
def test_virtual_tokens_are_not_positions(kind: Any, family: str, side: str) -> None:
    """Teachers may have them; those before padding stand at another distance from the text."""
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(numbering.make(family), config).eval()
    batch = numbering.batch(side)
    if side == "left" and kind is PromptTuningConfig and family != "opt":
        with pytest.raises(ValueError, match="padded on the left"):
            Reader("teacher").forward_inputs(model, batch)
        return
    inputs = Reader("teacher").forward_inputs(model, batch)
    with torch.no_grad():
        logits = model(**inputs).logits[:, -batch["input_ids"].shape[1] :]
    keep = batch["attention_mask"].bool()
    found = [row[real] for row, real in zip(logits, keep, strict=True)]
    pairs = zip(numbering.alone(model, batch), found, strict=True)
    assert apart(found, [x[-len(y) :] for x, y in pairs]) < TOLERANCE


class SharedRounding(nn.Linear):
    """Inputs are rounded by what the whole batch is, as those of some quantized layers are."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().mean() / 50
        return super().forward((x / scale).round() * scale)


@pytest.mark.parametrize("family", ["llama", "xglm"])
def test_rounding_that_a_batch_shares_is_no_reason(family: str) -> None:
    model = numbering.make(family)
    for module in model.modules():
        if type(module) is nn.Linear and module.out_features != numbering.VOCAB:
            module.__class__ = SharedRounding
    errors = {}
    for side in ("right", "left"):
        batch = numbering.batch(side)
        errors[side] = apart(read(model, batch), numbering.alone(model, batch))
    assert errors["right"] > 1e-3  # a row depends on those beside it
    assert errors["left"] < 3 * errors["right"]
