"""Rows to cache by name, and collators for the usual columns."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_distill.cache.fingerprints import Collator, Data
from hf_distill.data import batches
from hf_distill.data.hint_collator import HintCollator, Hints
from hf_distill.data.sides import IGNORE_INDEX

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
COLUMNS = "input_ids (and labels), prompt and completion, or messages"


def load_data(name: str, split: str = "train", subset: str | None = None) -> Dataset:
    """Load rows from a JSON, parquet or arrow file, a folder or the hub.

    Args:
        name: a .jsonl, .json, .parquet or .arrow file; a folder that `Dataset.save_to_disk` wrote,
            or one with data files; or a data set of the hub.
        split: of a folder or a data set of the hub.
        subset: of a data set of the hub, or None.

    Raises:
        ValueError: there is no such split, or a subset is given with a file.
    """
    path = Path(name)
    is_file = path.suffix in FILE_FORMATS and path.is_file()
    is_saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    if subset is not None and (is_file or is_saved):
        raise ValueError(f"{name} has no subsets, got {subset!r}")
    if is_file:
        if split != "train":
            raise ValueError(f"a file is the split 'train', got {split!r}")
        loaded: Any = load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train")
    elif is_saved:
        loaded = load_from_disk(str(path))
        if isinstance(loaded, DatasetDict):
            if split not in loaded:
                raise ValueError(f"split must be one of {list(loaded)}, got {split!r}")
            loaded = loaded[split]
        elif split != "train":
            raise ValueError(f"{name} is one split, 'train', got {split!r}")
    else:
        loaded = load_dataset(name, subset, split=split)
    return loaded


class TokenCollator:
    """Makes batches of rows that are token ids already, padded on the right.

    Args:
        pad_token_id: id of the padding; the mask tells it apart.
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask, labels [B, T]; without labels all ids are labels."""
        ids = [list(row["input_ids"]) for row in rows]
        labels = [
            list(row["input_ids"] if row.get("labels") is None else row["labels"]) for row in rows
        ]
        masks = [
            [1] * len(x) if row.get("attention_mask") is None else list(row["attention_mask"])
            for x, row in zip(ids, rows, strict=True)
        ]
        for name, values in (("labels", labels), ("attention_mask", masks)):
            for x, y in zip(ids, values, strict=True):
                if len(x) != len(y):
                    raise ValueError(f"{name} must have {len(x)} values, one per id, got {len(y)}")
        return {
            "input_ids": batches.pad(ids, self.pad_token_id),
            "attention_mask": batches.pad(masks, 0),
            "labels": batches.pad(labels, IGNORE_INDEX),
        }


class MessagesCollator:
    """Runs `HintCollator` on rows with `messages`; the prompt ends before the first reply.

    Args:
        collator: with `prompt` and `completion` columns.
    """

    def __init__(self, collator: HintCollator) -> None:
        self.collator = collator
        self.tokenizer = collator.tokenizer

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """See `HintCollator`.

        Raises:
            ValueError: a row has no reply, or begins with one.
        """
        return self.collator([_split(row) for row in rows])


def _split(row: Mapping[str, Any]) -> dict[str, Any]:
    messages = list(row["messages"])
    roles = [message["role"] for message in messages]
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        raise ValueError(f"messages must have a reply behind a prompt, got roles {roles}")
    at = roles.index("assistant")
    return {**row, "prompt": messages[:at], "completion": messages[at:]}


def default_collator(
    data: Data, tokenizer: PreTrainedTokenizerBase | None = None, hint: Hints = ()
) -> Collator:
    """Return the collator for the columns of the data. Training from the cache must use the same.

    Args:
        data: with columns input_ids (and labels, attention_mask); prompt and completion, text or
            messages; or messages.
        tokenizer: for all but token ids.
        hint: what only the teacher sees, see `HintCollator`; none by default.

    Raises:
        ValueError: the columns are others, there is no tokenizer, or a hint is for token ids.
    """
    columns = set(data[0])
    has_hint = isinstance(hint, str) or callable(hint) or not isinstance(hint, Sequence) or hint
    if "input_ids" in columns:
        if has_hint:
            raise ValueError("a hint needs text or messages, the rows are input_ids")
        pad = None if tokenizer is None else tokenizer.pad_token_id
        return TokenCollator(0 if pad is None else cast(int, pad))
    if not {"prompt", "completion"} <= columns and "messages" not in columns:
        raise ValueError(f"rows must have columns {COLUMNS}, got {sorted(columns)}")
    if tokenizer is None:
        raise ValueError("rows of text or messages need a tokenizer (processing_class), got None")
    collator = HintCollator(tokenizer, hint)
    return collator if {"prompt", "completion"} <= columns else MessagesCollator(collator)
