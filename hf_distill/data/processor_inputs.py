"""What a processor makes of messages with images: token ids, and the other inputs of a model.

Shapes: B rows, T positions.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from hf_distill.data.alignment import AlignmentError
from hf_distill.data.hints import Messages
from hf_distill.data.sides import IMAGE_INPUTS, TOKEN_TYPES

OF_ROWS = "pixel_attention_mask"  # comes with images of [rows, images, ...], not [images, ...]
IMAGE = "image"  # the type of a part of a message
HOLDS = ("image", "url", "path", "base64")  # one of which such a part has
TYPES = ("text", IMAGE, "image_url")
KEPT = 64  # results of the image processor, at most


class _Once:
    """Runs an image processor once for the same images: a row is rendered several times."""

    def __init__(self, process: Any) -> None:
        self.process = process
        self._known: dict[Any, tuple[Any, Any]] = {}  # with the images, so that ids stay theirs

    def __getattr__(self, name: str) -> Any:
        if name == "process":  # while it is copied
            raise AttributeError(name)
        return getattr(self.process, name)

    def __getstate__(self) -> dict[str, Any]:
        return {"process": self.process, "_known": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def __call__(self, images: Any, **kwargs: Any) -> Any:
        key = _ids(images), repr(sorted(kwargs.items(), key=lambda x: x[0]))
        if key not in self._known:
            if len(self._known) >= KEPT:
                self._known.clear()
            self._known[key] = images, self.process(images, **kwargs)
        return BatchFeature(dict(self._known[key][1]))  # processors take things out of it


def _ids(images: Any) -> Any:
    return tuple(map(_ids, images)) if isinstance(images, list | tuple) else id(images)


def _parts(messages: Messages) -> list[Any]:
    contents = [x.get("content") for x in messages]
    return [part for x in contents if isinstance(x, list | tuple) for part in x]


def num_images(messages: Messages) -> int:
    """Return how many images messages have.

    Raises:
        ValueError: a part of a message is of another kind than text and images, or is an image
            without its data.
    """
    parts = [part for part in _parts(messages) if isinstance(part, Mapping)]
    for part in parts:
        kind = part.get("type")
        if kind not in TYPES:
            raise ValueError(f"parts of messages must be {' or '.join(TYPES)}, got type {kind!r}")
        if kind == IMAGE and all(part.get(name) is None for name in HOLDS):
            raise ValueError(
                "the image of a message must be in its part of the message, such as {'type': "
                f"'image', 'image': a PIL image}}, or {', '.join(HOLDS[1:])}; got {sorted(part)}"
            )
    return sum(part["type"] != "text" for part in parts)


def _without_gaps(messages: Messages) -> Messages:
    """Return the messages, their parts without keys of None, with which datasets fill them up."""

    def part(x: Any) -> Any:
        return {k: v for k, v in x.items() if v is not None} if isinstance(x, Mapping) else x

    listed = [isinstance(x.get("content"), list) for x in messages]
    pairs = zip(messages, listed, strict=True)
    return [x | {"content": [part(y) for y in x["content"]]} if has else x for x, has in pairs]


class ProcessorInputs:
    """Renders messages with a processor, and makes the images' inputs of a batch.

    Args:
        processor: with a chat template, of the model.

    Raises:
        TypeError: it has no tokenizer, or no image processor.
        ValueError: it has no chat template, or its model reads its context both ways.
    """

    def __init__(self, processor: Any) -> None:
        kind, given = type(processor).__name__, getattr(processor, "image_processor", None)
        if given is None or not isinstance(
            getattr(processor, "tokenizer", None), PreTrainedTokenizerBase
        ):
            raise TypeError(f"a processor needs a tokenizer and an image_processor, got a {kind}")
        if kind.startswith("PaliGemma"):
            raise ValueError(
                "a PaliGemma reads its prompt both ways and has no chat template: hints cannot be "
                f"put into its messages, got a {kind}; DistillTrainer takes its batches"
            )
        if processor.chat_template is None and processor.tokenizer.chat_template is None:
            raise ValueError(f"the processor needs a chat template, this {kind} has none")
        self.processor = copy.copy(processor)
        self.processor.image_processor = _Once(given)
        self.tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        if self.tokenizer.chat_template is None:  # which says how replies end
            self.tokenizer = copy.copy(self.tokenizer)
            self.tokenizer.chat_template = processor.chat_template
        names = ("image_token_ids", "video_token_ids", "audio_token_ids")
        ids = [x for name in names for x in getattr(processor, name, [])]
        self.placeholder_ids = sorted({x for x in ids if x is not None})
        self._types: str | None = None  # as the model calls them; known from the first messages

    def _apply(self, messages: Messages, **options: Any) -> Any:
        num_images(messages)
        options |= {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        made = self.processor.apply_chat_template(_without_gaps(messages), **options)
        if getattr(self.processor, "return_mm_token_type_ids", False):
            self._types = next((name for name in TOKEN_TYPES if name in made), None)
        return made

    def ids(self, messages: Messages, **options: Any) -> list[int]:
        """Return the token ids of messages, with as many placeholders as their images have parts.

        Args:
            messages: a dialogue, or its beginning.
            **options: of the chat template.
        """
        return self._apply(messages, **options)["input_ids"][0].tolist()

    def images(self, messages: Messages, **options: Any) -> dict[str, Tensor]:
        """Return the inputs that the images of one row make; none if it has no image.

        Args:
            messages: of the whole row.
            **options: of the chat template.

        Raises:
            ValueError: the processor makes an input that is not known.
        """
        if not num_images(messages):
            return {}
        made = dict(self._apply(messages, **options))
        for name in ("input_ids", "attention_mask", *TOKEN_TYPES):
            made.pop(name, None)
        unknown = sorted(made.keys() - set(IMAGE_INPUTS))
        if unknown:
            raise ValueError(
                f"the inputs of images must be among {', '.join(IMAGE_INPUTS)}, a "
                f"{type(self.processor).__name__} makes {unknown[0]!r}"
            )
        return made

    def token_types(self, ids: Tensor, prefix: str = "") -> dict[str, Tensor]:
        """Return which of the ids [B, T] stand for images, [B, T] int64, if the model reads it."""
        if self._types is None:
            return {}
        types = torch.tensor(self.processor.create_mm_token_type_ids(ids.tolist()))
        return {f"{prefix}{self._types}": types.view(ids.shape)}

    def num_placeholders(self, ids: Tensor) -> Tensor:
        """Return [B]: how many of the ids [B, T] of each row stand for a part of an image."""
        return torch.isin(ids, torch.tensor(self.placeholder_ids)).sum(1)


def join_images(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the inputs of the images of a batch, from those of its rows, in order.

    Images of several sizes are padded with zeros, as their processors pad them.

    Args:
        rows: of `ProcessorInputs.images`; a row without images has none.
    """
    some = [row for row in rows if row]
    if not some:
        return {}
    of_rows = OF_ROWS in some[0]
    joined = {}
    for name, first in some[0].items():
        empty = [first.new_zeros(1, *([0] * (first.ndim - 1)))] if of_rows else []
        values = [[row[name]] if row else empty for row in rows]
        joined[name] = _cat([x for each in values for x in each])
    return joined


