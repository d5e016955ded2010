"""The teacher's last hidden states: with its head they are its whole distribution.

Shapes: N scored tokens, H hidden states of a token, as wide as the head of the cache takes them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_distill.cache.codecs import packing
from hf_distill.cache.codecs.protocol import Arrays
from metal_ops import DivergenceSpec

FORMATS = ("bf16", "int8")
LEVELS = 127
I8 = np.dtype("i1")


@dataclass(frozen=True)
class HiddenStates:
    """Stores the hidden states before the teacher's output head, and the head once.

    A loss is computed from them as from a live teacher's: over the whole vocabulary, at every
    temperature, of every kind. A row of T tokens is `hidden_bf16` [T * H], or `hidden_int8` [T * H]
    and `hidden_scale` [T]: what one step of a token's codes is. For 8 bits each unit is divided by
    its size over some rows of the data first, else the few that are large would leave the others
    none.

    Entries of the vocabulary that the tokenizer does not have keep their logits.

    Args:
        format: "bf16" stores 16 bits per hidden unit, which is all of a teacher in bfloat16. "int8"
            stores 8, with a scale for each token.
        rank: the number of directions that are kept of the hidden states, those that move the
            logits most: a truncated singular value decomposition of the logits that the head makes
            of some rows of the data. None keeps all.

    Raises:
        ValueError: format is another, or rank is less than 1.
    """

    name: ClassVar[str] = "hidden_states"
    of_hidden: ClassVar[bool] = True

    format: str = "bf16"
    rank: int | None = None
    temperature: float = field(init=False, repr=False, default=1.0)
    temperature_range: tuple[float, float] = field(init=False, repr=False, default=(0.0, math.inf))

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {FORMATS}, got {self.format!r}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, or None, got {self.rank}")

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the class."""
        return {"format": self.format, "rank": self.rank}

    def arrays(self, vocab: int) -> dict[str, np.dtype]:
        """Return the names and dtypes of a row's arrays."""
        if self.format == "bf16":
            return {"hidden_bf16": packing.U16}
        return {"hidden_int8": I8, "hidden_scale": packing.F32}

    def serves(self, spec: DivergenceSpec) -> str | None:
        """Return None: every loss can be computed."""
        return None

    @torch.no_grad()
    def encode(
        self,
        hidden: Tensor,
        /,
        lengths: Sequence[int],
        keys: Sequence[tuple[int, int]],
        real_vocab: int,
    ) -> list[Arrays]:
        """Return the arrays of each row from hidden states [N, H]; see `Codec.encode`.

        Keys and real_vocab are not used.

        Raises:
            ValueError: the arguments disagree, or a hidden state is not finite as it is stored.
        """
        if hidden.ndim != 2 or len(hidden) != sum(lengths) or len(keys) != len(lengths):
            raise ValueError(
                f"hidden states must be [{sum(lengths)}, H] for {len(keys)} rows, got "
                f"{list(hidden.shape)} for {len(lengths)}"
            )
        stored = hidden.bfloat16() if self.format == "bf16" else hidden.float()
        if not bool(stored.isfinite().all()):
            raise ValueError("hidden states must be finite, got some that are not")
        ends = list(accumulate(lengths))
        width = hidden.shape[1]
        if self.format == "bf16":
            values = stored.cpu().view(torch.uint16).numpy().reshape(-1).astype(packing.U16)
            parts = packing.split(values, [end * width for end in ends])
            return [{"hidden_bf16": part} for part in parts]
        scale = stored.abs().amax(-1, keepdim=True) / LEVELS
        codes = (stored / torch.where(scale > 0, scale, 1.0)).round().clamp(-LEVELS, LEVELS)
        whole = codes.to(torch.int8).cpu().numpy().reshape(-1)
        rows = packing.split(whole, [end * width for end in ends])
        scales = packing.split(scale[:, 0].cpu().numpy().astype(packing.F32), ends)
        pairs = zip(rows, scales, strict=True)
        return [{"hidden_int8": row, "hidden_scale": part} for row, part in pairs]

    def decode(
        self, rows: Sequence[Mapping[str, np.ndarray]], lengths: Sequence[int], width: int, /
    ) -> Tensor:
        """Return [N, H] hidden states of the rows' tokens, bfloat16 or float32.

        Args:
            rows: as `encode` made them; they may come from a damaged file.
            lengths: scored tokens of each row.
            width: H.

        Raises:
            ValueError: an array is missing or has a wrong size, or a value that is not finite.
        """
        if len(rows) != len(lengths):
            raise ValueError(f"there must be one length per row, {len(rows)}, got {len(lengths)}")
        sizes = [length * width for length in lengths]
        if self.format == "bf16":
            stored = packing.join(rows, "hidden_bf16", packing.U16, sizes)
            hidden = torch.from_numpy(stored).view(torch.bfloat16).view(-1, width)
        else:
            codes = torch.from_numpy(packing.join(rows, "hidden_int8", I8, sizes)).view(-1, width)
            stored = packing.join(rows, "hidden_scale", packing.F32, lengths)
            scale = torch.from_numpy(stored)[:, None]
            if not bool((scale >= 0).all()):
                raise ValueError("hidden_scale must be at least 0, and not NaN")
            hidden = codes * scale
        if not bool(hidden.isfinite().all()):
            raise ValueError("hidden states must be finite; the stored arrays hold another value")
        return hidden
