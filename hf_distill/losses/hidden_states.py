"""The hidden loss: hidden states and attention maps compared layer by layer.

Shapes: N scored tokens, H hidden, A attention heads, T positions.
"""

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_distill.losses.base import Terms, Tokens
from hf_distill.models import pieces
from hf_distill.models.layers import LayerWatcher, match_layers
from hf_distill.models.modes import kept_rng
from hf_distill.models.signals import Signal
from hf_distill.models.stacks import Layer, decoder_blocks
from hf_distill.models.structure import causal_lm
from hf_distill.models.tensors import assert_same_tensors
from metal_ops import hidden_divergence

logger = logging.getLogger(__name__)


@dataclass
class HiddenConfig:
    """Says how layers are compared.

    Raises:
        ValueError: a value is unknown or out of range.
    """

    loss: str = field(
        default="mse",
        metadata={
            "help": "Chooses how hidden states are compared: mse, cosine or l1. The hidden loss is "
            "the mean over layers."
        },
    )
    attention_weight: float = field(
        default=0.0,
        metadata={
            "help": "The weight, at least 0, of KL(teacher||student) of the attention maps of the "
            "same layers. It requires attn_implementation='eager'."
        },
    )

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        if self.loss not in HIDDEN_LOSSES:
            raise ValueError(f"hidden.loss must be one of {HIDDEN_LOSSES}, got {self.loss!r}")
        if not (math.isfinite(self.attention_weight) and self.attention_weight >= 0):
            raise ValueError(
                f"hidden.attention_weight must be at least 0, got {self.attention_weight}"
            )


