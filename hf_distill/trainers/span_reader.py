"""Spans of a batch for the loss: which tokens of another tokenizer's teacher are whose."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from hf_distill.data import sides
from hf_distill.data.span_collator import SpanCollator
from hf_distill.data.token_weights import TokenWeightsConfig
from hf_distill.losses import SPANS, SpanLoss
from hf_distill.models.signals import Signal
from hf_distill.models.spans import CommonIds, Spans
from hf_distill.models.tokenizers import describe
from hf_distill.run import Run
from hf_distill.teachers import SelfTeacher


def check_spans(run: Run, collator: SpanCollator | None, used: str) -> SpanCollator:
    """Check a run whose loss or collator is one of spans, and return its collator.

    Args:
        run: to check.
        collator: of the run.
        used: its loss in words.

    Raises:
        ValueError: only one of the two is, or a teacher cannot be asked about its own tokens, or a
            weight of tokens is the teacher's.
    """
    if collator is None or not isinstance(run.losses[0], SpanLoss):
        name = type(getattr(run.collator, "__self__", run.collator)).__name__
        used = used.removeprefix("divergence ")
        raise ValueError(
            f"divergence {SPANS!r} and a SpanCollator need each other, got {used} with a {name}"
        )
    entropy = cast(TokenWeightsConfig, run.args.token_weights).entropy
    if entropy != 0:
        raise ValueError(
            "token_weights.entropy is the teacher's at each token of the student, which a teacher "
            f"of another tokenizer has not, got {entropy} with a SpanCollator"
        )
    one, other = collator.student_tokenizer, collator.teacher_tokenizer
    for teacher in run.teachers:
        if isinstance(teacher, SelfTeacher) and not collator.aligner.is_one:
            raise ValueError(
                "the teacher is the student itself and needs its tokenizer, got "
                f"{describe(one)} and {describe(other)}: give the other's model as teacher"
            )
        if not teacher.knows_new_rows:
            raise ValueError(
                "a SpanCollator makes rows in the teacher's own tokens, which a "
                f"{type(teacher).__name__} has not read: take a model, or a server of hidden states"
            )
    return collator


class SpanReader:
    """Reads the spans of batches.

    Args:
        collator: that makes them.
        student_size: entries of the student's logits.
        is_one: whether both sides have one tokenizer; entries behind its ids are then compared too.
    """

    def __init__(self, collator: SpanCollator, student_size: int | None, is_one: bool) -> None:
        self._collator, self._size, self._is_one = collator, student_size, is_one
        self._common: CommonIds | None = None

    def _common_ids(self, signal: Signal, device: torch.device) -> CommonIds:
        if self._common is None:
            mine, theirs = cast(int, self._size), cast(int, signal.vocab)
            same = self._is_one and mine == theirs
            pairs = {i: i for i in range(mine)} if same else self._collator.common_ids
            self._common = CommonIds.of(pairs, mine, theirs)
        self._common = self._common.to(device)
        return self._common

    def signal(self, signal: Signal, batch: Mapping[str, Any]) -> Signal:
        """Return the teacher's signal with the spans of its tokens, numbered over all rows."""
        index, their_index = batch["completion_index"], batch["teacher_completion_index"]
        width = max(index.shape[1], 1)
        rows = torch.arange(len(index), device=index.device)[:, None] * width

        def flat(spans: Tensor, at: Tensor) -> Tensor:
            return torch.where(spans < 0, spans, spans + rows)[at >= 0]

        ids = batch["teacher_input_ids"].gather(1, their_index.clamp_min(0))[their_index >= 0]
        mine = flat(batch[sides.SPANS_OF_STUDENT], index)
        theirs = flat(batch[sides.SPANS], their_index)
        common = self._common_ids(signal, index.device)
        spans = Spans.of(mine, theirs, ids, len(index) * width, common)
        return replace(signal, spans=spans, paired=spans.student >= 0)
