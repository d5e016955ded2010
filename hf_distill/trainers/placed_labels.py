"""Models whose labels stand where they are predicted: masked LMs, token classifiers, seq2seq.

Shapes: B rows, T positions of the labels: those of the input, or of the decoder.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_distill.data.hint_collator import hint_collator_behind
from hf_distill.data.packed_rows import row_numbers
from hf_distill.data.sides import IGNORE_INDEX, TEACHER_PREFIX, TEACHER_ROUTE, Side
from hf_distill.models.structure import Kind
from hf_distill.run import Run
from hf_distill.trainers.causal_lm import CausalLM
from hf_distill.trainers.opsd_config import OPSDConfig
from hf_distill.trainers.tasks import Batch

DECODER_IDS = "decoder_input_ids"
OF_NEXT_TOKENS = ("token_weights", "behaviour_log_probs", "anchor_input_ids", "completion_index")


class PlacedLabels(CausalLM):
    """Does what `CausalLM` does for a model whose output at a position predicts the label there.

    The loss of an optimizer step is the mean over its labelled positions of
    alpha * soft + (1 - alpha) * hard, hard being the cross-entropy of the labels. A decoder reads
    `decoder_input_ids`; where a batch has none they are made of its labels as the student's class
    makes them, for both sides. Arguments are those of `CausalLM`.
    """

    shifts_labels: bool = False

    def __init__(self, run: Run, *args: Any) -> None:
        super().__init__(run, *args)
        self._kind, self._decodes = run.kind, run.kind == Kind.SEQ2SEQ
        self._lm: Any = run.language_model
        read = {name for teacher in run.teachers for name in teacher.inputs()}
        own = inspect.signature(self._lm.forward).parameters
        self.columns: Sequence[str] = sorted(read - {*own, self.label_name})

    def read(
        self, inputs: Mapping[str, Any], num_items: Tensor | int | None, num_averaged: int
    ) -> Batch:
        """Tell inputs and labels apart; both models read the same.

        Raises:
            ValueError: there are no labels [B, T] of integers, or the batch is one of next tokens.
        """
        self._check(inputs)
        labels = inputs["labels"]
        left_out = {"labels", TEACHER_ROUTE, *self._unread}
        own = {name: value for name, value in inputs.items() if name not in left_out}
        if self._decodes and own.get(DECODER_IDS) is None:
            own[DECODER_IDS] = decoder_ids(self._lm, labels)
        side = Side(own, labels != IGNORE_INDEX, inputs.get(TEACHER_ROUTE))
        # labels one further on, where a causal LM has those that an output predicts
        further = F.pad(labels, (1, 0), value=IGNORE_INDEX)
        return Batch({**inputs, "labels": further}, side, side, num_items, num_averaged)

    def _check(self, inputs: Mapping[str, Any]) -> None:
        labels = inputs.get("labels")
        if labels is None or labels.ndim != 2 or labels.is_floating_point():
            got = "none" if labels is None else f"{labels.dtype} of shape {list(labels.shape)}"
            raise ValueError(
                f"a batch needs integer labels of shape [rows, positions], got {got}: take "
                "DataCollatorForLanguageModeling, DataCollatorForTokenClassification or "
                "DataCollatorForSeq2Seq"
            )
        ids = inputs.get(DECODER_IDS if self._decodes else "input_ids")
        if ids is not None and ids.shape != labels.shape:
            raise ValueError(
                "labels must have the shape of the ids that their outputs belong to, got "
                f"{list(labels.shape)} and {list(ids.shape)}"
            )
        if row_numbers(inputs) is not None:
            raise ValueError(
                f"each row of a {self._kind} must stand alone, which reads all of a sequence, got "
                "packed rows (position_ids or cu_seq_lens that begin anew): take padded rows"
            )
        for name, value in inputs.items():
            others = name.startswith(TEACHER_PREFIX) and name != TEACHER_ROUTE
            if value is not None and (others or name in OF_NEXT_TOKENS):
                raise ValueError(
                    "a batch of labels that stand where they are predicted holds the same rows "
                    f"for student and teacher, each counted alike, got {name}, which is of next "
                    "tokens"
                )

    def look(self, model: nn.Module, batch: Batch) -> bool:
        """Return True: the hard loss is the labels' cross-entropy."""
        return True

    def own_labels(self, batch: Batch) -> Tensor:
        """Return the labels as the batch had them."""
        return batch.inputs["labels"][:, 1:]


def decoder_ids(lm: Any, labels: Tensor) -> Tensor:
    """Return [B, T] the ids that a decoder reads to predict labels [B, T].

    They are what `prepare_decoder_input_ids_from_labels` makes of them; where a class has no such
    method, the labels one further on, behind its config's `decoder_start_token_id`.

    Raises:
        ValueError: the config has no such id.
    """
    make = getattr(lm, "prepare_decoder_input_ids_from_labels", None)
    if make is not None:
        return make(labels=labels)
    config = lm.config
    start, pad = config.decoder_start_token_id, config.pad_token_id
    if start is None or pad is None:
        raise ValueError(
            "a decoder needs decoder_start_token_id and pad_token_id in its config, got "
            f"{start} and {pad}: set them, or give {DECODER_IDS}"
        )
    before = torch.full_like(labels[:, :1], start)
    return torch.cat([before, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORE_INDEX, pad)], 1)


def check_placed(run: Run) -> None:
    """Check the set-up of a run whose labels stand where they are predicted.

    Raises:
        ValueError: a setting is about next tokens.
    """
    args, kind = run.args, run.kind
    name = type(run.language_model).__name__
    if isinstance(args, OPSDConfig):
        raise ValueError(
            f"an OPSDTrainer samples completions and needs a causal LM, got a {kind} ({name}); use "
            "DistillTrainer"
        )
    if hint_collator_behind(run.collator) is not None:
        raise ValueError(
            f"a HintCollator makes rows of next tokens, which a {kind} ({name}) does not predict; "
            "use DataCollatorForLanguageModeling, DataCollatorForTokenClassification or "
            "DataCollatorForSeq2Seq"
        )
    if any(loss.of_tokens for loss in run.losses):
        raise ValueError(
            f"divergence {args.divergence!r} is one of next tokens, sampled or of two "
            f"vocabularies, got a {kind} ({name}): take a kind of metal_ops.DivergenceSpec"
        )
    if args.token_weights.active():
        raise ValueError(
            f"token_weights are about next tokens, got {args.token_weights} and a {kind} ({name})"
        )
    for teacher in run.teachers:
        if not teacher.reads_batches:
            raise ValueError(
                f"the teacher of a {kind} must be a model, which reads the batch; a "
                f"{type(teacher).__name__} knows next tokens"
            )
        _check_starts(run, teacher)


def _check_starts(run: Run, teacher: Any) -> None:
    """Check that both decoders begin with one token: they are given the same ids."""
    if run.kind != Kind.SEQ2SEQ or getattr(teacher, "model", None) is None:
        return
    mine, theirs = (
        getattr(x.config, "decoder_start_token_id", None)
        for x in (run.language_model, teacher.model)
    )
    if mine != theirs:
        raise ValueError(
            "student and teacher must begin to decode with one token, got decoder_start_token_id "
            f"{mine} for the student and {theirs} for the teacher"
        )
