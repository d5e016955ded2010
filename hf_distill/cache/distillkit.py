"""DistillKit's dumps: a teacher's most probable tokens, raw or compressed, in parquet.

Read in DistillKit 1.0.0 (`compression`, `sample_logits_vllm`). A row has `input_ids` [L] and one
of three layouts; vLLM's sampler writes n = L - 1 positions, entry t for token t + 1:

- `token_ids` [n, K] and `top_values` [n, K], log-probabilities.
- `compressed_logprobs` [n, bytes] and `bytepacked_indices` [n, bytes], which
  compression_config.yaml describes: `exact_k` numbers, the coefficients of a curve through the
  others, and what the curve leaves, in bins of a few bits with one scale each. Bits follow each
  other from the highest one of a byte down.
- `packed_indices`, `exact_values` and `coeffs`: logits less their mean. Those are refused: without
  the log-sum-exp of all logits nothing says how probable they are.

Shapes: n positions, K entries, M bytes.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from hf_distill.cache.arrays import IDS, ArrayLogProbs, TopKRow

CONFIG = "compression_config.yaml"
RAW = ("token_ids", "top_values")
PACKED = ("bytepacked_indices", "compressed_logprobs")
CENTRED = ("packed_indices", "exact_values", "coeffs")
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
SPECIAL_TERMS = {"sqrt": np.sqrt, "exp": np.exp}
MOST_BITS = 64


@dataclass(frozen=True)
class Bin:
    """Says how some residuals are stored: one scale, and a few bits of each."""

    scale_dtype: torch.dtype
    element_bits: int
    num_elements: int


@dataclass(frozen=True)
class Compression:
    """Says how DistillKit has compressed log-probabilities, by its own names.

    Attributes:
        d: entries of the vocabulary.
        k: entries of a position.
        exact_k: how many of them, the most probable ones, are numbers of `exact_dtype`.
        exact_dtype: see `exact_k`.
        polynomial_terms: exponents, "sqrt" and "exp": the curve through the others.
        term_dtype: of its coefficients.
        residual_bins: of what the curve leaves.
        delta_encoding: whether each number is the difference to the one before.
        normalize_t: whether the curve's argument goes from 0 to 1, and not by 1 for each entry.
    """

    d: int
    k: int
    exact_k: int
    exact_dtype: torch.dtype
    polynomial_terms: tuple[int | str, ...]
    term_dtype: torch.dtype
    residual_bins: tuple[Bin, ...]
    delta_encoding: bool
    normalize_t: bool

    @classmethod
    def read(cls, path: Path) -> "Compression":
        """Read a compression_config.yaml.

        Raises:
            ValueError: it is none, or has a value that is not known here; naming it.
        """
        try:
            content = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} must be YAML: {error}") from error
        if not isinstance(content, Mapping):
            raise ValueError(f"{path} must be a mapping, got {type(content).__name__}")
        content = content.get("logprob_compressor") or content
        try:
            return cls._from(content)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} must describe a compression: {error!r}") from error

    @classmethod
    def _from(cls, content: Mapping[str, Any]) -> "Compression":
        bins = tuple(
            Bin(DTYPES[x["scale_dtype"]], int(x["element_bits"]), int(x["num_elements"]))
            for x in content.get("residual_bins") or ()
        )
        terms = tuple(content.get("polynomial_terms") or ())
        made = cls(
            d=int(content["d"]),
            k=int(content["k"]),
            exact_k=int(content["exact_k"]),
            exact_dtype=DTYPES[content.get("exact_dtype", "float32")],
            polynomial_terms=terms,
            term_dtype=DTYPES[content.get("term_dtype", "float32")],
            residual_bins=bins,
            delta_encoding=bool(content.get("delta_encoding", True)),
            normalize_t=bool(content.get("normalize_t", False)),
        )
        unknown = [x for x in terms if not (type(x) is int or x in SPECIAL_TERMS)]
        if unknown:
            raise ValueError(f"terms must be integers or {sorted(SPECIAL_TERMS)}, got {unknown[0]}")
        if not 0 <= made.exact_k <= made.k <= made.d or made.k < 1:
            raise ValueError(
                f"0 <= exact_k <= k <= d must hold, got {made.exact_k}, {made.k}, {made.d}"
            )
        if any(not 1 <= x.element_bits <= MOST_BITS for x in bins):
            raise ValueError(f"element_bits must be in [1, {MOST_BITS}]")
        if sum(x.num_elements for x in bins) > made.k - made.exact_k:
            raise ValueError("residual_bins must have at most k - exact_k elements together")
        return made

    @property
    def index_bits(self) -> int:
        """Return the bits of an id."""
        return max((self.d - 1).bit_length(), 1)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of a position's log-probabilities."""
        exact = self.exact_k * self.exact_dtype.itemsize
        terms = len(self.polynomial_terms) * self.term_dtype.itemsize
        bins = sum(
            x.scale_dtype.itemsize + -(-x.num_elements * x.element_bits // 8)
            for x in self.residual_bins
        )
        return exact + terms + bins

    def ids(self, packed: np.ndarray) -> np.ndarray:
        """Return ids [n, k] int64 of bytes [n, M] uint8."""
        return unpack_bits(packed, self.index_bits, self.k)

    def log_probs(self, packed: np.ndarray) -> np.ndarray:
        """Return log-probabilities [n, k] float64, descending, of bytes [n, M] uint8.

        A curve may rise where the entries, which are stored in order, do not: a value above one
        before it becomes that one.
        """
        at = self.exact_k * self.exact_dtype.itemsize
        exact = _numbers(packed[:, :at], self.exact_dtype)
        stop = at + len(self.polynomial_terms) * self.term_dtype.itemsize
        terms = _numbers(packed[:, at:stop], self.term_dtype)
        rest = terms @ self._curve().T
        start = 0
        for each in self.residual_bins:
            at, stop = stop, stop + each.scale_dtype.itemsize
            scale = _numbers(packed[:, at:stop], each.scale_dtype)
            at, stop = stop, stop + -(-each.num_elements * each.element_bits // 8)
            codes = unpack_bits(packed[:, at:stop], each.element_bits, each.num_elements)
            rest[:, start : start + each.num_elements] += _centred(codes, each.element_bits) * scale
            start += each.num_elements
        values = np.concatenate([exact, rest], axis=-1)
        if self.delta_encoding:
            values = values.cumsum(-1)
        return np.minimum.accumulate(values, axis=-1)

    def _curve(self) -> np.ndarray:
        """Return what the coefficients are multiplied by [k - exact_k, terms]."""
        count = self.k - self.exact_k
        t = np.linspace(0, 1, count) if self.normalize_t else np.arange(count, dtype=np.float64)
        columns = [
            SPECIAL_TERMS[x](t) if isinstance(x, str) else t**x for x in self.polynomial_terms
        ]
        return np.stack(columns, -1) if columns else np.zeros((count, 0))


def _numbers(packed: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return bytes [n, M] as numbers [n, M / itemsize], float64."""
    if not packed.shape[1]:
        return np.zeros(packed.shape)
    values = torch.from_numpy(np.array(packed, np.uint8, order="C")).view(dtype)
    return values.double().numpy()


def _centred(codes: np.ndarray, bits: int) -> np.ndarray:
    return codes * 2.0 - 1.0 if bits == 1 else codes - 2.0 ** (bits - 1)


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return [n, count] int64 of bytes [n, M]: numbers of so many bits, the highest bit first."""
    flags = np.unpackbits(np.ascontiguousarray(packed, np.uint8), axis=-1)[:, : bits * count]
    weights = np.left_shift(np.int64(1), np.arange(bits - 1, -1, -1, dtype=np.int64))
    return flags.reshape(len(packed), count, bits).astype(np.int64) @ weights


class DistillKitLogProbs(ArrayLogProbs):
    """Reads the parquet files that DistillKit's capture of a teacher writes.

    Rows that DistillKit has packed are cut at the numbers of their `attention_mask`.

    Args:
        path: a file, a folder, or a data set of the hub.
        top_k: entries of each token that are kept, >= 1; there must be as many.
        name: of the teacher, for the manifest.
        config: compression_config.yaml, with which compressed values were written; None is the one
            beside the files.
        entries: see `ArrayLogProbs`.
        split: of a folder or a data set of the hub.

    Raises:
        ValueError: see `ArrayLogProbs`; or the layout is that of centred logits.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        top_k: int,
        name: str,
        *,
        config: str | os.PathLike[str] | None = None,
        entries: str | None = None,
        split: str = "train",
    ) -> None:
        self._config = config
        self._compression: Compression | None = None
        super().__init__(path, top_k, name, entries=entries, split=split)

    def _columns(self) -> dict[str, str]:
        columns = set(self._table.columns)
        found = self._named({"ids": IDS[:1]})
        if "ids" in found and set(PACKED) <= columns:
            self._compression = Compression.read(self._config_path())
            return found | {"top_ids": PACKED[0], "log_probs": PACKED[1]}
        if "ids" in found and set(RAW) <= columns:
            return found | {"top_ids": RAW[0], "log_probs": RAW[1]}
        if set(CENTRED) <= columns:
            raise ValueError(
                f"{self.path} has logits less their mean ({', '.join(CENTRED)}): without the "
                "log-sum-exp of all logits nothing says how probable they are, and the mass of "
                "the rest is lost; capture the teacher again with a logprob_compressor"
            )
        layouts = " or ".join(" and ".join((IDS[0], *x)) for x in (PACKED, RAW))
        raise ValueError(f"{self.path} must have columns {layouts}, got {sorted(columns)}")

    def _config_path(self) -> Path:
        if self._config is not None:
            return Path(self._config)
        path = Path(self.path)
        folder = path if path.is_dir() else path.parent
        if not (folder / CONFIG).is_file():
            raise ValueError(
                f"{self.path}: compressed log-probabilities need the {CONFIG} that they were "
                f"written with, and {folder} has none: say where it is (config)"
            )
        return folder / CONFIG

    def _read(self, row: int) -> TopKRow:
        if self._compression is None:
            return super()._read(row)
        ids, values = (self._value(row, x).astype(np.uint8) for x in ("top_ids", "log_probs"))
        made = self._compression
        wanted = (-(-made.k * made.index_bits // 8), made.num_bytes)
        got = tuple(x.shape[-1] if x.ndim == 2 else 0 for x in (ids, values))
        self._check(row, not len(ids) or (got == wanted and len(ids) == len(values)), f"{wanted} "
                    f"bytes of ids and of log-probabilities by {CONFIG}, got {got}")  # fmt: skip
        if not len(ids):
            return TopKRow(np.zeros((0, made.k), np.int64), np.zeros((0, made.k)), None)
        return TopKRow(made.ids(ids), made.log_probs(values), None)
