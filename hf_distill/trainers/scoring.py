"""What of a batch is scored, and how much each token counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_distill import alignment, anchors
from hf_distill.alignment import Side
from hf_distill.losses import Anchor, Importance, Scored
from hf_distill.token_weights import KEY
from hf_distill.trainers.configs import LossSettings

BEHAVIOUR = "behaviour_log_probs"


class Share(NamedTuple):
    """The weights of a micro-batch, and what they are divided by, to be its share of a step.

    weights: [B, T] aligned with the labels, or None if every token counts as one. num_items: the
    sum of those of the step's scored tokens (without weights, their number), over all its
    micro-batches and, if the Trainer gathers them, all processes; None is that of this batch.
    num_averaged: processes whose gradients are averaged although num_items is of all of them, else
    1. num_processes: those whose gradients are averaged.
    """

    weights: Tensor | None
    num_items: Tensor | int | None
    num_averaged: int
    num_processes: int


class Work(NamedTuple):
    """The student's forward, its scored tokens, and which of them metrics count (None: all)."""

    side: Side
    scored: Scored
    counts: Tensor | None


@dataclass(frozen=True)
class Scoring:
    """Reads a batch.

    Args:
        settings: of reused completions and the anchor.
    """

    settings: LossSettings

    def work(self, batch: Mapping[str, Any], student: Side, share: Share, training: bool) -> Work:
        """What is to be computed.

        Args:
            batch: with labels [B, T].
            student: its student's side.
            share: the tokens' weights, and what the sums are divided by.
            training: the anchor is a part of the training loss only.

        Raises:
            ValueError: no token counts, or the shape of `behaviour_log_probs` is not the labels'.
        """
        targets = alignment.targets(batch["labels"], student.predicts)
        weights, counts = self._weights(student, targets, share)
        scored = Scored(targets, weights, self._importance(batch, student))
        if not training or self.settings.anchor_weight == 0.0 or not anchors.has_anchor(batch):
            return Work(student, scored, counts)
        labels = batch["anchor_labels"]
        anchor_targets = alignment.targets(labels, alignment.predicts_from_labels(labels))
        factor = self.settings.anchor_weight * share.num_processes / batch["anchor_count"]
        anchor = Anchor(anchor_targets, torch.ones_like(anchor_targets) * factor)
        return Work(anchors.joined(student, batch), scored._replace(anchor=anchor), counts)

    def _weights(
        self, student: Side, targets: Tensor, share: Share
    ) -> tuple[Tensor, Tensor | None]:
        """[N] float32 weights that make a sum over tokens the mean over an optimizer step."""
        if share.weights is None:
            own, counts = torch.ones(len(targets), device=targets.device), None
        else:
            own = alignment.targets(share.weights, student.predicts)
            counts = own != 0
        num_items = own.sum() if share.num_items is None else share.num_items
        if num_items == 0 and counts is not None and len(targets):
            raise ValueError(
                "the weights of a step's scored tokens must not sum to 0: all are 0 "
                f"({KEY} of the batch and of the settings)"
            )
        if num_items == 0:
            raise ValueError(
                "a step needs a token to score, got none: all labels are -100 "
                "(the first token of a row is never scored)"
            )
        if isinstance(num_items, Tensor):
            num_items = num_items.to(own.device)
        return own * (share.num_averaged / num_items), counts

    def _importance(self, batch: Mapping[str, Any], student: Side) -> Importance | None:
        clip, behaviour = self.settings.importance_clip, batch.get(BEHAVIOUR)
        if clip is None or behaviour is None:
            return None
        if behaviour.shape != student.predicts.shape:
            raise ValueError(
                f"{BEHAVIOUR} must have the labels' shape {list(student.predicts.shape)}, got "
                f"{list(behaviour.shape)}"
            )
        return Importance(alignment.targets(behaviour, student.predicts), clip)
