"""The arrays that the sparse codecs share: a head, the tail's mass and sums, draws from the tail.

A row of T tokens is stored as these 1-D arrays, each token's part after the one before:

- `head_low` u16, `head_high` u8: ids of the head, most probable first, see `packing`.
- `head_exact` f16, `head_coarse` u8: their log-probabilities, see `packing.pack_head`.
- `head_sizes` u8: entries of the head, [T]; nothing if every token has top_k.
- `log_tail` f16 [T]: log of the mass of all other entries, by a log-sum-exp over them.
- `log_sums` u16 [T * m]: log of the tail's sums of p ** alpha, see `packing.pack_sums`.
- `draw_low`, `draw_high`, `draw_ends` f16 [T * 2], `draw_codes` u8: the draws from the tail and
  their log-probabilities, see `packing.pack_draws`.
- `draw_sizes` u8 and `draw_repeats` u8, where repeated draws are stored once.
- `entropy` f16 [T]: of the whole distribution, nats.
- `num_entries` u32: entries of the vocabulary with any probability, [1] if all
  tokens agree, or [T].

A codec without a head, or without draws, has not their arrays.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from hf_distill.cache.codecs import packing
from hf_distill.cache.codecs.protocol import Arrays
from hf_distill.cache.codecs.reading import read
from hf_distill.cache.codecs.selection import Plan, Selection, select, uniforms
from metal_ops import DivergenceSpec, SparseTeacher

NUM_ORDERS = 4
MOST = 255  # what a count of one byte can hold


def check(holds: bool, rule: str, value: object) -> None:
    """Raise ValueError with the rule and the value unless it holds."""
    if not holds:
        raise ValueError(f"{rule}, got {value}")


class SparseCodec:
    """Is the base of codecs that keep a few entries of each token: dataclasses of its fields.

    Attributes:
        temperature: at which the log-probabilities are taken, > 0.
        temperature_range: smallest and largest temperature of a loss.
        top_k: most entries of the head; 0 for a codec without a head.
        top_p: the head ends once it holds this mass; None for always top_k entries.
        num_exact: log-probabilities of the head that have 16 bits.
        num_samples: draws from the tail; 0 for none.
        merges_draws: whether repeated draws are stored once.
    """

    name: ClassVar[str]
    of_hidden: ClassVar[bool] = False
    temperature: float
    temperature_range: tuple[float, float]
    top_k: int
    top_p: float | None
    num_exact: int
    num_samples: int
    merges_draws: bool

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: a field is out of range; the message gives the rule and the value.
        """
        object.__setattr__(self, "temperature_range", tuple(self.temperature_range))
        check(
            0 < self.temperature < math.inf,
            "temperature must be positive and finite",
            self.temperature,
        )
        check(
            len(self.temperature_range) == 2
            and 0 < self.temperature_range[0] <= self.temperature_range[1] < math.inf,
            "temperature_range must be two positive numbers, the smaller first",
            self.temperature_range,
        )
        check(
            self.top_p is None or 0 < self.top_p <= 1, "top_p must be None or in (0, 1]", self.top_p
        )
        check(self.num_exact >= 1, "num_exact must be at least 1", self.num_exact)
        arguments = self.settings()
        for name in ("top_k", "num_samples"):
            if name in arguments:
                most = f"{name} must be in [1, {MOST}]"
                check(1 <= arguments[name] <= MOST, most, arguments[name])

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the class, as JSON has them."""
        assert dataclasses.is_dataclass(self)
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @property
    def _alphas(self) -> tuple[float, float]:
        low, high = self.temperature_range
        return self.temperature / high, self.temperature / low

    @cached_property
    def proposal(self) -> float:
        """Return x: draws are in proportion to p ** x, what p is at the hottest temperature.

        There the tail matters most; a colder loss loses little by such draws.
        """
        return self._alphas[0]

    @cached_property
    def orders(self) -> tuple[float, ...]:
        """Return the exponents of the stored power sums, evenly spread; 1 is the tail's mass."""
        low, high = self._alphas
        between = (low + (high - low) * i / (NUM_ORDERS - 1) for i in range(1, NUM_ORDERS - 1))
        # the ends are not computed: rounded, the last could miss the coldest temperature
        inner = {x for x in between if not math.isclose(x, 1.0)}
        return tuple(sorted({low, *inner, high} - {1.0}))

    @cached_property
    def plan(self) -> Plan:
        """Return what is kept of a token, and how it is stored."""
        return Plan(
            top_k=self.top_k,
            top_p=self.top_p,
            num_samples=self.num_samples,
            proposal=self.proposal,
            orders=self.orders,
            temperature=self.temperature,
            temperature_range=self.temperature_range,
            num_exact=self.num_exact,
            merges_draws=self.merges_draws,
        )

    def arrays(self, vocab: int) -> dict[str, np.dtype]:
        """Return the names and dtypes of a row's arrays for a vocabulary of that many entries."""
        u8, u16, f16 = packing.U8, packing.U16, packing.F16
        names: dict[str, np.dtype] = {}
        if self.top_k:
            names |= packing.id_arrays("head", vocab)
            names |= {"head_exact": f16, "head_coarse": u8, "head_sizes": u8, "log_tail": f16}
        if self.orders:
            names |= {"log_sums": u16}
        if self.num_samples:
            names |= packing.id_arrays("draw", vocab) | {"draw_ends": f16, "draw_codes": u8}
        if self.merges_draws:
            names |= {"draw_sizes": u8, "draw_repeats": u8}
        return names | {"entropy": f16, "num_entries": packing.U32}

    def serves(self, spec: DivergenceSpec) -> str | None:
        """Return why a loss cannot be computed from what is stored, and what to cache, or None."""
        low, high = self.temperature_range
        if not low <= spec.temperature <= high:
            return (
                f"the cache serves temperatures from {low:g} to {high:g}, not "
                f"{spec.temperature:g}: set temperature to one of these, or cache again with a "
                "temperature_range that has it"
            )
        if spec.support in ("student_topk", "union"):
            return (
                f"support {spec.support!r} asks for entries that the student chooses: "
                'cache with the codec "full"'
            )
        if spec.top_k is not None and (spec.top_k > self.top_k or self.top_p is not None):
            kept = f"{self.top_k} entries" if self.top_p is None else f"a nucleus of {self.top_p}"
            return (
                f"a support of the teacher's top {spec.top_k} is asked for and {kept} are kept: "
                f"cache again with top_k of at least {spec.top_k} and top_p None"
            )
        return None

    def encode(
        self,
        logits: Tensor,
        lengths: Sequence[int],
        keys: Sequence[tuple[int, int]],
        real_vocab: int,
    ) -> list[Arrays]:
        """Return the arrays of each row; see `Codec.encode`."""
        check(
            logits.ndim == 2 and len(logits) == sum(lengths),
            f"logits must be [{sum(lengths)}, V], the sum of lengths",
            list(logits.shape),
        )
        check(len(keys) == len(lengths), f"there must be {len(lengths)} keys", len(keys))
        vocab = logits.shape[1]
        check(0 < real_vocab <= vocab, f"real_vocab must be in [1, {vocab}]", real_vocab)
        points = uniforms(keys, lengths)
        return self.pack(select(logits[:, :real_vocab], points, self.plan), lengths, vocab)

    def pack(self, kept: Selection, lengths: Sequence[int], vocab: int) -> list[Arrays]:
        """Return the arrays of rows of which it is known what to keep.

        Args:
            kept: of all tokens, on the host, as `selection.select` gives it for this codec's plan.
            lengths: tokens of each row.
            vocab: V of the logits.
        """
        ends = list(accumulate(lengths))
        log_tail = packing.half(kept.log_tail)
        columns: dict[str, list[np.ndarray]] = {}
        if self.top_k:
            columns |= self._pack_head(kept, ends, vocab)
            columns["log_tail"] = packing.split(log_tail, ends)
        if self.orders:
            # against what is read back, so that the rounding of log_tail is not in the sums
            tail = log_tail.astype(np.float32) if self.top_k else np.zeros_like(kept.log_tail)
            num_tail = kept.num_entries - kept.head_sizes
            sums = packing.pack_sums(kept.log_sums, self.orders, tail, num_tail)
            columns["log_sums"] = [part.reshape(-1) for part in packing.split(sums, ends)]
        if self.num_samples:
            columns |= self._pack_draws(kept, ends, vocab)
        columns["entropy"] = packing.split(np.maximum(kept.entropy, 0).astype(packing.F16), ends)
        columns["num_entries"] = [
            part[:1] if (part == part[:1]).all() else part
            for part in packing.split(kept.num_entries.astype(packing.U32), ends)
        ]
        return [{name: parts[i] for name, parts in columns.items()} for i in range(len(lengths))]

    def _pack_head(
        self, kept: Selection, ends: list[int], vocab: int
    ) -> dict[str, list[np.ndarray]]:
        counts, width = kept.head_sizes, kept.head_ids.shape[1]
        ids = kept.head_ids.reshape(-1)
        if not (counts == width).all():
            ids = kept.head_ids[np.arange(width) < counts[:, None]]
        row_ends = _row_ends(counts, ends)
        exact, num_exact, coarse, num_coarse = packing.pack_head(
            kept.head_log_probs, counts, self.num_exact
        )
        return {
            **_by_name(packing.pack_ids("head", ids, row_ends, vocab)),
            "head_exact": packing.split(exact, _row_ends(num_exact, ends)),
            "head_coarse": packing.split(coarse, _row_ends(num_coarse, ends)),
            "head_sizes": packing.pack_counts(counts, ends, self.top_k),
        }

    def _pack_draws(
        self, kept: Selection, ends: list[int], vocab: int
    ) -> dict[str, list[np.ndarray]]:
        num_tokens, most = kept.draw_ids.shape
        range_ends, codes = packing.pack_draws(kept.draw_log_probs)
        columns = {"draw_ends": packing.split(range_ends.reshape(-1), [2 * end for end in ends])}
        ids, codes = kept.draw_ids.reshape(-1), codes.reshape(-1)
        row_ends = [most * end for end in ends]
        if self.merges_draws:
            first = np.ones(kept.draw_ids.shape, bool)
            first[:, 1:] = kept.draw_ids[:, 1:] != kept.draw_ids[:, :-1]
            counts, kept_places = first.sum(1), np.flatnonzero(first)
            repeats = np.diff(kept_places, append=num_tokens * most).astype(packing.U8)
            ids, codes, row_ends = ids[kept_places], codes[kept_places], _row_ends(counts, ends)
            columns["draw_sizes"] = packing.pack_counts(counts, ends, most)
            columns["draw_repeats"] = packing.split(repeats, row_ends)
        return {
            **columns,
            **_by_name(packing.pack_ids("draw", ids, row_ends, vocab)),
            "draw_codes": packing.split(codes, row_ends),
        }

    def decode(
        self, rows: Sequence[Mapping[str, np.ndarray]], lengths: Sequence[int], vocab: int
    ) -> SparseTeacher:
        """Return the teacher of the rows' tokens; see `Codec.decode`.

        The stored numbers are rounded, so head and tail sum to 1 only to a few parts in 1000.
        They are divided by their sum: a wrong sum would be an error of the loss of the same size,
        and what then remains enters times log(p / q).
        """
        return read(self.plan, rows, lengths, vocab)


def _row_ends(counts: np.ndarray, ends: Sequence[int]) -> list[int]:
    """Return where each row ends, counted in entries, if its tokens have that many."""
    return np.concatenate([[0], np.cumsum(counts)])[list(ends)].tolist()


def _by_name(rows: list[Arrays]) -> dict[str, list[np.ndarray]]:
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