HIDDEN_LOSSES = ("mse", "cosine", "l1")


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], kind: str) -> Tensor:
    """Return [N]: the mean over pairs of layers of the difference of hidden states.

    Args:
        student: of each pair [N, H], projected to the teacher's width.
        teacher: the same; without gradient.
        kind: "mse" and "l1" are means over H of squares and absolute differences, "cosine" is one
            less the cosine.
    """
    if kind == "l1":
        wide = torch.promote_types(student[0].dtype, torch.float32)
        pairs = zip(student, teacher, strict=True)
        found = [(s.to(wide) - t.detach().to(wide)).abs().mean(-1) for s, t in pairs]
    else:
        found = [hidden_divergence(s, t, kind) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(found).mean(0)


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return [N] nats: the mean over pairs of layers of KL(teacher's map || student's).

    A head of the student is compared with the same head of the teacher, and the mean is taken over
    heads, as in MiniLM (arXiv:2002.10957). Where the numbers of heads differ, each side's heads
    are averaged first. 0 log 0 is 0; a probability of the student below 1e-12 counts as that.

    Args:
        student: of each pair [N, A, T], the probabilities of the keys.
        teacher: the same rows; without gradient.
    """
    found = []
    for own, other in zip(student, teacher, strict=True):
        q, p = own.float(), other.detach().float()
        if q.shape[1] != p.shape[1]:
            q, p = q.mean(1, keepdim=True), p.mean(1, keepdim=True)
        log_ratio = p.clamp_min(1e-12).log() - q.clamp_min(1e-12).log()
        found.append((p * log_ratio).sum(-1).mean(-1))
    return torch.stack(found).mean(0)


MODULE = "hidden_projection"  # of the student while it trains

FILE = f"{MODULE}.safetensors"  # of a checkpoint

HIDDEN_NAME, ATTENTION_NAME = "hidden", "attention"


def _widths(lm: nn.Module, every: Sequence[Layer], layers: Sequence[int]) -> list[int]:
    """Return the width of the states of some layers; of a sharded model that of its config."""
    config: Any = lm.config
    widths = (every[number - 1].width for number in layers)
    return [config.get_text_config().hidden_size if x is None else x for x in widths]


class HiddenAlignment:
    """Compares layers of student and teacher at the scored tokens.

    Where their widths differ the student's states are projected to the teacher's, by a linear map
    of each pair that is trained with the student. It is a module of the student during `train`
    (so that optimizer, gradient clipping, parallel wrappers and engines that cut parameters find
    it), has a file of its own in a checkpoint, whole, and is never in the saved model.

    Args:
        model: the student, which may have adapters.
        teacher: prepared; see `watched_model` and `watch` of `hf_distill.teachers.Teacher`.
        layers: see `match_layers`.
        settings: the kind of the loss, and the weight of attention maps.
        seed: of the projections' first values.

    Raises:
        ValueError: the teacher has no layers to look at, a layer does not exist, or attention maps
            are asked of an attention that gives none.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: Any,
        layers: str | list[Any],
        settings: HiddenConfig,
        seed: int,
    ) -> None:
        other = teacher.watched_model(model)
        if other is None:
            raise ValueError(
                "hidden_layers need a teacher that runs here, as a model or as the student itself; "
                f"a {type(teacher).__name__} has no layers"
            )
        self.student, source = causal_lm(model), causal_lm(other)
        self.settings = settings
        mine, theirs = decoder_blocks(self.student), decoder_blocks(source)
        self.pairs = match_layers(layers, len(mine), len(theirs))
        own, others = zip(*self.pairs, strict=True)
        attends = settings.attention_weight > 0
        if attends:
            for name, lm in (("student", self.student), ("teacher", source)):
                _check_attention(name, lm)
            LayerWatcher("teacher", others, attends).look(source, theirs)
        self.watch = LayerWatcher("student", own, attends)
        self.watch.look(self.student, mine)
        teacher.watch(others, attends)
        widths = _widths(self.student, mine, own), _widths(source, theirs, others)
        self.projections = self._make_projections(*widths, seed)
        if self.projections is not None:
            self.watch.project = self._projected
        logger.info(
            "hidden layers (student, teacher): %s, %s%s",
            ", ".join(f"({a}, {b})" for a, b in self.pairs),
            settings.loss,
            "" if self.projections is None else ", with trained projections",
        )

    def _make_projections(
        self, own: Sequence[int], others: Sequence[int], seed: int
    ) -> nn.ModuleList | None:
        if own == others:
            return None
        like = next(p for p in self.student.parameters() if p.is_floating_point())
        with kept_rng(torch.device("cpu")):  # every process makes the same, and uses up no numbers
            torch.manual_seed(seed)
            made = [nn.Linear(a, b, bias=False) for a, b in zip(own, others, strict=True)]
        return nn.ModuleList(made).to(like.device, like.dtype)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Make the projections a module of the student inside the block."""
        if self.projections is not None:
            self.student.add_module(MODULE, self.projections)
        try:
            yield
        finally:
            self.student._modules.pop(MODULE, None)

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Make the student what it is when saved, inside the block."""
        there = self.student._modules.pop(MODULE, None)
        try:
            yield
        finally:
            if there is not None:
                self.student.add_module(MODULE, there)

    def check(self, batch: Mapping[str, Any]) -> None:
        """Check a batch before it is used.

        Raises:
            ValueError: attention maps of student and teacher have other keys.
        """
        if self.settings.attention_weight > 0 and batch.get("teacher_input_ids") is not None:
            raise ValueError(
                "attention transfer needs student and teacher to read the same rows; this batch "
                "has teacher_input_ids of its own"
            )

    def add(
        self, terms: Terms, student: Signal, teacher: Signal, tokens: Tokens, weight: float
    ) -> Terms:
        """Add the hidden loss to the terms: its weighted sum over the scored tokens.

        Args:
            terms: of N tokens.
            student: with its states, projected; tokens of an anchor stand behind the N.
            teacher: with its states.
            tokens: the tokens and their weights.
            weight: hidden_weight at this step.
        """
        hidden, attention = student.states
        count = len(tokens.targets)
        own = [x[:count] for x in hidden]
        per_token = hidden_loss(own, teacher.states.hidden, self.settings.loss)
        values = {HIDDEN_NAME: per_token}
        loss = weight * (tokens.weights * per_token).sum()
        if attention:
            maps = [x[:count] for x in attention]
            values[ATTENTION_NAME] = attention_loss(maps, teacher.states.attention)
            term = (tokens.weights * values[ATTENTION_NAME]).sum()
            loss = loss + self.settings.attention_weight * term
        metrics = {name: value.detach() for name, value in values.items()}
        return terms._replace(loss=terms.loss + loss, metrics={**terms.metrics, **metrics})

    def _projected(self, index: int, states: Tensor) -> Tensor:
        return states if self.projections is None else self.projections[index](states)

    def _weights(self) -> dict[str, tuple[Tensor, torch.Size]]:
        """Return the projections' weights as this process holds them, and their whole shapes."""
        every: Any = self.projections or ()
        return {
            f"{i}.weight": (x.weight, torch.Size((x.out_features, x.in_features)))
            for i, x in enumerate(every)
        }

    @torch.no_grad()
    def save(self, folder: str, model: nn.Module, writes: bool) -> None:
        """Write the projections, if there are any. All processes must call it together.

        Args:
            folder: of the checkpoint.
            model: the student as its engine calls it.
            writes: whether this process does.
        """
        if self.projections is None:
            return
        pieces.release(model)
        flat, state = pieces.lies_flat(model), {}
        for name, (weight, shape) in self._weights().items():
            whole = pieces.join(pieces.piece(weight), weight, shape, flat)
            state[name] = whole.detach().contiguous()
        if writes:
            save_file(state, os.path.join(folder, FILE))

    def is_in(self, folder: str) -> bool:
        """Return whether a checkpoint has projections; one of `save_only_model` has none."""
        return os.path.isfile(os.path.join(folder, FILE))

    @torch.no_grad()
    def load(self, folder: str, model: nn.Module) -> None:
        """Read what `save` wrote. All processes must call it together.

        Args:
            folder: of the checkpoint.
            model: the student as its engine calls it.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it holds projections of other layers or widths.
        """
        if self.projections is None:
            return
        path = os.path.join(folder, FILE)
        if not self.is_in(folder):
            raise FileNotFoundError(f"the projections must be in the checkpoint: no {path}")
        pieces.release(model)
        found, own, flat = load_file(path), self._weights(), pieces.lies_flat(model)
        shapes = {name: torch.empty(shape, device="meta") for name, (_, shape) in own.items()}
        assert_same_tensors(path, found, shapes)
        for name, (weight, _) in own.items():
            held = pieces.piece(weight)
            held.copy_(pieces.cut(found[name].to(weight.dtype), weight, flat))

    def left_out(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a state dict of the student, by name, without the projections."""
        return {name: x for name, x in state.items() if f"{MODULE}." not in name}


def _check_attention(name: str, lm: nn.Module) -> None:
    used = getattr(lm.config, "_attn_implementation", "eager")
    if used != "eager":
        raise ValueError(
            "attention transfer (hidden.attention_weight) needs attn_implementation='eager', which "
            f"returns attention maps; the {name} has {used!r}"
        )
