"""Tiny processors of image-text models, built from parts, and rows with images for them."""

from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AddedToken,
    Gemma3Processor,
    Idefics3Processor,
    InternVLProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.hf_distill.trainers.image_models import IMAGE, PATCH, SIDE

VOCAB = 61
TEXT = (
    "<pad> <s> <|im_end|> <|im_start|> <unk> system user assistant What is red blue green the "
    "colour of ? Hint : answer yes no 1 2 3 . this and these same"
)
WORDS = TEXT.split()
SPECIAL = {
    "image_token": "<image>",
    "boi_token": "<begin>",
    "eoi_token": "<end>",
    "video_token": "<video>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
ALIKE = {
    "context_image_token": "<image>",
    "start_image_token": "<begin>",
    "end_image_token": "<end>",
    "vision_start_token": "<begin>",
    "vision_end_token": "<end>",
}
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}{{ ' IMAGE ' }}{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)
ONE_SIZE = {"height": SIDE, "width": SIDE}
LONGEST = {"longest_edge": SIDE}


def tokenizer() -> PreTrainedTokenizerFast:
    """One id a word; <image> is that of `image_models`, and those behind it stand around one."""
    special = {IMAGE + i: token for i, token in enumerate(SPECIAL.values())}
    words = [*WORDS, *(f"w{i}" for i in range(len(WORDS), VOCAB))]
    vocab = {special.get(i, word): i for i, word in enumerate(words)}
    made = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, extra_special_tokens=SPECIAL | ALIKE, **ends
    )
    added = [AddedToken(token, normalized=False, special=True) for token in SPECIAL.values()]
    fast.add_special_tokens({"additional_special_tokens": added})
    return fast


def _without_videos(kind: Any) -> Any:
    """The processor's class, which takes no processor of videos: that needs torchvision."""

    def check(self: Any, name: str, given: Any) -> None:
        return None

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})


def processor(kind: str) -> Any:
    """The processor of a type of `image_models.KINDS` that has one."""
    template = TEMPLATE.replace("IMAGE", "<begin>" if kind == "gemma3" else "<image>")
    given: dict[str, Any] = {"tokenizer": tokenizer(), "chat_template": template}
    if kind == "gemma3":
        return Gemma3Processor(Gemma3ImageProcessorPil(size=ONE_SIZE), image_seq_length=4, **given)
    if kind == "idefics3":
        made = Idefics3ImageProcessorPil(
            size=LONGEST, max_image_size=LONGEST, do_image_splitting=False
        )
        return Idefics3Processor(made, image_seq_len=4, **given)
    if kind == "llava":
        made = LlavaImageProcessorPil(size=ONE_SIZE, crop_size=ONE_SIZE, do_center_crop=False)
        given |= {"patch_size": PATCH, "vision_feature_select_strategy": "default"}
        return LlavaProcessor(made, num_additional_image_tokens=1, **given)
    if kind == "internvl":
        made = GotOcr2ImageProcessorPil(size=ONE_SIZE)
        return _without_videos(InternVLProcessor)(made, image_seq_length=4, **given)
    given["chat_template"] = template.replace("<image>", "<begin> <image> <end>")
    sized = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, min_pixels=64, max_pixels=512)
    made = Qwen3VLProcessor if kind == "qwen3_vl" else Qwen2VLProcessor
    return _without_videos(made)(sized, **given)


COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220)}


def picture(colour: str, seed: int = 0, width: int = SIDE) -> Image.Image:
    """A square, or a rectangle, of about one colour."""
    noise = np.random.default_rng(seed).integers(-20, 20, (SIDE, width, 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8))


def part(colour: str, seed: int = 0, width: int = SIDE) -> dict[str, Any]:
    """A part of a message."""
    return {"type": "image", "image": picture(colour, seed, width)}


def rows() -> list[dict[str, Any]]:
    """Rows of two images, one, and none, with hints and replies."""
    text = lambda words: {"type": "text", "text": words}
    first = [text("What is the colour of"), part("red", 1), text("and"), part("blue", 2, 2 * SIDE)]
    contents = [first, [part("green", 3), text("the colour ?")], "the colour of green ?"]
    replies = ["red and blue .", "green", "this is the same ."]
    hints = ["Hint : red and blue", "answer green", "yes"]
    made = zip(contents, replies, hints, strict=True)
    return [
        {
            "prompt": [{"role": "user", "content": content}],
            "completion": [{"role": "assistant", "content": reply}],
            "hint": hint,
        }
        for content, reply, hint in made
    ]
