"""Whether student and teacher speak of the same ids, and how much of the vocabulary is used."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from hf_distill.data import sides
from hf_distill.data.cross_tokenizer_collator import (
    CrossTokenizerCollator,
    find_cross_tokenizer_collator,
)
from hf_distill.data.span_collator import SpanCollator, find_span_collator
from hf_distill.losses import SPANS, UNIVERSAL, CrossTokenizerLoss, SpanLoss
from hf_distill.models import signals, structure, tokenizers
from hf_distill.models.signals import Signal
from hf_distill.run import Run
from hf_distill.teachers import Teacher
from hf_distill.trainers import config_schedules
from hf_distill.trainers.span_reader import SpanReader, check_spans

logger = logging.getLogger(__name__)

LABELS = ("labels", "anchor_labels")
OWN = (
    f"divergence {UNIVERSAL!r} with a CrossTokenizerCollator, or {SPANS!r} with a SpanCollator, "
    "takes different ones"
)


class Vocabulary:
    """Compares the vocabularies of a run, and leaves padding out.

    Where student and teacher give different numbers of logits and the tokenizer has no more ids
    than either, the entries behind its last id are padding: they are left out on both sides, from
    every loss and every metric.

    Args:
        run: with its student, teacher, losses, collator and processing class.

    Attributes:
        size: entries that are used, the first; None is all.
        is_plain: whether both sides have one vocabulary, all of it used, so that only a batch with
            tokens of the teacher's own would be wrong.

    Raises:
        ValueError: the vocabularies or tokenizers are not those of one run; the message names both.
        VocabSizeMismatch: the same for a cached teacher.
    """

    def __init__(self, run: Run) -> None:
        collator = find_cross_tokenizer_collator(run.collator)
        self._tokenizer = run.tokenizer
        self._crosses = isinstance(run.losses[0], CrossTokenizerLoss)
        spanning = find_span_collator(run.collator)
        self._spans: SpanReader | None = None
        self._different: str | None = None
        self._unequal: str | None = None  # where tokenizers are not known
        self._needs_one: str | None = None
        self._is_one = False  # known to be the same
        self.size: int | None = None
        self.is_plain = False
        if run.kind.has_classes:
            return
        teachers = run.teachers
        student = structure.vocab_size(run.language_model)
        used = "a loss of your own" if run.own_loss else f"divergence {run.args.divergence!r}"
        if spanning is not None or isinstance(run.losses[0], SpanLoss):
            spanning = check_spans(run, spanning, used)
            self._different = self._check_crossing(spanning, teachers, student)
            if self._is_one:
                self._cut(run, student)
            self._spans = SpanReader(spanning, self.size or student, self._is_one)
            return
        if self._crosses:
            self._different = self._check_crossing(collator, teachers, student)
            _warn_of_temperature(run, student)
            return
        if collator is not None:
            one, other = (collator.student_tokenizer, collator.teacher_tokenizer)
            raise ValueError(
                f"a CrossTokenizerCollator needs divergence {UNIVERSAL!r}, got "
                f"{used.removeprefix('divergence ')} with "
                f"{tokenizers.describe(one)} and {tokenizers.describe(other)}"
            )
        for theirs in self._known(teachers):
            assert self._tokenizer is not None
            tokenizers.check_same(
                self._tokenizer,
                theirs,
                f"student and teacher must have one tokenizer for {used} ({OWN})",
            )
        self._cut(run, student)
        self.is_plain = self.size is None

    def _cut(self, run: Run, student: int | None) -> None:
        """Leave padding out on both sides, see the class."""
        self.size = self._shared(student, run.teachers)
        run.teacher.keep_vocab(self.size)

    def _known(self, teachers: Sequence[Teacher]) -> list[PreTrainedTokenizerBase]:
        """Return the teachers' tokenizers, as far as they and the student's are known."""
        if self._tokenizer is None:
            return []
        found = (teacher.tokenizer() for teacher in teachers)
        return [tokenizer for tokenizer in found if tokenizer is not None]

    def _check_crossing(
        self,
        collator: CrossTokenizerCollator | SpanCollator | None,
        teachers: Sequence[Teacher],
        student: int | None,
    ) -> str | None:
        """Check the tokenizers of a run; how they differ, or None where they do not."""
        mine, known = self._tokenizer, self._known(teachers)
        if collator is None:
            words = [x for x in known if mine and tokenizers.first_difference(mine, x) is not None]
            self._unequal = self._sizes(teachers, student)
            return _both(cast(Any, mine), words[0]) if words else None
        one, other = collator.student_tokenizer, collator.teacher_tokenizer
        if mine is not None:
            rule = "the processing class and the collator must have one tokenizer for the student"
            tokenizers.check_same(mine, one, rule)
        for teacher in teachers:
            theirs = teacher.tokenizer()
            if theirs is not None:
                rule = "the teacher and the collator must have one tokenizer for the teacher"
                tokenizers.check_same(theirs, other, rule)
            _check_ids(other, teacher.vocab_size, "teacher")
        _check_ids(one, student, "student")
        if tokenizers.first_difference(one, other) is None:
            if self._crosses:
                logger.warning(
                    "student and teacher have one tokenizer: divergence %r compares sorted "
                    "probabilities only, 'forward_kl' would compare those of each token",
                    UNIVERSAL,
                )
            self._is_one = True
            return None
        return _both(one, other)

    def _sizes(self, teachers: Sequence[Teacher], student: int | None) -> str | None:
        """Return how vocabularies differ whose tokenizers are not both known, or None."""
        for teacher in teachers:
            size = teacher.vocab_size
            known = self._tokenizer is not None and teacher.tokenizer() is not None
            # teachers that read no batch compare the run's tokenizer themselves
            if known or student is None or size in (None, student) or not teacher.reads_batches:
                continue
            return (
                f"{student} entries for the student and {size} for the teacher; if it is one "
                "tokenizer, and the entries behind its ids are padding, give it as "
                "processing_class and with ModelTeacher(model, tokenizer=...)"
            )
        return None

    def _shared(self, student: int | None, teachers: Sequence[Teacher]) -> int | None:
        """Return how many entries are used, or None for all."""
        sizes = [(teacher, teacher.vocab_size) for teacher in teachers]
        odd = [(teacher, size) for teacher, size in sizes if size not in (None, student)]
        if student is None or not odd:
            return None
        ids = None if self._tokenizer is None else tokenizers.num_ids(self._tokenizer)
        for teacher, size in odd:
            if ids is None or ids > min(student, size):
                raise self._mismatch(teacher, student, size)
        assert ids is not None
        for _, size in odd:
            logger.warning(
                "vocabulary: both sides are cut to the tokenizer's %d ids: %d padded entries of "
                "the student's %d, %d of the teacher's %d",
                *(ids, student - ids, student, size - ids, size),
            )
        return ids

    def _mismatch(self, teacher: Teacher, student: int, size: int) -> Exception:
        """Return the error that says why two vocabularies of different sizes cannot be used."""
        if self._tokenizer is None:
            why = "with their tokenizer as processing_class, entries that only pad are left out"
        else:
            why = (
                "only entries behind the tokenizer's ids can be left out, and it is "
                f"{tokenizers.describe(self._tokenizer)}"
            )
        return teacher.wrong_vocab(
            f"student and teacher must have one vocabulary, got {student} entries for the student "
            f"and {size} for the teacher; {why}; for different tokenizers, {OWN}"
        )

    def check(self, batch: Mapping[str, Any]) -> None:
        """Check a batch.

        Raises:
            ValueError: it has teacher rows of another tokenizer, which the divergence or a setting
                cannot compare, or lacks them; or a labelled id is beyond what is used.
        """
        own = sides.has_own_tokens(batch)
        if (batch.get(sides.SPANS) is not None) != (self._spans is not None):
            raise ValueError(
                f"a batch with {sides.SPANS} and divergence {SPANS!r} with a SpanCollator need "
                f"each other, got a batch {'without' if self._spans else 'with'} them"
            )
        if own and not (self._crosses or self._spans):
            raise ValueError(
                f"a batch with {sides.TEACHER_OWN_TOKENS} needs divergence {UNIVERSAL!r}"
            )
        if own and self._needs_one is not None and not self._is_one:
            raise ValueError(
                f"{self._needs_one} needs student and teacher to have one tokenizer, got a batch "
                f"with {sides.TEACHER_OWN_TOKENS}"
            )
        different = self._different or self._unequal
        if different is not None and not own:
            raise ValueError(
                f"different tokenizers need batches of a CrossTokenizerCollator, got {different}"
            )
        if self.size is None:
            return
        for name in LABELS:
            labels = batch.get(name)
            if labels is not None and labels.numel() and int(labels.max()) >= self.size:
                row, column = (labels >= self.size).nonzero()[0].tolist()
                raise ValueError(
                    f"labels must be below the tokenizer's {self.size} ids, to which both sides "
                    f"are cut: {name} of row {row}, position {column}, is {labels[row, column]}"
                )

    def signal(self, signal: Signal, batch: Mapping[str, Any]) -> Signal:
        """Return the teacher's signal about what is used, and about which of the scored tokens."""
        if self.size is not None:
            signal = signals.without_padding(signal, self.size)
        if self._spans is not None:
            return self._spans.signal(signal, batch)
        if self.size is None and sides.has_own_tokens(batch):
            return replace(signal, paired=sides.paired_tokens(batch))
        return signal

    def outputs(self, outputs: Any) -> Any:
        """Return a model's outputs with logits [..., size] only."""
        if self.size is not None:
            outputs.logits = outputs.logits[..., : self.size]
        return outputs

    def check_one_tokenizer(self, what: str) -> None:
        """Check one tokenizer for what compares positions that hold the same token on both sides.

        Args:
            what: the setting, for the error.

        Raises:
            ValueError: the tokenizers are known to be different. Where they are not known, `check`
                raises at the first batch with tokens of the teacher's own.
        """
        self._needs_one = what
        if self._different is not None:
            raise ValueError(
                f"{what} needs student and teacher to have one tokenizer, whose tokens stand at "
                f"the same places, got {self._different}"
            )


def _both(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    return f"{tokenizers.describe(one)} and {tokenizers.describe(other)}"


def _warn_of_temperature(run: Run, student: int | None) -> None:
    """Say that a high temperature leaves a smaller student no gradient."""
    highest = config_schedules.bounds(run.args, "temperature")[1]
    largest = max((teacher.vocab_size or 0 for teacher in run.teachers), default=0)
    if highest > 1.0 and student is not None and largest > student:
        logger.warning(
            "divergence %r at temperature %g: its gradient vanishes above temperature 1 where the "
            "teacher's vocabulary is the larger one (%d entries, the student's %d); take 1",
            *(UNIVERSAL, highest, largest, student),
        )


def _check_ids(tokenizer: PreTrainedTokenizerBase, size: int | None, side: str) -> None:
    if size is not None and tokenizers.num_ids(tokenizer) > size:
        raise ValueError(
            f"the {side}'s tokenizer must have at most its model's {size} entries, got "
            f"{tokenizers.describe(tokenizer)}"
        )
