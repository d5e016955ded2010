"""Numbers in few bytes: ids as 16 bits and a field of bits, log-probabilities in 8 or 16 bits.

Arrays are 1-D and belong to one row of the data; what joins rows takes the size of each row's part.
The bits of an id beyond the lowest 16 are a field of 1, 2, 4, 8 or 16 bits. Fields follow each
other from the lowest bit of a byte up, and the row ends with a whole byte.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np
from torch import Tensor, from_numpy

from hf_distill.cache.codecs.protocol import Arrays

Rows = Sequence[Mapping[str, np.ndarray]]

U8, U16, U32 = np.dtype("u1"), np.dtype("<u2"), np.dtype("<u4")
F16, F32 = np.dtype("<f2"), np.dtype("<f4")

LOW_BITS = 16
LARGEST_FP16 = float(np.finfo(np.float16).max)
DEEPEST = 32.0  # nats that the 8-bit codes reach down; e^-32 of the mass is nobody's
LEVELS = 255


def field_bits(vocab: int) -> int:
    """Return the bits stored per id beyond the lowest 16; vocab is at most 2^31 entries."""
    needed = (vocab - 1).bit_length() - LOW_BITS
    return next(bits for bits in (0, 1, 2, 4, 8, 16) if bits >= needed)


def id_arrays(prefix: str, vocab: int) -> dict[str, np.dtype]:
    """Return names and dtypes of packed ids: `<prefix>_low` and, if needed, `<prefix>_high`."""
    high = {f"{prefix}_high": U8} if field_bits(vocab) else {}
    return {f"{prefix}_low": U16, **high}


def _field_bytes(num_ids: int, bits: int) -> int:
    return -(-num_ids * bits // 8)


def pack_ids(prefix: str, ids: np.ndarray, ends: Sequence[int], vocab: int) -> list[Arrays]:
    """Pack the ids of each row into arrays.

    Args:
        prefix: of the names.
        ids: [all rows' ids] integers in [0, vocab).
        ends: where each row's ids end.
        vocab: decides how many bits are stored.
    """
    bits = field_bits(vocab)
    rows = [{f"{prefix}_low": part} for part in split(ids.astype(U16), ends)]
    if bits:
        sizes = np.diff([0, *ends]).tolist()
        byte_ends = accumulate(_field_bytes(size, bits) for size in sizes)
        packed = split(_pack_fields(ids >> LOW_BITS, sizes, bits), byte_ends)
        for row, part in zip(rows, packed, strict=True):
            row[f"{prefix}_high"] = part
    return rows


def _pack_fields(fields: np.ndarray, sizes: Sequence[int], bits: int) -> np.ndarray:
    """Pack the fields of all rows into bytes; each row starts with a byte of its own."""
    if bits == 16:
        return fields.astype(U16).view(U8)
    fields, per_byte = fields.astype(U8), 8 // bits
    if any(size % per_byte for size in sizes):
        rows = split(fields, accumulate(sizes))
        fields = np.concatenate([np.pad(row, (0, -len(row) % per_byte)) for row in rows])
    packed = np.zeros(len(fields) // per_byte, U8)
    for i in range(per_byte):
        packed |= fields[i::per_byte] << (i * bits)
    return packed


@functools.cache
def _table(bits: int) -> np.ndarray:
    """Return [256, fields of a byte] int64: the fields' values, at their place in an id."""
    shifts = np.arange(0, 8, bits)
    fields = np.arange(256)[:, None] >> shifts & ((1 << bits) - 1)
    return fields.astype(np.int64) << LOW_BITS


def _high(rows: Rows, name: str, sizes: Sequence[int], bits: int) -> np.ndarray:
    """Return [sum of sizes] int64: the ids with their lowest 16 bits set to 0."""
    num_bytes = [_field_bytes(size, bits) for size in sizes]
    stored = join(rows, name, U8, num_bytes)
    if bits == 16:
        return stored.view(U16).astype(np.int64) << LOW_BITS
    ids = np.take(_table(bits), stored, axis=0).reshape(-1)
    if all(size * bits % 8 == 0 for size in sizes[:-1]):
        return ids[: sum(sizes)]
    starts = [0, *accumulate(size * 8 // bits for size in num_bytes)]
    return np.concatenate([ids[a : a + size] for a, size in zip(starts, sizes, strict=False)])


def unpack_ids(prefix: str, rows: Rows, sizes: Sequence[int], vocab: int) -> Tensor:
    """Return [sum of sizes] int64, the ids of all rows.

    Raises:
        ValueError: an array is missing or has a wrong size, or an id is not in [0, vocab).
    """
    low, bits = join(rows, f"{prefix}_low", U16, sizes), field_bits(vocab)
    if bits:
        ids = _high(rows, f"{prefix}_high", sizes, bits)
        ids |= low
    else:
        ids = low.astype(np.int64)
    if ids.size and int(ids.max()) >= vocab:
        raise ValueError(f"{prefix} ids must be below {vocab}, got {int(ids.max())}")
    return from_numpy(ids)


def split(values: np.ndarray, ends: Iterable[int]) -> list[np.ndarray]:
    """Cut an array into the parts that end at `ends`."""
    return [values[a:b] for a, b in pairwise([0, *ends])]


def join(rows: Rows, name: str, dtype: np.dtype, sizes: Sequence[int]) -> np.ndarray:
    """Join the arrays of all rows into one, after a check of each.

    Raises:
        ValueError: a row has no such array, or one of another dtype or size.
    """
    parts = []
    for index, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        part = row.get(name)
        parts.append(part)
        if part is None:
            raise ValueError(f"row {index} has no array {name!r}")
        if part.dtype != dtype or part.ndim != 1 or part.size != size:
            raise ValueError(
                f"{name} of row {index} must be {dtype} [{size}], "
                f"got {part.dtype} {list(part.shape)}"
            )
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def half(log_probs: np.ndarray) -> np.ndarray:
    """Return log-probabilities as little-endian float16, finite where they are finite."""
    finite = np.clip(log_probs, -LARGEST_FP16, 0.0)
    return np.where(np.isneginf(log_probs), -np.inf, finite).astype(F16)


def whole(stored: np.ndarray) -> Tensor:
    """Return stored float16 as float32."""
    return from_numpy(stored.astype(np.float16, copy=False)).float()


def pack_counts(counts: np.ndarray, ends: Iterable[int], usual: int) -> list[np.ndarray]:
    """Return [tokens] uint8 per row, empty where every token has the usual count."""
    parts = split(counts.astype(U8), ends)
    return [part[:0] if (part == usual).all() else part for part in parts]


def unpack_counts(rows: Rows, name: str, lengths: Sequence[int], usual: int) -> np.ndarray | None:
    """Return [N] int64 counts of all tokens, or None if every one is the usual count.

    Raises:
        ValueError: an array is missing, has a wrong size, or a count is not in [1, usual].
    """
    stored = [np.size(row.get(name, ())) for row in rows]
    if not any(stored):
        join(rows, name, U8, stored)
        return None
    sizes = [length if size else 0 for length, size in zip(lengths, stored, strict=True)]
    counts = join(rows, name, U8, sizes).astype(np.int64)
    if counts.size and not 1 <= counts.min() <= counts.max() <= usual:
        raise ValueError(
            f"{name} must be in [1, {usual}], got {int(counts.min())} to {int(counts.max())}"
        )
    spread = np.full(sum(lengths), usual, np.int64)
    spread[np.repeat(np.asarray(sizes) > 0, lengths)] = counts
    return spread


def totals(counts: np.ndarray | None, lengths: Sequence[int], usual: int) -> list[int]:
    """Sum the tokens' counts of each row; where counts is None, each token counts `usual`."""
    if counts is None:
        return [length * usual for length in lengths]
    sums = np.concatenate([[0], np.cumsum(counts)])[np.cumsum([0, *lengths])]
    return np.diff(sums).tolist()


def pack_sums(
    log_sums: np.ndarray, orders: Sequence[float], log_tail: np.ndarray, num_tail: np.ndarray
) -> np.ndarray:
    """Return [N, m] uint16: where the tail's log power sums lie between their bounds.

    The sum of p ** alpha over n entries of mass t lies between t ** alpha, all on one entry, and
    n ** (1 - alpha) * t ** alpha, spread evenly. 0 is even, 65535 is one entry. So a stored number
    cannot be out of range, and its error is below log(n) / 10^5.

    Args:
        log_sums: [N, m] float32.
        orders: the m values of alpha.
        log_tail: [N] log t as it is stored.
        num_tail: [N] n.
    """
    even, reach = _sum_bounds(orders, log_tail, num_tail)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.nan_to_num((log_sums.T - even) / reach)
    return np.ascontiguousarray(np.rint(np.clip(shares, 0, 1) * 65535).astype(U16).T)


def unpack_sums(
    stored: np.ndarray, orders: Sequence[float], log_tail: np.ndarray, num_tail: np.ndarray
) -> np.ndarray:
    """Return [m, N] float32 log power sums; the arguments are those of `pack_sums`."""
    even, reach = _sum_bounds(orders, log_tail, num_tail)
    log_sums = stored.T.astype(np.float32, order="C")
    log_sums *= reach
    log_sums *= np.float32(1 / 65535)
    log_sums += even
    return log_sums


def _sum_bounds(
    orders: Sequence[float], log_tail: np.ndarray, num_tail: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return [m, N] float32: the log sum if even, and what to add if one entry has all."""
    own, rest = (np.array(x, np.float32)[:, None] for x in (orders, [1 - x for x in orders]))
    spread = np.log(np.maximum(num_tail, 1).astype(np.float32)) * rest
    return spread + own * log_tail, -spread


def codes(values: np.ndarray, top: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return uint8: how far each value is from top to last, both [N, 1] as they are stored."""
    way = np.maximum(top.astype(np.float32) - last.astype(np.float32), 1e-6)
    share = (top.astype(np.float32) - values) * (LEVELS / way)
    return np.rint(np.clip(share, 0, LEVELS)).astype(U8)


def steps(top: Tensor, last: Tensor) -> Tensor:
    """Return what one unit of a code adds to the value of top."""
    return (last - top) / LEVELS


def pack_head(
    log_probs: np.ndarray, counts: np.ndarray, num_exact: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pack descending log-probabilities: the first few and the last in 16 bits, the rest in 8.

    The 8 bits divide the way from the last of the first few to the last entry evenly.

    Args:
        log_probs: [N, K] float32, descending.
        counts: [N] entries that count, at least 1.
        num_exact: how many are the first few, at least 1.

    Returns:
        The 16-bit values of all tokens and how many each token has, the 8-bit ones and how many.
    """
    width = log_probs.shape[1]
    if width > num_exact:
        deepest = np.maximum(log_probs[:, num_exact - 1 : num_exact], -LARGEST_FP16) - DEEPEST
        log_probs = np.maximum(log_probs, deepest)
    stored = half(log_probs)
    last = stored[np.arange(len(stored)), counts - 1][:, None]
    middle = codes(log_probs[:, num_exact:], stored[:, num_exact - 1 : num_exact], last)
    if (counts == width).all():
        first = stored[:, : num_exact + 1].copy()
        first[:, -1:] = last
        sizes = np.full_like(counts, first.shape[1])
        return first.reshape(-1), sizes, middle[:, :-1].reshape(-1), width - sizes
    exact, coarse = head_masks(width, counts, num_exact)
    return stored[exact], exact.sum(1), middle[coarse[:, num_exact:]], coarse.sum(1)


def head_masks(width: int, counts: np.ndarray, num_exact: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two [N, width] bool: which entries of the head have 16 bits, and which have 8."""
    place, counts = np.arange(width), counts[:, None]
    coarse = (place >= num_exact) & (place < counts - 1)
    return (place < counts) & ~coarse, coarse


def pack_draws(log_probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pack log-probabilities in no order: each token's largest and smallest in 16 bits, all in 8.

    Args:
        log_probs: [N, n] float32, n at least 1.

    Returns:
        [N, 2] float16 and [N, n] uint8, which divide the way between the two evenly.
    """
    log_probs = np.maximum(log_probs, -LARGEST_FP16)
    top = log_probs.max(1, keepdims=True)
    last = np.maximum(log_probs.min(1, keepdims=True), top - DEEPEST)
    ends = half(np.concatenate([top, last], axis=1))
    return ends, codes(log_probs, ends[:, :1], ends[:, 1:])
