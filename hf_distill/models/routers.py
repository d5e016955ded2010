"""What the routers of a mixture of experts say in a forward: their auxiliary loss, their choices.

A model whose config has `output_router_logits` gives both in its outputs; nothing else is asked.

Shapes: B rows, T positions, N scored tokens, L layers with a router, E experts, k chosen ones.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_distill.data.sides import places
from hf_distill.models.modes import replaced_forward

logger = logging.getLogger(__name__)

SETTING = "output_router_logits"
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # as Mixtral and JetMoE name theirs


class Experts(NamedTuple):
    """Holds experts that routers prefer: chosen [L, N, k] int64, of `num_experts` in each layer."""

    chosen: Tensor
    num_experts: int


def _configs(lm: Any) -> list[Any]:
    config = getattr(lm, "config", None)
    return [] if config is None else [config, config.get_text_config()]


def asks_routers(lm: nn.Module) -> bool:
    """Return whether the config asks for what routers say."""
    return any(getattr(config, SETTING, False) for config in _configs(lm))


@contextmanager
def silent_routers(lm: nn.Module) -> Iterator[None]:
    """Inside the block the config does not ask.

    A model's loss is then that of its labels, and sampling runs: the auxiliary loss of a new token
    behind a mask of the whole row would be an error.
    """
    asking = [config for config in _configs(lm) if getattr(config, SETTING, False)]
    for config in asking:
        setattr(config, SETTING, False)
    try:
        yield
    finally:
        for config in asking:
            setattr(config, SETTING, True)


def aux_coefficient(lm: nn.Module) -> float:
    """Return what a model multiplies its routers' auxiliary loss by.

    Raises:
        ValueError: neither the model nor its config says so.
    """
    for place in (lm, *reversed(_configs(lm))):
        for name in COEFFICIENTS:
            value = getattr(place, name, None)
            if value is not None:
                return float(value)
    raise ValueError(
        f"a {type(lm).__name__} with {SETTING} has an auxiliary loss, which needs a coefficient: "
        f"neither the model nor its config has {' or '.join(COEFFICIENTS)}; set "
        f"config.{COEFFICIENTS[0]}, or config.{SETTING}=False"
    )


def _num_chosen(lm: Any) -> int | None:
    for place in (lm, *reversed(_configs(lm))):
        value = getattr(place, "num_experts_per_tok", None)
        if isinstance(value, int):
            return value
    return None


@torch.no_grad()
def _experts(logits: Any, k: int | None, predicts: Tensor) -> Experts | None:
    """Return the best k of each router at the scored tokens; None if outputs have another form."""
    if not isinstance(logits, tuple | list) or not logits or k is None:
        return None
    sizes = {x.shape[-1] if isinstance(x, Tensor) else None for x in logits}
    if len(sizes) != 1 or (count := sizes.pop()) is None or count < k:
        return None
    if any(x.numel() != predicts.numel() * count for x in logits):
        return None
    best = [x.reshape(*predicts.shape, count).topk(k, dim=-1).indices for x in logits]
    rows, columns = places(predicts)
    return Experts(torch.stack(best)[:, rows, columns], count)


def expert_agreement(student: Experts, teacher: Experts) -> Tensor | None:
    """Return [N]: the share of chosen experts that both choose, the mean over layers.

    Where one chooses more experts than the other, it is twice the common ones over those of both.

    Returns:
        None where they have not as many layers and experts, or tokens.
    """
    one, other = student.chosen, teacher.chosen
    if student.num_experts != teacher.num_experts or one.shape[:2] != other.shape[:2]:
        return None
    common = (one[..., :, None] == other[..., None, :]).any(-1).sum(-1)
    return (2 * common / (one.shape[-1] + other.shape[-1])).mean(0)


class RouterWatcher:
    """Notes what a model's routers say while it runs.

    Attributes:
        aux: [] the auxiliary loss of the last forward, with its gradient, or None.
        coefficient: what the model multiplies it by.
        experts: those of the last forward's scored tokens, or None.
    """

    def __init__(self) -> None:
        self.aux: Tensor | None = None
        self.coefficient = 0.0
        self.experts: Experts | None = None
        self._warned = False

    @contextmanager
    def on(self, lm: nn.Module, predicts: Tensor) -> Iterator[None]:
        """Inside the block forwards are watched; the loss of their outputs is that of labels only.

        Args:
            lm: the Transformers model itself.
            predicts: [B, T] bool, the scored positions.
        """
        self.aux = self.experts = None
        if not asks_routers(lm):
            yield
            return
        forward = lm.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            outputs = forward(*args, **kwargs)
            self._note(lm, outputs, predicts)
            return outputs

        with replaced_forward(lm, run):
            yield

    def _note(self, lm: nn.Module, outputs: Any, predicts: Tensor) -> None:
        logits = getattr(outputs, "router_logits", None)
        self.experts = _experts(logits, _num_chosen(lm), predicts)
        aux = getattr(outputs, "aux_loss", None)
        if not isinstance(aux, Tensor):
            return
        self.aux, self.coefficient = aux, aux_coefficient(lm)
        if lm.training and torch.is_grad_enabled() and not aux.requires_grad:
            self._warn()
        if getattr(outputs, "loss", None) is not None:
            outputs.loss = outputs.loss - self.coefficient * aux.to(outputs.loss.device)

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "the auxiliary loss of the routers has no gradient: with gradient checkpointing it "
                'needs gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
