"""What tells rows, teachers, tokenizers, data sets and collators apart.

Shapes: B rows, T positions, n scored tokens of a row.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_distill.cache.files import canonical
from hf_distill.data import sides
from hf_distill.data.sides import Side
from hf_distill.models.pieces import plain_name
from hf_distill.models.structure import causal_lm, in_pieces
from hf_distill.models.tokenizers import num_ids

Collator = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]]

COVERED = ("input_ids", "attention_mask")  # inputs that a row's hash stands for
PROBED_ROWS = 16
SAMPLED_VALUES = 256  # of each parameter
# Entries of a model's config that do not say what it computes, or stand beside it in the manifest
VOLATILE = ("_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype")
VOLATILE += ("use_cache", "_attn_implementation", "attn_implementation")


class Data(Protocol):
    """Gives rows by number: a list of mappings, or a map-style `datasets.Dataset`."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def __getitem__(self, number: int, /) -> Any:
        """Return a row, a mapping from columns to values."""
        ...


class SideRow(NamedTuple):
    """Holds a row of a side without its padding.

    ids: real token ids, in order.
    positions: [n] int32 ascending, the places in them of the scored tokens; >= 1.
    """

    ids: list[int]
    positions: np.ndarray

    @property
    def hash(self) -> int:
        """See `row_hash`."""
        return row_hash(self.ids)


def row_hash(ids: Sequence[int]) -> int:
    """Return the first 8 bytes of the sha256 of little-endian int32 ids, read as little-endian."""
    digest = hashlib.sha256(np.asarray(ids, "<i4").tobytes()).digest()
    return int.from_bytes(digest[:8], "little")


def rows_digest(hashes: np.ndarray) -> str:
    """Return the sha256 of all rows' hashes [rows] in order, each as little-endian uint64."""
    return hashlib.sha256(hashes.astype("<u8").tobytes()).hexdigest()


def side_rows(side: Side) -> list[SideRow]:
    """Return the rows of a side: their real ids and which of them are scored.

    Raises:
        ValueError: the side has inputs that ids do not determine, its mask is not [B, T], it asks
            several teachers, or a scored token or the one before it is padding.
    """
    side = sides.unpacked(side)
    others = sorted(side.inputs.keys() - set(COVERED))
    if others:
        raise ValueError(
            f"rows are known by their token ids, so a batch must have {' and '.join(COVERED)} only "
            f"for its teacher, it has {others[0]!r} too"
        )
    if side.route is not None:
        raise ValueError("a cache holds one teacher, the batch names several (teacher_route)")
    ids: Tensor = side.inputs["input_ids"].cpu()
    mask = side.inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
    if real.shape != ids.shape:
        raise ValueError(f"attention_mask must be {tuple(ids.shape)}, got {tuple(real.shape)}")
    scored = torch.zeros_like(real)
    scored[:, 1:] = side.predicts.cpu()[:, :-1]
    before = torch.zeros_like(real)
    before[:, 1:] = real[:, :-1]
    wrong = scored & ~(real & before)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            "a scored token and the token before it must not be padding: row "
            f"{row}, position {column}"
        )
    return [
        SideRow(row[keep].tolist(), flags[keep].nonzero()[:, 0].numpy().astype(np.int32))
        for row, keep, flags in zip(ids, real, scored, strict=True)
    ]


def collated(
    collator: Collator, rows: Sequence[Mapping[str, Any]], first: int = 0
) -> Iterator[SideRow]:
    """Yield the teacher's row of each row of the data, as training will see it.

    Each is collated by itself: what it is must not depend on its batch.

    Args:
        collator: of the training.
        rows: of the data.
        first: number of the first of them, for messages.

    Raises:
        ValueError: a collator makes another number of rows, or see `side_rows`; naming the row.
    """
    for number, row in enumerate(rows, first):
        try:
            batch = collator([row])
            made = side_rows(sides.teacher_side(batch, sides.student_side(batch)))
        except ValueError as error:
            raise ValueError(f"row {number} of the data: {error}") from error
        if len(made) != 1:
            raise ValueError(
                f"row {number} of the data: the collator must make one row of one, it made "
                f"{len(made)}; rows that are packed together cannot be cached"
            )
        yield made[0]


def dataset_identity(data: Data) -> dict[str, Any]:
    """Return num_rows and the sha256 of the rows' JSON, one a line; reads all data once."""
    digest = hashlib.sha256()
    for i in range(len(data)):
        text = json.dumps(dict(data[i]), sort_keys=True, default=_listed)
        digest.update(text.encode() + b"\n")
    return {"num_rows": len(data), "sha256": digest.hexdigest()}


