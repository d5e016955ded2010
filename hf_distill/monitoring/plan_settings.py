"""What a memory plan is asked, and what it answers."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from hf_distill.teachers.self_teacher import SELF_TEACHERS

OPTIMS = ("adamw", "sgd", "adafactor")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOMENTS = ("loss", "backward", "step")


@dataclass(frozen=True)
class PlanSettings:
    """Says how a run is made, as far as memory depends on it.

    Args:
        devices: W, at least 1.
        dtype: that the student is loaded in.
        bf16: mixed precision, as in the training arguments.
        batch_size: rows of a micro-batch on a device.
        length: tokens of a row.
        scored_tokens: N; None is all of a micro-batch but the first of each row.
        optim: "adamw", "sgd" (without momentum) or "adafactor".
        lora_rank: of adapters on all linear layers; None trains the whole student.
        gradient_checkpointing: blocks keep their inputs only.
        gradient_accumulation_steps: micro-batches of an optimizer step, on a device.
        teacher: "model" is another one; "base", "live", "ema" or "lora_scale" is the student.
        teacher_dtype: that another one is loaded in; None is its config's.
        reduce_bucket_size: elements of DeepSpeed's buffer of gradients; None is its "auto", H * H.
        shard_loss: as in the config, under FSDP 2.
        device: "cuda", "mps" or "cpu", which have chunks of different sizes.

    Raises:
        ValueError: a value is out of range; the message has the rule and the value.
    """

    devices: int = 1
    dtype: str = "float32"
    bf16: bool = False
    batch_size: int = 1
    length: int = 1024
    scored_tokens: int | None = None
    optim: str = "adamw"
    lora_rank: int | None = None
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1
    teacher: str = "base"
    teacher_dtype: str | None = None
    reduce_bucket_size: int | None = None
    shard_loss: bool = False
    device: str = "cuda"

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("devices", "batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.length < 2:
            raise ValueError(f"length must be at least 2, got {self.length}")
        most = self.batch_size * (self.length - 1)
        if self.scored_tokens is not None and not 1 <= self.scored_tokens <= most:
            raise ValueError(
                f"scored_tokens must be in [1, {most}], all but the first of {self.batch_size} "
                f"rows of {self.length}; got {self.scored_tokens}"
            )
        known = {"optim": OPTIMS, "dtype": (*DTYPES,), "teacher_dtype": (None, *DTYPES)}
        known |= {"teacher": ("model", *SELF_TEACHERS), "device": ("cuda", "mps", "cpu")}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {values}, got {getattr(self, name)!r}")
        if self.reduce_bucket_size is not None and self.reduce_bucket_size < 1:
            raise ValueError(
                f"reduce_bucket_size must be at least 1, got {self.reduce_bucket_size}"
            )
        if self.teacher_dtype is not None and self.teacher != "model":
            raise ValueError(
                "teacher_dtype needs another model as teacher, which is not the student itself; "
                f"got {self.teacher_dtype!r} and teacher {self.teacher}"
            )
        if self.teacher == "lora_scale" and self.lora_rank is None:
            raise ValueError("teacher lora_scale needs adapters: set lora_rank, got None")

    @property
    def tokens(self) -> int:
        """Return N."""
        return self.scored_tokens or self.batch_size * (self.length - 1)


class Row(NamedTuple):
    """Holds the bytes of a kind at the three moments, and whether they are an estimate."""

    kind: str
    loss: int
    backward: int
    step: int
    is_estimate: bool = False


@dataclass(frozen=True)
class Plan:
    """Holds what a device of an engine needs, in bytes.

    Args:
        engine: its name.
        rows: by kind.
        unknown: why activations are not known, or None.
        by_logits: whether the head is read by its logits, which takes less here.
    """

    engine: str
    rows: tuple[Row, ...]
    unknown: str | None
    by_logits: bool

    @property
    def moments(self) -> dict[str, int]:
        """Return the sums at the three moments."""
        return {name: sum(getattr(row, name) for row in self.rows) for name in MOMENTS}

    @property
    def needs(self) -> int:
        """Return the bytes of the largest moment."""
        return max(self.moments.values())

    def to_dict(self) -> dict[str, object]:
        """Return what JSON can hold, in bytes."""
        rows = {row.kind: {x: getattr(row, x) for x in MOMENTS} for row in self.rows}
        return {
            "engine": self.engine,
            "needs": self.needs,
            "moments": self.moments,
            "rows": rows,
            "by_logits": self.by_logits,
            "unknown": self.unknown,
        }
