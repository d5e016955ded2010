"""Tiny random image-text models, rows with 2, 1 and 0 images, and what is right for them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from tests.hf_distill.trainers.models import BASE

IMAGE, START, END = 50, 51, 52  # what stands for a part of an image, and around one
SIDE, PATCH = 16, 4  # pixels of an image and of a patch
TEXT = BASE | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
    "vision_use_head": False,
}
QWEN_TEXT = TEXT | {"rope_parameters": ROPE}
QWEN_TOWER = {
    "depth": 1,
    "num_heads": 2,
    "patch_size": PATCH,
    "hidden_size": 16,
    "out_hidden_size": 32,
    "intermediate_size": 24,
}
QWEN = {
    "image_token_id": IMAGE,
    "video_token_id": 53,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
SIGLIP = TOWER | {"model_type": "siglip_vision_model", "projection_dim": 32}
LLAMA = TEXT | {"model_type": "llama"}
PIXELS = {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}

# Of each type its configs' fields, and how many tokens an image has (None: by its size)
KINDS: dict[str, tuple[dict[str, Any], int | None]] = {
    "qwen2_vl": (
        QWEN
        | {"text_config": QWEN_TEXT}
        | {"vision_config": QWEN_TOWER | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}},
        None,
    ),
    "qwen2_5_vl": (
        QWEN
        | {"text_config": QWEN_TEXT}
        | {"vision_config": QWEN_TOWER | {"window_size": 16, "fullatt_block_indexes": [0]}},
        None,
    ),
    "qwen3_vl": (
        QWEN
        | {"text_config": QWEN_TEXT}
        | {
            "vision_config": QWEN_TOWER
            | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        },
        None,
    ),
    "gemma3": (
        {
            "text_config": TEXT
            | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
            "vision_config": TOWER,
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "boi_token_index": START,
            "eoi_token_index": END,
        },
        4,
    ),
    "llava": (
        {
            "text_config": LLAMA,
            "vision_config": TOWER | {"model_type": "clip_vision_model"},
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
        },
        16,
    ),
    "paligemma": (
        {
            "text_config": TEXT | {"model_type": "gemma"},
            "vision_config": SIGLIP,
            "image_token_index": IMAGE,
            "projection_dim": 32,
            "hidden_size": 32,
        },
        16,
    ),
    "smolvlm": (
        {
            "text_config": LLAMA,
            "vision_config": TOWER,
            "image_token_id": IMAGE,
            "scale_factor": 2,
            "pad_token_id": 0,
        },
        4,
    ),
    "internvl": (
        {
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": TOWER | PIXELS,
            "image_token_id": IMAGE,
            "downsample_ratio": 0.5,
        },
        4,
    ),
}
KINDS["idefics3"] = KINDS["smolvlm"]


def model(kind: str, seed: int = 0) -> Any:
    """A tiny model of a type, with weights so large that logits spread."""
    torch.manual_seed(seed)
    lm = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[kind](**KINDS[kind][0])).float()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1 and parameter.std() < 0.1:
                parameter.mul_(6)
            if not parameter.any():  # Gemma 3 makes nothing of images at first
                parameter.normal_(0, 0.1)
    return lm.eval()


def rows(kind: str, images: Sequence[int] = (2, 1, 0)) -> list[dict[str, Any]]:
    """Rows with so many images each, whose last tokens are labelled; the first has most."""
    generator, size = torch.Generator().manual_seed(5), KINDS[kind][1]

    def text(length: int) -> list[int]:
        return torch.randint(5, IMAGE, (length,), generator=generator).tolist()

    made = []
    for count in images:
        ids, types, pixels, grids = [1], [0], [], []
        for i in range(count):
            grid = [1, 4, 4 + 4 * i]  # patches, of Qwen
            shape = (grid[1] * grid[2], 6 * PATCH**2) if size is None else (3, SIDE, SIDE)
            pixels.append(torch.randn(shape, generator=generator))
            grids.append(grid)
            number = grid[1] * grid[2] // 4 if size is None else size
            part = [START, *[IMAGE] * number, END, *text(2)]
            types += [int(token == IMAGE) for token in part]
            ids += part
        reply = text(4 + 3 * count)
        labels = [-100] * len(ids) + reply
        types += [int(kind == "paligemma")] * len(reply)  # the prefix is what is 0
        types = [int(x != -100) for x in labels] if kind == "paligemma" else types
        row = {"input_ids": ids + reply, "labels": labels, "types": types}
        made.append(row | {"pixels": pixels, "grids": grids})
    return made


class Processed:
    """Makes batches as the processor of a type does, padded on one side."""

    def __init__(self, kind: str, side: str = "right") -> None:
        self.kind, self.side = kind, side

    def __call__(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in batch)

        def padded(values: Sequence[list[int]], fill: int) -> Tensor:
            gaps = [[fill] * (width - len(x)) for x in values]
            pairs = zip(values, gaps, strict=True)
            return torch.tensor([x + y if self.side == "right" else y + x for x, y in pairs])

        ids = [row["input_ids"] for row in batch]
        made = {
            "input_ids": padded(ids, 0),
            "attention_mask": padded([[1] * len(x) for x in ids], 0),
            "labels": padded([row["labels"] for row in batch], -100),
        }
        types = padded([row["types"] for row in batch], 0)
        if KINDS[self.kind][1] is None:
            made["mm_token_type_ids"] = types
        if self.kind in ("gemma3", "paligemma"):
            made["token_type_ids"] = types
        return made | self._images(batch)

    def _images(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        pixels = [x for row in batch for x in row["pixels"]]
        if not pixels:
            return {}
        if KINDS[self.kind][1] is None:
            grids = [x for row in batch for x in row["grids"]]
            return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)}
        if self.kind not in ("smolvlm", "idefics3"):
            return {"pixel_values": torch.stack(pixels)}
        most = max(len(row["pixels"]) for row in batch)
        empty = torch.zeros_like(pixels[0])
        filled = [[*row["pixels"], *[empty] * (most - len(row["pixels"]))] for row in batch]
        real = torch.tensor([[i < len(row["pixels"]) for i in range(most)] for row in batch])
        mask = real[:, :, None, None].expand(*real.shape, SIDE, SIDE).long()
        values = torch.stack([torch.stack(x) for x in filled])
        return {"pixel_values": values, "pixel_attention_mask": mask}


def scored(lm: nn.Module, kind: str, row: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """[N, V] float64 logits and [N] targets of one row alone, from the model's plain forward."""
    batch = Processed(kind)([row])
    labels = batch.pop("labels")[0, 1:]
    logits = lm(**batch).logits[0, :-1].double()
    return logits[labels != -100], labels[labels != -100]


def distillation_step(
    student: nn.Module, teacher: nn.Module, kind: str, given: Sequence[Mapping[str, Any]]
) -> tuple[float, dict[str, Tensor]]:
    """The mean of (KL(teacher || student) + CE) / 2 over the rows' tokens, and its gradients."""
    student.train().zero_grad()
    each = []
    for row in given:
        own, labels = scored(student, kind, row)
        with torch.no_grad():
            other, _ = scored(teacher, kind, row)
        log_q, log_p = own.log_softmax(-1), other.log_softmax(-1)
        soft = (log_p.exp() * (log_p - log_q)).sum(-1)
        each.append((soft + F.cross_entropy(own, labels, reduction="none")) / 2)
    loss = torch.cat(each).mean()
    loss.backward()
    found = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    return loss.item(), found