def _listed(value: Any) -> Any:
    """Return a tensor's or an array's values, whose text leaves some out; else the value's text."""
    return value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else repr(value)


def collator_identity(collator: Collator, data: Data) -> dict[str, Any]:
    """Return the collator's type and the sha256 of what it makes of some rows, evenly spread.

    What counts of a collator is the ids that it makes: its tokenizer, template, hints and limits
    are all in them.
    """
    digest = hashlib.sha256()
    count = min(PROBED_ROWS, len(data))
    for i in range(count):
        number = i * len(data) // count
        (row,) = collated(collator, [data[number]], number)
        digest.update(np.asarray(row.ids, "<i4").tobytes() + b"|" + row.positions.tobytes())
    name = getattr(collator, "__qualname__", type(collator).__qualname__)
    return {"type": name, "probe_sha256": digest.hexdigest()}


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any] | None:
    """Return the sha256 of the tokenizer and of its chat template, and its number of ids.

    The sha256 is that of tokenizer.json without the settings for truncation and padding, which
    calls change; of a tokenizer without such a file, of its ids and special tokens.
    """
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map]
    else:
        content = json.loads(backend.to_str())
        content = {k: v for k, v in content.items() if k not in ("truncation", "padding")}
    template = getattr(tokenizer, "chat_template", None)
    return {
        "name_or_path": str(tokenizer.name_or_path),
        "sha256": hashlib.sha256(canonical(content)).hexdigest(),
        "chat_template_sha256": None
        if template is None
        else hashlib.sha256(canonical(template)).hexdigest(),
        "num_ids": num_ids(tokenizer),
    }


def weights_fingerprint(model: nn.Module) -> str:
    """Return a sha256 over each parameter's name, dtype, shape and up to 256 of its values.

    It tells models of one shape apart, and does not read all of a large one. Values of a parameter
    that is not in memory (a meta tensor of an offloaded model) are left out. All processes that
    hold pieces of a model must call it together.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        name = plain_name(name)
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        if not parameter.is_meta:
            digest.update(_sampled(parameter.detach()).tobytes())
    return digest.hexdigest()


def _sampled(parameter: Tensor) -> np.ndarray:
    """Return some values, evenly spread, as float64."""
    whole = cast(Any, parameter).full_tensor() if in_pieces(parameter) else parameter
    flat = whole.reshape(-1)
    step = max(1, len(flat) // SAMPLED_VALUES)
    return flat[::step][:SAMPLED_VALUES].cpu().double().numpy()


def _adapters(model: nn.Module) -> dict[str, Any]:
    if not isinstance(model, PeftModel):
        return {}
    configs = {name: model.peft_config[name] for name in model.active_adapters}
    return {
        name: {"type": str(config.peft_type), "name_or_path": config.base_model_name_or_path}
        for name, config in configs.items()
    }


def teacher_identity(model: nn.Module, revision: str | None = None) -> dict[str, Any]:
    """Return where a model is from, what it computes, and with what.

    Args:
        model: a causal LM, perhaps with adapters.
        revision: of its repository; None takes the commit that its config names, if it does.
    """
    config: Any = causal_lm(model).config
    settings = {k: v for k, v in config.to_dict().items() if k not in VOLATILE}
    settings.pop("quantization_config", None)
    quantization = getattr(config, "quantization_config", None)
    return {
        "name_or_path": str(config.name_or_path),
        "revision": revision or getattr(config, "_commit_hash", None),
        "config_sha256": hashlib.sha256(canonical(plain(settings))).hexdigest(),
        "weights_fingerprint": weights_fingerprint(model),
        "adapters": _adapters(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "attn_implementation": getattr(config, "_attn_implementation", None),
        "quantization": None if quantization is None else str(type(quantization).__name__),
        "library_versions": {
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    }


def plain(value: Any) -> Any:
    """Return the value as JSON gives it back; what JSON cannot hold is text."""
    return json.loads(json.dumps(value, default=repr))


def first_difference(
    one: Mapping[str, Any], other: Mapping[str, Any], path: str = ""
) -> tuple[str, Any, Any] | None:
    """Return the first entry in which two JSON objects differ, in the order of the other.

    Returns:
        Its name with dots, its value in one and in the other; or None.
    """
    for key in dict.fromkeys([*other, *one]):
        name, a, b = f"{path}{key}", one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found = first_difference(a, b, f"{name}.")
            if found is not None:
                return found
        elif a != b:
            return name, a, b
    return None