def _cat(values: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first axis; the others are padded with zeros to the largest."""
    sizes = torch.tensor([x.shape[1:] for x in values]).amax(0).tolist()
    padded = []
    for x in values:
        gaps = [size - own for size, own in zip(sizes, x.shape[1:], strict=True)]
        padded.append(F.pad(x, [y for gap in reversed(gaps) for y in (0, gap)]))
    return torch.cat(padded)


def check_placeholders(processor: ProcessorInputs, ids: Tensor, teacher_ids: Tensor) -> None:
    """Check that both sides of each row have as many tokens that stand for parts of images.

    Args:
        processor: knows them.
        ids: [B, T] of the student.
        teacher_ids: [B, T of the teacher].

    Raises:
        AlignmentError: a row has others: an image stood in the system message that the teacher's
            own has replaced, say.
    """
    own, other = (processor.num_placeholders(x).tolist() for x in (ids, teacher_ids))
    for row, (one, two) in enumerate(zip(own, other, strict=True)):
        if one != two:
            raise AlignmentError(
                "student and teacher must read the same images: row "
                f"{row} has {one} tokens that stand for parts of them for the student, {two} for "
                "the teacher"
            )


def check_tokenizers(*given: Any) -> None:
    """Check that two sides, which have tokenizers of their own, are given these and no processor.

    Raises:
        ValueError: one is a processor.
    """
    for side in given:
        if isinstance(side, ProcessorMixin):
            raise ValueError(
                "rows of two tokenizers have no images, got a processor: give the tokenizer of the "
                f"{type(side).__name__}"
            )


def split_processor(given: Any) -> tuple[Any, ProcessorInputs | None]:
    """Return the tokenizer, and what makes the images' inputs if a processor is given."""
    if not isinstance(given, ProcessorMixin):
        return given, None
    made = ProcessorInputs(given)
    return made.tokenizer, made
