"""The hard loss, where it is another one than the cross-entropy of the labels."""

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from hf_distill.data.sides import IGNORE_INDEX
from hf_distill.models.head_probe import adds_to_loss
from hf_distill.models.modes import evaluating, kept_rng, replaced_forward
from hf_distill.models.probe_rows import ProbeRow, probe_row
from hf_distill.models.structure import causal_lm, unwrap

logger = logging.getLogger(__name__)

ROUNDING = 1e-5  # relative, of a float32 mean of a few cross-entropies and of other orders of sums

MOST_TOKENS = 4096  # of a batch that is asked for its loss, for which all its logits are made
TOO_MANY = (
    f"a batch with inputs that are not of rows, such as images, has over {MOST_TOKENS} tokens"
)

UsersLoss = Callable[..., Tensor] | None


class _Found(NamedTuple):
    """Says why the loss is the model's own; whether it ignores the count of tokens it is given."""

    reason: str
    ignores_count: bool = False


def _named(model: nn.Module) -> str | None:
    """Return how a model names another loss than `ForCausalLMLoss`, or None."""
    if not isinstance(model, PreTrainedModel):
        return None
    own = "_loss_function" in vars(model) or type(model).loss_function is not (
        PreTrainedModel.loss_function
    )
    if own:
        chosen: Any = model.loss_function
    else:  # what is not known, or not said, is the default
        chosen = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "", ForCausalLMLoss)
    if chosen is ForCausalLMLoss:
        return None
    return f"its loss_function is {getattr(chosen, '__name__', type(chosen).__name__)}"


NOT_SHIFTED = (
    "its labels are not shifted: it compares the logits of each position with the label of that "
    "position, where the soft loss compares those that predict it; give labels that are shifted "
    "already, or alpha 1"
)


def probe_labels(
    inputs: Mapping[str, Any], labels: Tensor | None
) -> tuple[ProbeRow, Tensor] | None:
    """Return what a model's own loss is asked about, with labels; None if there is nothing.

    Args:
        inputs: of the model's forward, without labels.
        labels: [B, T] of the batch, which are taken where its rows cannot be cut.
    """
    row = probe_row(inputs)
    if row is None or row.ids.ndim != 2:
        return None
    if row.is_cut:
        labels = row.ids.clone()
        labels[:, 0] = IGNORE_INDEX  # of which only virtual tokens before it could know
    if labels is None or not bool((labels[:, 1:] != IGNORE_INDEX).any()):
        return None
    return row, labels


def _cross_entropy(logits: Tensor, labels: Tensor, shift: int) -> Tensor:
    """Return the mean over labels [B, T] of logits [B, front + T, V], the front left out."""
    logits = logits[:, logits.shape[1] - labels.shape[1] :]
    kept = logits[:, : logits.shape[1] - shift].flatten(0, 1)
    return F.cross_entropy(kept.float(), labels[:, shift:].flatten(), ignore_index=IGNORE_INDEX)


def _is(loss: Tensor, other: Tensor) -> bool:
    tolerance = max(ROUNDING, 8 * torch.finfo(loss.dtype).eps)
    return bool(torch.isclose(loss.float(), other, rtol=tolerance, atol=0))


@torch.no_grad()
def _probed(model: nn.Module, row: ProbeRow, labels: Tensor) -> str | None:
    """Return how the loss of some tokens differs from the logits' cross-entropy, or None.

    Args:
        model: with its adapters.
        row: of a batch.
        labels: of its ids.
    """
    lm, inside = causal_lm(model), []
    forward = lm.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        loss = getattr(outputs, "loss", None)  # which adapters may change
        inside.append((None if loss is None else loss.clone(), getattr(outputs, "logits", None)))
        return outputs

    with evaluating(model), kept_rng(labels.device), replaced_forward(lm, run):
        whole = getattr(model(**row.inputs, labels=labels), "loss", None)
    loss, logits = inside[-1] if inside else (None, None)
    if loss is None or logits is None or whole is None:
        return None
    plain = _cross_entropy(logits, labels, 1)
    if not _is(loss, plain):
        if _is(loss, _cross_entropy(logits, labels, 0)):
            return NOT_SHIFTED
        return f"it says {float(loss):.4g} where the cross-entropy is {float(plain):.4g}"
    if _is(whole, plain) or adds_to_loss(model, row.inputs):  # which the student's reader adds
        return None
    return f"its adapters make {float(whole):.4g} of a cross-entropy of {float(plain):.4g}"


@torch.no_grad()
def ignores_count(model: nn.Module, row: ProbeRow, labels: Tensor) -> bool:
    """Return whether a model's loss of some tokens is the same whatever count of them it gets."""
    count = int((labels[:, 1:] != IGNORE_INDEX).sum())
    with evaluating(model), kept_rng(labels.device):
        once, twice = (
            model(**row.inputs, labels=labels, num_items_in_batch=torch.tensor(n)).loss
            for n in (count, 2 * count)
        )
    return bool((once == twice).all())


