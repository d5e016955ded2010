"""Numbers in few bytes: ids in 16 bits and planes of bits, log-probabilities in 8 or 16 bits.

Arrays are 1-D and belong to one row of the data; what joins rows takes the size of each row's part.
A bit plane holds one bit of each id, eight to a byte, the first id in the highest bit; it is padded
to whole bytes at the end of the row.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor, from_numpy

Rows = Sequence[Mapping[str, np.ndarray]]

U8, U16, U32 = np.dtype("u1"), np.dtype("<u2"), np.dtype("<u4")
F16, F32 = np.dtype("<f2"), np.dtype("<f4")

LOW_BITS = 16
LARGEST_FP16 = float(np.finfo(np.float16).max)
DEEPEST = 32.0  # nats that the 8-bit codes reach down; e^-32 of the mass is nobody's
LEVELS = 255


def num_planes(vocab: int) -> int:
    """Bits of an id of that vocabulary beyond the lowest 16."""
    return max(0, (vocab - 1).bit_length() - LOW_BITS)


def id_arrays(prefix: str, vocab: int) -> dict[str, np.dtype]:
    """Names and dtypes of packed ids: `<prefix>_low`, and `<prefix>_bit<i>` for each higher bit."""
    planes = {f"{prefix}_bit{LOW_BITS + i}": U8 for i in range(num_planes(vocab))}
    return {f"{prefix}_low": U16, **planes}


def plane_bytes(num_ids: int) -> int:
    """Bytes of one bit plane of a row with that many ids."""
    return -(-num_ids // 8)


def pack_ids(prefix: str, ids: np.ndarray, ends: Sequence[int], vocab: int) -> list[dict]:
    """The arrays of each row.

    Args:
        prefix: of the names.
        ids: [all rows' ids] integers in [0, vocab).
        ends: where each row's ids end.
        vocab: decides how many planes there are.
    """
    low = ids.astype("<u2")
    names = id_arrays(prefix, vocab)
    high = [(ids >> bit & 1).astype(bool) for bit in range(LOW_BITS, LOW_BITS + len(names) - 1)]
    return [
        dict(zip(names, [low[a:b], *(np.packbits(plane[a:b]) for plane in high)], strict=True))
        for a, b in pairwise([0, *ends])
    ]


def _bits(packed: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """[sum of sizes] uint8: a plane of all rows, without the padding at the rows' ends."""
    if all(size % 8 == 0 for size in sizes[:-1]):
        return np.unpackbits(packed, count=sum(sizes))
    starts = np.cumsum([0, *map(plane_bytes, sizes)])
    rows = zip(pairwise(starts), sizes, strict=True)
    return np.concatenate([np.unpackbits(packed[a:b], count=size) for (a, b), size in rows])


def unpack_ids(prefix: str, rows: Rows, sizes: Sequence[int], vocab: int) -> Tensor:
    """[sum of sizes] int64 ids of all rows.

    Raises:
        ValueError: an array is missing or has a wrong size, or an id is not in [0, vocab).
    """
    low, *planes = id_arrays(prefix, vocab)
    ids = join(rows, low, U16, sizes).astype(np.int32)
    if planes:
        packed_sizes = [plane_bytes(size) for size in sizes]
        high = np.zeros(len(ids), np.uint8 if len(planes) <= 8 else np.uint16)
        for name in reversed(planes):
            high <<= 1
            high |= _bits(join(rows, name, U8, packed_sizes), sizes)
        wide = high.astype(np.int32)
        wide <<= LOW_BITS
        ids |= wide
    if ids.size and int(ids.max()) >= vocab:
        raise ValueError(f"{prefix} ids must be below {vocab}, got {int(ids.max())}")
    return from_numpy(ids).long()


def join(rows: Rows, name: str, dtype: np.dtype, sizes: Sequence[int]) -> np.ndarray:
    """One array of all rows, each part checked.

    Raises:
        ValueError: a row has no such array, or one of another dtype or size.
    """
    parts = [row.get(name) for row in rows]
    for index, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        if part is None:
            raise ValueError(f"row {index} has no array {name!r}")
        if part.dtype != dtype or part.ndim != 1 or part.size != size:
            raise ValueError(
                f"{name} of row {index} must be {dtype} [{size}], "
                f"got {part.dtype} {list(part.shape)}"
            )
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def half(log_probs: np.ndarray) -> np.ndarray:
    """Log-probabilities as little-endian float16, finite where they are finite."""
    finite = np.clip(log_probs, -LARGEST_FP16, 0.0)
    return np.where(np.isneginf(log_probs), -np.inf, finite).astype(F16)


def whole(stored: np.ndarray) -> Tensor:
    """Float32 of stored float16."""
    return from_numpy(stored.astype(np.float16, copy=False)).float()


def pack_counts(counts: np.ndarray, ends: Iterable[int], usual: int) -> list[np.ndarray]:
    """[tokens] uint8 per row, or nothing where every token of the row has the usual count."""
    parts = (counts[a:b] for a, b in pairwise([0, *ends]))
    return [np.empty(0, "u1") if (part == usual).all() else part.astype("u1") for part in parts]


def unpack_counts(rows: Rows, name: str, lengths: Sequence[int], usual: int) -> np.ndarray | None:
    """[N] int64 counts of all tokens, or None if every one is the usual count.

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
    """Sum of the tokens' counts, per row; `usual` each where counts is None."""
    if counts is None:
        return [length * usual for length in lengths]
    sums = np.concatenate([[0], np.cumsum(counts)])[np.cumsum([0, *lengths])]
    return np.diff(sums).tolist()


def pack_sums(
    log_sums: np.ndarray, orders: Sequence[float], log_tail: np.ndarray, num_tail: np.ndarray
) -> np.ndarray:
    """[N, m] uint16: where the tail's log power sums lie between their bounds.

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
        share = (log_sums - even) / reach
    return np.rint(np.clip(np.nan_to_num(share), 0, 1) * 65535).astype("<u2")


def unpack_sums(
    stored: np.ndarray, orders: Sequence[float], log_tail: np.ndarray, num_tail: np.ndarray
) -> np.ndarray:
    """[N, m] float32 log power sums; the arguments are those of `pack_sums`."""
    even, reach = _sum_bounds(orders, log_tail, num_tail)
    return even + stored * np.float32(1 / 65535) * reach


def _sum_bounds(
    orders: Sequence[float], log_tail: np.ndarray, num_tail: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """[N, m] float32 log sum if even, and what is to be added if one entry has all."""
    alpha = np.asarray(orders, np.float32)
    spread = np.log(np.maximum(num_tail, 1).astype(np.float32))[:, None] * (1 - alpha)
    return spread + alpha * log_tail[:, None], -spread


def pack_head(
    log_probs: np.ndarray, counts: np.ndarray, num_exact: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Descending log-probabilities: the first few and the last in 16 bits, between them 8.

    The 8 bits divide the way from the last of the first few to the last entry evenly.

    Args:
        log_probs: [N, K] float32, descending.
        counts: [N] entries that count, at least 1.
        num_exact: how many are the first few, at least 1.

    Returns:
        The 16-bit values of all tokens and how many each token has, the 8-bit ones and how many.
    """
    exact, coarse = head_masks(log_probs.shape[1], counts, num_exact)
    values = log_probs
    if log_probs.shape[1] > num_exact:
        top = half(log_probs[:, num_exact - 1]).astype(np.float32)
        values = log_probs.copy()
        deepest = (np.where(np.isfinite(top), top, 0) - DEEPEST)[:, None]
        values[:, num_exact:] = np.maximum(values[:, num_exact:], deepest)
    stored = half(values)
    codes = np.empty(0, "u1")
    if coarse.any():
        last = np.take_along_axis(stored, counts[:, None] - 1, axis=1).astype(np.float32)
        way = np.maximum(stored[:, num_exact - 1 : num_exact].astype(np.float32) - last, 1e-6)
        share = (stored[:, num_exact - 1 : num_exact].astype(np.float32) - values) / way
        codes = np.rint(np.clip(share[coarse], 0, 1) * LEVELS).astype("u1")
    return stored[exact], exact.sum(1), codes, coarse.sum(1)


def head_masks(width: int, counts: np.ndarray, num_exact: int) -> tuple[np.ndarray, np.ndarray]:
    """[N, width] bool: which entries of the head have 16 bits, and which have 8."""
    place, counts = np.arange(width), counts[:, None]
    coarse = (place >= num_exact) & (place < counts - 1)
    return (place < counts) & ~coarse, coarse
