"""Messages with images: what a processor makes of both sides of a batch, and what is refused."""

import pickle
from typing import Any, cast

import pytest
import torch
from transformers import PaliGemmaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from hf_distill import Hint, HintCollator
from hf_distill.data.alignment import AlignmentError
from hf_distill.data.cross_tokenizer_collator import CrossTokenizerCollator
from hf_distill.data.processor_inputs import join_images
from tests.hf_distill.data.image_processors import part, processor, rows

WHERE = {
    "user": lambda told: [{"role": "user", "content": told}],
    "system": lambda told: [
        {"role": "system", "content": "yes"},
        {"role": "user", "content": told},
    ],
    "before": lambda told: [{"role": "user", "content": "yes"}, {"role": "user", "content": told}],
    "after": lambda told: [{"role": "user", "content": told}, {"role": "user", "content": "yes"}],
}


@pytest.mark.parametrize("kind", ["qwen2_vl", "gemma3", "idefics3"])
@pytest.mark.parametrize("where", WHERE)
def test_both_sides_are_what_the_processor_makes(kind: str, where: str) -> None:
    made, given = processor(kind), rows()[:2]
    batch = HintCollator(made, Hint(lambda _: "yes", where))(given)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    own, told = [], []
    for row in given:
        content = row["prompt"][0]["content"]
        hint = [{"type": "text", "text": "\n\nyes"}] if where == "user" else []
        own.append([*row["prompt"], *row["completion"]])
        told.append([*WHERE[where]([*content, *hint]), *row["completion"]])
    student, teacher = (made.apply_chat_template(x, **options) for x in (own, told))
    for name, value in student.items():
        assert torch.equal(batch[name], value), name
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        assert (name in teacher) == (f"teacher_{name}" in batch)
        assert name not in teacher or torch.equal(batch[f"teacher_{name}"], teacher[name])
    scored = [x[x != -100].tolist() for x in batch["labels"]]
    index = batch["teacher_completion_index"]
    pairs = zip(batch["teacher_input_ids"], index, strict=True)
    assert scored == [ids[at[at >= 0]].tolist() for ids, at in pairs]


def test_images_are_processed_once_a_batch() -> None:
    made, counted = processor("qwen2_vl"), []
    process = made.image_processor

    class Counting(type(process)):
        def __call__(self, images: Any, **kwargs: Any) -> Any:
            counted.append(images)
            return super().__call__(images, **kwargs)

    made.image_processor = Counting(patch_size=4, merge_size=2, min_pixels=64, max_pixels=512)
    HintCollator(made)(rows())
    assert len(counted) == 2  # rows with images; the same images in other messages are the same


def test_a_collator_can_be_sent_to_a_worker() -> None:
    collator = HintCollator(processor("llava"))
    wanted, found = collator(rows()), pickle.loads(pickle.dumps(collator))(rows())
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_parts_filled_up_by_a_dataset_are_the_same() -> None:
    row = rows()[1]
    (message,) = row["prompt"]
    filled = [{"image": None, "url": None, "text": None} | x for x in message["content"]]
    collator = HintCollator(processor("gemma3"))
    wanted = collator([row])
    found = collator([row | {"prompt": [message | {"content": filled}]}])
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_images_of_other_sizes_are_padded_with_zeros() -> None:
    one, other = torch.ones(1, 2, 3, 4, 4), torch.ones(1, 1, 3, 2, 6)
    found = join_images([{"pixel_values": one}, {}, {"pixel_values": other}])["pixel_values"]
    assert found.shape == (2, 2, 3, 4, 6)
    assert torch.equal(found[0, ..., :4], one[0])
    assert torch.equal(found[1, :1, :, :2], other[0])
    assert float(found.sum()) == one.numel() + other.numel()


def of_paligemma() -> HintCollator:
    tokenizer, images = processor("llava").tokenizer, cast(Any, SiglipImageProcessorPil())
    images.image_seq_length = 4
    return HintCollator(PaliGemmaProcessor(images, tokenizer, chat_template="{{ messages }}"))


def without_template() -> HintCollator:
    made = processor("llava")
    made.chat_template = None
    return HintCollator(made)


def with_content(*content: Any, **columns: Any) -> Any:
    row = rows()[1] | columns
    row["prompt"] = [{"role": "user", "content": list(content)}]
    return HintCollator(processor("llava"))([row])


REFUSED = {
    "packing": (lambda: HintCollator(processor("llava"), packing=True), "packing must be False"),
    "a reference": (
        lambda: HintCollator(processor("llava"), teacher_sees="reference"),
        "teacher_sees must be 'prompt', got 'reference'",
    ),
    "a contrast": (
        lambda: HintCollator(processor("llava"), contrast=Hint("wrong")),
        "contrast must be .*got",
    ),
    "contexts alone": (lambda: HintCollator(processor("llava")).contexts(rows()), "use `prompts`"),
    "two tokenizers": (
        lambda: CrossTokenizerCollator(processor("llava"), processor("llava").tokenizer),
        "no images, got a processor",
    ),
    "a PaliGemma": (of_paligemma, "reads its prompt both ways .* got a PaliGemmaProcessor"),
    "no template": (without_template, "needs a chat template, this LlavaProcessor has none"),
    "no image in a part": (lambda: with_content({"type": "image"}), "row 0.*must be in its part"),
    "a video": (lambda: with_content({"type": "video", "video": "x"}), "got type 'video'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_teacher_that_sees_fewer_images_is_refused() -> None:
    collator = HintCollator(processor("llava"), teacher_system_prompt="yes")
    row = rows()[1]
    row["prompt"] = [{"role": "system", "content": [part("red")]}, *row["prompt"]]
    with pytest.raises(AlignmentError, match=r"row 0 has 32 tokens .* student, 16 for the teacher"):
        collator([row])
