"""CachedTeacher: a teacher that was run before, read from disk."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_distill.cache import fingerprints
from hf_distill.cache.cached_head import CachedHead
from hf_distill.cache.codecs import Codec, HiddenStates, make_codec
from hf_distill.cache.columns import move_to_device, pad_tokens, select_tokens, unpad_tokens
from hf_distill.cache.errors import (
    CacheCorrupt,
    TeacherMismatch,
    TemperatureOutOfRange,
    TokenizerMismatch,
    UnsupportedDivergence,
    VocabSizeMismatch,
)
from hf_distill.cache.fingerprints import Collator
from hf_distill.cache.reader import CacheReader
from hf_distill.cache.shard import Row
from hf_distill.data.cross_tokenizer_collator import find_cross_tokenizer_collator
from hf_distill.data.hint_schedule import hint_schedule_of
from hf_distill.data.sides import TEACHER_STORED, Side, student_side, teacher_side
from hf_distill.losses import DivergenceLoss
from hf_distill.models.signals import Signal, TailRule
from hf_distill.run import Run
from hf_distill.teachers.base import Teacher
from metal_ops import DivergenceSpec, SparseTeacher, sparse_divergence

logger = logging.getLogger(__name__)

TAILS = ("auto", "sampled", "bucket", "renorm")
TEACHER_FIELDS = ("config_sha256", "weights_fingerprint")


class CachedTeacher(Teacher):
    """Reads a teacher that `cache_teacher` has written down.

    It answers for the rows that were written, which it knows by their token ids: in any order and
    batch, with any padding, with all or some of the tokens that were scored then. Another
    tokenizer, template, truncation or hint gives other ids, and an error. In a trainer the data
    loader's workers read it.

    Args:
        path: the cache's folder, or a URL that fsspec knows.
        tail: says how a loss reads what lies outside the stored entries. "auto" uses draws where
            there are some, and one category otherwise. "sampled" uses draws, "bucket" uses one
            category, and "renorm" leaves the rest out, which is biased. See
            `metal_ops.sparse_divergence`.
        max_ratio: the largest weight of a draw, at least 1. None means no limit. See
            `metal_ops.sparse_divergence`.
        verify: says which checksums are compared: "lazy" compares that of a shard when it is first
            read, "full" compares all of them now, and "size" compares none.
        teacher: the model or the name that must have been cached. With None, any teacher is
            accepted.
        copies: the folder for copies of a remote cache's shards. None is `hf_distill` under
            HF_HOME.

    Attributes:
        manifest: what is in the cache.
        codec: how it is stored.

    Raises:
        CacheIncomplete, CacheCorrupt, FormatVersionError: see `CacheReader`.
        TeacherMismatch: another teacher was cached.
        UnsupportedDivergence: the codec stores nothing that `tail` could read.
        ValueError: an argument is out of range.
    """

    reads_batches = False
    knows_new_rows = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        tail: str = "auto",
        max_ratio: float | None = 4.0,
        verify: str = "lazy",
        teacher: nn.Module | str | None = None,
        copies: str | os.PathLike[str] | None = None,
    ) -> None:
        if tail not in TAILS:
            raise ValueError(f"tail must be one of {TAILS}, got {tail!r}")
        if max_ratio is not None and not max_ratio >= 1:
            raise ValueError(f"max_ratio must be at least 1, or None, got {max_ratio}")
        self.rule = TailRule(tail, max_ratio)
        self.reader = CacheReader(path, verify, copies)
        self.manifest = self.reader.manifest
        self.codec = self._codec()
        codec = self.codec
        self._head = CachedHead(self.reader, codec) if isinstance(codec, HiddenStates) else None
        # decoded once, so that batches from a loader know which kind of teacher they are of
        self._like = self.decoded([])
        if isinstance(self._like, SparseTeacher):
            self._check_tail(self._like)
        if teacher is not None:
            self._check_teacher(teacher)

    def _check_tail(self, known: SparseTeacher) -> None:
        """Check that what is stored serves the tail rule."""
        tail = self.rule.tail
        if tail == "sampled" and known.samples is None:
            raise UnsupportedDivergence(
                f"{self.reader.path}: codec {self.codec.name!r} stores no draws: take tail "
                "'bucket', or cache with 'head_samples'"
            )
        if tail in ("bucket", "renorm") and not known.ids.shape[-1]:
            raise UnsupportedDivergence(
                f"{self.reader.path}: codec {self.codec.name!r} stores draws only: take tail "
                f"'sampled', or cache with 'head_samples' or 'topk'; got {tail!r}"
            )

    def _codec(self) -> Codec:
        about = self.manifest.config["codec"]
        try:
            return make_codec(about["name"], about["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise CacheCorrupt(
                f"{self.reader.path}: the manifest must name a codec and its settings: {error}"
            ) from error

    def _check_teacher(self, teacher: nn.Module | str) -> None:
        about = self.manifest.config["teacher"]
        if isinstance(teacher, str):
            pairs = [("name_or_path", about.get("name_or_path"), teacher)]
        else:
            found = fingerprints.teacher_identity(teacher)
            pairs = [(name, about.get(name), found[name]) for name in TEACHER_FIELDS]
        for name, cached, given in pairs:
            if cached != given:
                raise TeacherMismatch(
                    f"{self.reader.path}: the cached teacher's {name} must be {given!r}, got "
                    f"{cached!r} ({about.get('name_or_path')!r})"
                )

    def check(self, run: Run) -> None:
        """Check that what is stored serves the run's losses, with the tokenizer of the writing.

        Raises:
            ValueError: hints depend on the step, or the loss reads every token's log-probability.
            TemperatureOutOfRange, UnsupportedDivergence, TokenizerMismatch: see `check_spec`.
        """
        plan = hint_schedule_of(run.collator)
        if plan is not None:
            raise ValueError(
                "a cached teacher knows its rows with the hints of the writing, and "
                f"{plan.refusal()}"
            )
        entropy = getattr(run.args.token_weights, "entropy", 0.0)
        low, high = self.codec.temperature_range
        if entropy != 0 and not low <= 1.0 <= high:
            raise ValueError(
                "token_weights.entropy is the teacher's at temperature 1, the cache serves "
                f"{low:g} to {high:g}: write it with a temperature_range that has 1"
            )
        specs = [each.spec for each in run.losses if isinstance(each, DivergenceLoss)]
        crossing = find_cross_tokenizer_collator(run.collator)
        # of two tokenizers the teacher's is the one that its rows were written with
        tokenizer = run.processing_class if crossing is None else crossing.teacher_tokenizer
        # with alpha 0 the divergence is still measured, so its spec is checked too
        for spec in dict.fromkeys(specs):
            self.check_spec(spec, tokenizer)
            tokenizer = None  # checked once: it is the same for all
        if not specs:
            self.check_tokenizer(tokenizer)

    @property
    def dense(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return whether the whole distribution is known."""
        return isinstance(self._like, Tensor)

    def collator(self, collator: Any) -> Any:
        """Wrap the collator, so that a data loader's workers read what is stored of its rows."""
        return CachedCollator(collator, self)

    def wrong_vocab(self, message: str) -> Exception:
        """Return the error of a vocabulary that is not the student's."""
        return VocabSizeMismatch(f"{self.reader.path}: {message}")

    def check_spec(self, spec: DivergenceSpec, tokenizer: Any = None) -> None:
        """Check that the stored numbers serve the loss, with the tokenizer of the writing.

        Raises:
            TemperatureOutOfRange, UnsupportedDivergence: naming what to cache instead.
            TokenizerMismatch: the tokenizer or its chat template is another.
        """
        low, high = self.codec.temperature_range
        refusal = self.codec.serves(spec)
        if not low <= spec.temperature <= high:
            raise TemperatureOutOfRange(
                f"{self.reader.path}: {refusal or f'it serves {low:g} to {high:g}'}"
            )
        if refusal is not None:
            raise UnsupportedDivergence(f"{self.reader.path}: {refusal}")
        self._check_rule(spec)
        self.check_tokenizer(tokenizer)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Check that the tokenizer is that of the writing; what is no tokenizer passes.

        Raises:
            TokenizerMismatch: the tokenizer or its chat template is another.
        """
        about = self.manifest.config.get("tokenizer")
        if about is None or not isinstance(tokenizer, PreTrainedTokenizerBase):
            return
        found = fingerprints.tokenizer_identity(tokenizer) or {}
        for name in ("sha256", "chat_template_sha256"):
            if about.get(name) != found.get(name):
                raise TokenizerMismatch(
                    f"{self.reader.path}: the tokenizer's {name} must be {about.get(name)}, as "
                    f"of {about.get('name_or_path')!r}, got {found.get(name)} of "
                    f"{tokenizer.name_or_path!r}"
                )

    def _check_rule(self, spec: DivergenceSpec) -> None:
        """Compute the loss of no tokens, which raises the errors of a loss of some."""
        if isinstance(self._like, Tensor):
            return
        known = self._signal(self._like, torch.device("cpu")).sparse
        assert known is not None
        try:
            given = {"tail": self.rule.tail, "max_ratio": self.rule.max_ratio}
            none = torch.empty(0, self.manifest.vocab_size)
            sparse_divergence(none, known.at(spec.temperature), spec, **given)
        except ValueError as error:
            raise UnsupportedDivergence(
                f"{self.reader.path}: {error}; or cache with the codec 'full'"
            ) from error

    @property
    def vocab_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return the cached teacher's logits per token, padding of the vocabulary included."""
        return self.manifest.vocab_size

    def prepare(self, accelerator: Accelerator, student: nn.Module, refusal: str | None) -> None:
        """Log what is read."""
        stats, config = self.manifest.stats, self.manifest.config
        logger.info(
            "teacher %s from the cache %s: %s, %d rows, %s tokens, %s bytes/token, temperatures "
            "%g to %g, tail %s",
            config["teacher"].get("name_or_path"), self.reader.path, self.codec.name,
            len(self.reader), stats.get("tokens"), str(stats.get("bytes_per_token"))[:5],
            *self.codec.temperature_range, self.rule.tail,
        )  # fmt: skip

    def signal(self, student: nn.Module, side: Side) -> Signal:
        """Return what is stored of the scored tokens.

        Raises:
            RowMismatch, CacheCorrupt: see `CacheReader.match`.
            ValueError: rows are not known by their ids alone.
        """
        device = side.predicts.device
        if side.stored is not None and self._travels:
            return self._signal(unpad_tokens(side.stored, self._like), device)
        found, _ = self._read(side)
        return self._signal(found, device)

    def _signal(self, found: SparseTeacher | Tensor, device: torch.device) -> Signal:
        if self._head is not None:
            assert isinstance(found, Tensor)
            return self._head.signal(found, device)
        if isinstance(found, Tensor):
            return Signal(logits=found.to(device))
        if self.rule.tail in ("bucket", "renorm"):
            found = found._replace(samples=None)
        return Signal(sparse=move_to_device(found, device), tail=self.rule)

    def _read(self, side: Side) -> tuple[SparseTeacher | Tensor, list[int]]:
        """Return the teacher of a side's scored tokens, on the CPU, and how many each row has."""
        wanted = fingerprints.side_rows(side)
        scored = [row for row in wanted if len(row.positions)]
        matches = [self.reader.match(row) for row in scored]
        rows = [row for row, _ in matches]
        found = self.decoded(rows)
        starts = np.cumsum([0, *(len(row.positions) for row in rows)])
        parts = [at + start for (_, at), start in zip(matches, starts, strict=False)]
        at = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]))
        if len(at) != starts[-1]:  # not all tokens that were scored at the writing are now
            found = found[at] if isinstance(found, Tensor) else select_tokens(found, at)
        return found, [len(row.positions) for row in wanted]

    def decoded(self, rows: Sequence[Row]) -> SparseTeacher | Tensor:
        """Return what is stored of rows' tokens, on the CPU; see `Codec.decode`.

        Raises:
            CacheCorrupt: a row is not what was written.
        """
        lengths = [len(row.positions) for row in rows]
        width = self.manifest.vocab_size if self._head is None else self._head.width
        try:
            return self.codec.decode([row.arrays for row in rows], lengths, width)
        except ValueError as error:
            numbers = [row.row for row in rows]
            raise CacheCorrupt(f"{self.reader.path}, rows {numbers}: {error}") from error

    def hidden(self, stored: Tensor) -> Tensor:
        """Return hidden states of what is stored of tokens, of a cache that has them; [N, R]."""
        assert self._head is not None
        return self._head.hidden(stored)

    def columns(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return what a loader puts into a batch, see `pad_tokens`; nothing of whole logits."""
        if not self._travels:
            return {}  # [tokens, vocab] is read where it is used, not sent from a worker
        found, lengths = self._read(teacher_side(batch, student_side(batch)))
        return pad_tokens(found, lengths)

    @property
    def _travels(self) -> bool:
        """Return whether a loader's workers send what is stored."""
        return self._head is not None or isinstance(self._like, SparseTeacher)


class CachedCollator:
    """Makes batches that carry what is stored of their rows.

    `DistillTrainer` wraps its own collator in one, so that its data loader's workers read the
    cache.

    Args:
        collator: of the training.
        teacher: from the cache.
    """

    def __init__(self, collator: Collator, teacher: CachedTeacher) -> None:
        self.collator, self.teacher = collator, teacher
        self.columns = tuple(getattr(collator, "columns", ()))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the collator's batch, with `teacher_stored`."""
        batch = dict(self.collator(rows))
        columns = self.teacher.columns(batch)
        return batch | {TEACHER_STORED: columns} if columns else batch