class HardLoss:
    """Knows what replaces the labels' cross-entropy as the hard loss, if something does.

    That is `compute_loss_func`, else label smoothing, else the student's own loss where it is
    another: its `loss_function` is not `ForCausalLMLoss`, or its forward, asked for the loss of a
    few tokens of the first batch, says another number than their cross-entropy. The model computes
    its own loss from the labels, which it shifts itself if it wants to.

    Args:
        lm: the student without wrappers.
        wanted: whether a hard loss is computed at some step, and may be the model's own. A
            classifier's own loss is always the hard one; of it only that of the user is looked for.
        sharded: whether parameters lie in pieces, so that the model cannot be probed.
        users: gives the `compute_loss_func` and the `label_smoother` that the `Trainer` has now.
        shifts_labels: whether labels are those of the next tokens.
        accepts_count: whether the model's forward takes `num_items_in_batch`.
    """

    def __init__(
        self,
        lm: nn.Module,
        *,
        wanted: bool,
        sharded: bool,
        users: Callable[[], tuple[UsersLoss, UsersLoss]],
        shifts_labels: bool,
        accepts_count: bool,
    ) -> None:
        self._users = users
        self._shifts_labels, self._accepts_count = shifts_labels, accepts_count
        self._found: _Found | None = None
        self.is_models = False  # as far as known
        wanted = wanted and not self._is_users()
        self.to_probe = wanted and not sharded
        reason = _named(lm) if wanted else None
        if reason is not None:
            self._note(_Found(reason))

    def _is_users(self) -> bool:
        return any(each is not None for each in self._users())

    @property
    def replaces(self) -> bool:
        """Return whether there is another hard loss than the cross-entropy, as far as known."""
        return self._is_users() or self.is_models

    def look(
        self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor | None = None
    ) -> bool:
        """Probe the model at the first batch.

        Args:
            model: the student, wrapped or not.
            inputs: of its forward.
            labels: [B, T] of the batch, which are asked for where its rows cannot be cut.

        Returns:
            Whether this batch has shown that the hard loss is the model's own.
        """
        if not self.to_probe:
            return False
        bare, names = unwrap(model), inspect.signature(causal_lm(model).forward).parameters
        if inputs.get("input_ids") is None or "labels" not in names:
            self.to_probe = False
            return False
        asked = probe_labels(inputs, labels)
        if asked is None:
            return False
        row, labels = asked
        if not row.is_cut and row.ids.numel() > MOST_TOKENS:
            logger.warning("student: its own loss is not looked at, %s", TOO_MANY)
            self.to_probe = False
            return False
        self.to_probe, is_new = False, self._found is None
        if is_new:
            reason = _probed(bare, row, labels)
            if reason is None:
                return False
            self._note(_Found(reason))
        if self._found is not None and self._accepts_count and ignores_count(bare, row, labels):
            self._found = self._found._replace(ignores_count=True)
        return is_new

    def _note(self, found: _Found) -> None:
        self._found, self.is_models = found, True
        logger.warning(
            "student: the hard loss is the model's own, which takes logits: %s", found.reason
        )

    def arguments(self, labels: Tensor, num_items: Tensor | int | None) -> dict[str, Any]:
        """Return what the model's forward must be given besides its inputs."""
        if self._found is None:
            return {}
        count = {"num_items_in_batch": num_items} if self._model_counts(num_items) else {}
        return {"labels": labels, **count}

    def _model_counts(self, num_items: Tensor | int | None) -> bool:
        ignores = self._found is not None and self._found.ignores_count
        return self._accepts_count and num_items is not None and not ignores

    def of(self, outputs: Any, labels: Tensor, num_items: Tensor | int | None) -> Tensor | None:
        """Return this batch's part [] of an optimizer step's hard loss; None: the cross-entropy.

        Args:
            outputs: of the model, given `arguments`.
            labels: of the batch.
            num_items: labelled tokens (a classifier's rows) of the step, or None for this batch's.
        """
        compute_loss_func, label_smoother = self._users()
        if compute_loss_func is not None:
            return compute_loss_func(outputs, labels, num_items_in_batch=num_items)
        if label_smoother is not None:
            return label_smoother(outputs, labels, self._shifts_labels, num_items)
        if self._found is None:
            return None
        if num_items is None or self._model_counts(num_items):
            return outputs.loss
        # a model that does not count gives the mean over the batch's labelled tokens
        labelled = (labels[:, 1:] != IGNORE_INDEX).sum()
        return torch.where(labelled > 0, outputs.loss, 0.0) * (labelled / num_items)
