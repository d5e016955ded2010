"""Reading a causal LM at its scored positions: hidden states before the head, or logits.

The divergence ops want the input of the output head, so that [B, T, V] logits never exist. The
model's own forward runs as it is (wrappers, hooks and autocast included), with its head replaced,
for that one call, by a function of the head's input; what the function returns is what the call
returns. Models whose logits are not `softcap(scale * head(hidden))` are read by their logits.

Shapes: B rows, T positions, N scored tokens, H hidden, V vocabulary.
"""

import inspect
import logging
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from hf_distill.data.sides import Side, places, scored
from hf_distill.models import kept_heads
from hf_distill.models.causality import find_front
from hf_distill.models.head_probe import (
    Post,
    Seen,
    adds_to_loss,
    marked_loss,
    probe_head,
    probe_joined_head,
)
from hf_distill.models.head_replacement import call_in_head, projected_inside
from hf_distill.models.heads_apart import is_apart
from hf_distill.models.kept_logits import KEEP, takes_mask
from hf_distill.models.layers import LayerWatcher, States
from hf_distill.models.packing import PackingCheck
from hf_distill.models.pieces import stays_joined
from hf_distill.models.positions import Positions, positions_of
from hf_distill.models.probe_rows import ProbeRow, probe_row
from hf_distill.models.routers import RouterWatcher, asks_routers
from hf_distill.models.signals import Signal
from hf_distill.models.structure import (
    Kind,
    causal_lm,
    is_sharded,
    kind_of,
    unwrap,
)
from metal_ops import Head

logger = logging.getLogger(__name__)

# What a trained head in pieces costs by hidden states beyond what it costs by logits, in float32
# copies of it, and what a scored token's logits cost, in float32 rows (python -m
# tests.benchmarks.engines, two widths, FSDP 2 and ZeRO-3)
HEAD_COPIES = {"FSDP": 2.0, "ZeRO": 4.0}
LOGITS_COPIES = 3.0


class Reader:
    """Runs a causal LM and reads its scored positions.

    Args:
        name: "student" or "teacher", for the log.
        refusal: why hidden states must not be used, or None to find out by a probe at first use.
        vocab: entries of the vocabulary that are read, the first; None is all.
    """

    def __init__(self, name: str, refusal: str | None = None, vocab: int | None = None) -> None:
        self.name, self.vocab = name, vocab
        self.watch = LayerWatcher(name)  # layers whose states a signal has
        self.routers = RouterWatcher()  # of a mixture of experts
        self.added: Tensor | None = None  # by adapters, to the loss of the last call
        self._refusal, self._packing = refusal, PackingCheck()
        self._post: Post | None = None
        self._is_known = self._has_said = self._has_said_few = False
        self.is_in_pieces = False  # whether its parameters are, on several processes
        self._front = 0  # outputs before that of the first token
        self._adds = False
        self._takes_mask: bool | None = None
        # what the following is known of
        self._model: Callable[[], nn.Module | None] = lambda: None
        self._lm: Callable[[], nn.Module | None] = lambda: None
        self._positions: Positions | None = None  # None where they need not be looked at
        self._names: frozenset[str] = frozenset()  # of its forward's inputs
        self._is_causal, self._has_routers, self._is_bare = True, False, False

    def reads_hidden(self, model: nn.Module, inputs: Mapping[str, Any]) -> bool:
        """Return whether `model` is read by hidden states: decided and logged at the first call."""
        self._look(model, inputs, None)
        return self._post is not None

    @property
    def refusal(self) -> str | None:
        """Return why the model is read by its logits, once it has been looked at."""
        return self._refusal

    def look(self, model: nn.Module, side: Side) -> None:
        """Find out how the model is read, at the first call.

        Raises:
            ValueError: it is not a causal LM, see `causality.find_front`; or it does not read
                packed rows as it reads them alone.
        """
        self._look(model, side.inputs, side.predicts)
        self._packing.look(model, side, self.name, self.is_in_pieces)

    def _look(self, model: nn.Module, inputs: Mapping[str, Any], scored: Tensor | None) -> None:
        if self._is_known:
            return
        kind = kind_of(causal_lm(model))
        row = None if kind == Kind.ROWS else probe_row(inputs)
        if row is None:
            self._is_known = True
            self._refusal = self._refusal or "the batch has no input_ids"
            return
        self.is_in_pieces = is_sharded(model)
        bare, row = self._probed(model, row)
        if kind == Kind.CAUSAL:
            found = find_front(bare, row, self.name, scored, self.is_in_pieces)
            self._front, self._is_known = found
        else:  # outputs are at their own positions, and may read later tokens
            self._is_known = True
        if not self._has_said:
            self._has_said = True
            self._adds = adds_to_loss(bare, row.inputs)
            self._choose(bare, row)

    def _probed(self, model: nn.Module, row: ProbeRow) -> tuple[nn.Module, ProbeRow]:
        """Return the model and inputs that probes call: not compiled, not in parallel with others.

        Positions are the model's own, for the row has no padding.
        """
        if not self.is_in_pieces:
            model = extract_model_from_parallel(model, keep_torch_compile=False)
        names = inspect.signature(causal_lm(model).forward).parameters
        cache = {"use_cache": False} if "use_cache" in names else {}
        return model, row._replace(inputs=cache | row.inputs)

    def _choose(self, model: nn.Module, row: ProbeRow) -> None:
        """Choose hidden states or logits, and say why."""
        if self._front:
            logger.info(
                "%s: %d outputs before those of the text, as virtual tokens have, are left out",
                *(self.name, self._front),
            )
        if self._refusal is not None:
            return
        found = (probe_joined_head if self.is_in_pieces else probe_head)(model, row.inputs)
        if isinstance(found, str):
            self._refusal = found
            logger.warning("%s: read by its logits, not its hidden states: %s", self.name, found)
            return
        self._post = found
        logger.info(
            "%s: read by its hidden states before the head, logit scale %g, softcap %s%s",
            *(self.name, found.scale, found.softcap),
            "" if found.vocab is None else f", the first {found.vocab} entries",
        )

    def forward_inputs(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Return the inputs, with the cache off, and positions where `models.positions` adds them.

        Models that are no causal LMs get those inputs that their forward names, as they are:
        encoders count their positions in ways of their own.

        Raises:
            ValueError: see `Positions.arguments`.
        """
        self._meet(model)
        if not self._is_causal:
            named = {name: value for name, value in inputs.items() if name in self._names}
            named = named or dict(inputs)  # a forward of *args and **kwargs names none
            return {"use_cache": False} | named if "use_cache" in self._names else named
        result: dict[str, Any] = dict(inputs)
        if "use_cache" in self._names:
            result.setdefault("use_cache", False)
        if self._positions is not None:
            result |= self._positions.arguments(model, result, self.name)
            if self._positions.are_never_given:
                self._positions = None
        return result

    def takes_less_by_logits(self, model: nn.Module, side: Side) -> bool:
        """Return whether logits take less memory in training than the gradient of a whole head.

        That is so where a head in pieces is trained and few tokens are scored. Processes need not
        agree: the engine joins the pieces in the same places either way.
        """
        self.look(model, side)
        if not (self.is_in_pieces and self._post and torch.is_grad_enabled()):
            return False
        head = self._head_of(model)
        if is_apart(head):  # processes must agree
            return False
        if not head.weight.requires_grad:
            return False
        copies = HEAD_COPIES["ZeRO" if hasattr(head.weight, "ds_id") else "FSDP"]
        few, limit = int(side.predicts.sum()), head.in_features * copies / LOGITS_COPIES
        if few < limit and not self._has_said_few:
            self._has_said_few = True
            logger.info(
                "%s: batches of fewer than %d scored tokens a process, such as %d, are read by "
                "their logits: these take less memory than the gradient of the whole head",
                *(self.name, math.ceil(limit), few),
            )
        return few < limit

    def _meet(self, model: nn.Module) -> nn.Module:
        """Note what is the same at every call of a model; returns it without its wrappers."""
        known = self._lm()
        if known is not None and self._model() is model:
            return known
        lm = causal_lm(model)
        self._model, self._lm = weakref.ref(model), weakref.ref(lm)
        self._is_causal, self._is_bare = kind_of(lm) == Kind.CAUSAL, unwrap(model) is lm
        self._names = frozenset(inspect.signature(lm.forward).parameters)
        self._positions, self._has_routers = positions_of(model), asks_routers(lm)
        return lm

    def _placed(self, predicts: Tensor) -> Tensor:
        """Return [B, front + T] bool: where the scored outputs stand among all."""
        return F.pad(predicts, (self._front, 0)) if self._front else predicts

    def at_head(
        self,
        model: nn.Module,
        side: Side,
        read: Callable[[Tensor, Head], Any],
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return what `read(hidden [N, H], head)` does, called inside the model's forward.

        Args:
            model: to run, wrapped or not.
            side: its part of the batch.
            read: called once.
            kwargs: its `forward_inputs`, if they are known.
        """
        assert self._post is not None
        scale, cap, entries = self._post
        sizes = [size for size in (self.vocab, entries) if size is not None]
        predicts = self._placed(side.predicts)

        def read_scored(hidden: Tensor, head: Any) -> Any:
            whole = Head(head.weight, head.bias, scale, cap)
            return read(scored(hidden, predicts), whole.first(min(sizes)) if sizes else whole)

        kwargs = self.forward_inputs(model, side.inputs) if kwargs is None else kwargs
        lm = self._lm()
        assert lm is not None
        kind = {"is_bare": self._is_bare, "adds": self._adds, "in_pieces": self.is_in_pieces}
        result, self.added = call_in_head(model, lm, read_scored, kwargs, **kind)
        return result

    def outputs(self, model: nn.Module, kwargs: Mapping[str, Any], **asked: Any) -> Any:
        """Return the model's outputs, with logits of the text's tokens only.

        Args:
            model: to run, wrapped or not.
            kwargs: its `forward_inputs`.
            **asked: more arguments of its forward. With labels, what adapters add to the loss of
                the outputs is in it; without, it is in `added`.
        """
        kwargs = {**kwargs, **asked}
        self.added = None
        if self._adds and "labels" not in asked:
            with marked_loss(causal_lm(model), Seen([], [], [], [])):
                outputs = model(**kwargs)
            self.added = outputs.loss
        else:
            outputs = model(**kwargs)
        if self._front and outputs.logits.ndim > 2:
            outputs.logits = outputs.logits[:, self._front :]
        return outputs

    def logits(
        self, model: nn.Module, side: Side, kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Return [N, V] logits of the scored positions; of a classifier [N, C], of the rows.

        Args:
            model: to run, wrapped or not.
            side: its part of the batch.
            kwargs: its `forward_inputs`, if they are known.
        """
        self.look(model, side)
        asked = {}
        if self._keeps(model, side.inputs):
            asked[KEEP] = self._placed(side.predicts)
        kwargs = self.forward_inputs(model, side.inputs) if kwargs is None else kwargs
        logits = self.outputs(model, kwargs, **asked).logits
        found = logits if logits.ndim == 2 else scored(logits, side.predicts)
        return found if self.vocab is None else found[:, : self.vocab]

    def _keeps(self, model: nn.Module, inputs: Mapping[str, Any]) -> bool:
        """Return whether the model can be told of which positions logits are wanted."""
        if self._takes_mask is None:
            is_causal = kind_of(causal_lm(model)) == Kind.CAUSAL
            row = probe_row(inputs) if is_causal else None
            if row is None or KEEP not in inspect.signature(causal_lm(model).forward).parameters:
                self._takes_mask = False
            elif self.is_in_pieces:  # an error would leave the pieces in any state
                self._takes_mask = type(causal_lm(model)).__module__.startswith("transformers.")
            else:
                self._takes_mask = takes_mask(*self._probed(model, row), self._front)
        return self._takes_mask

    def run(
        self,
        model: nn.Module,
        side: Side,
        read: Callable[[Signal], Any],
        at_head: bool = True,
    ) -> Any:
        """Return what `read` makes of the model's signal, with a gradient.

        Args:
            model: the model to run, wrapped or not.
            side: its part of the batch.
            read: called once. Where the model is read by its hidden states it is called inside the
                model's forward, so that parallel wrappers see its gradients.
            at_head: False reads the logits in any case.
        """
        self.look(model, side)
        places(side.predicts)  # asked before the device has the forward to do
        self.added = None
        at_head = at_head and self._post is not None and not side.as_logits
        if not at_head:
            self._keeps(model, side.inputs)  # a probe, which must not be watched
        kwargs = self.forward_inputs(model, side.inputs)  # a trial, maybe, as well
        with self.watching(model, side) as states:
            if not at_head:
                logits = self.logits(model, side, kwargs)
                return read(Signal(logits=logits, states=states()))
            apart = self._is_apart(model)
            told = lambda *x: read(Signal(None, *x, states=states(), own_tokens=apart))
            return self.at_head(model, side, told, kwargs)

    def _head_of(self, model: nn.Module) -> Any:
        return cast(Any, self._meet(model)).get_output_embeddings()

    def _is_apart(self, model: nn.Module) -> bool:
        return is_apart(self._head_of(model))

    @contextmanager
    def watching(self, model: nn.Module, side: Side) -> Iterator[Callable[[], States]]:
        """Inside the block routers and the chosen layers are watched.

        What is yielded gives the layers' states.
        """
        lm = self._meet(model)
        if not (self._has_routers or self.watch.layers):
            yield States
            return
        predicts = self._placed(side.predicts)
        with self.routers.on(lm, predicts):
            if not self.watch.layers:
                yield States
                return
            with self.watch.on(lm, predicts) as seen:
                parallel = self.is_in_pieces or isinstance(model, DistributedDataParallel)
                inside = parallel and self.watch.project is not None
                with projected_inside(lm, seen.states) if inside else nullcontext():
                    yield seen.states

    @torch.no_grad()
    def signal(
        self, model: nn.Module, side: Side, frozen_head: bool = True, alone: bool = False
    ) -> Signal:
        """Return the model's signal without gradient.

        Args:
            model: the model to read.
            side: its part of the batch.
            frozen_head: False keeps the head's own parameter in the signal, so that the op can see
                that student and teacher share it, or none where parameters lie in pieces: then it
                is the student's, given where that is whole. True takes its value now.
            alone: whether nothing else runs the model, or changes it, while the signal is used.
        """
        self.look(model, side)
        keep = kept_heads.frozen if frozen_head else kept_heads.same
        if self.is_in_pieces and not self._is_apart(model):
            stays = alone and stays_joined(self._head_of(model))
            keep = kept_heads.copied if frozen_head else kept_heads.headless
            keep = kept_heads.frozen if stays else keep
        said = self.run(model, side, keep)
        return replace(said, experts=self.routers.experts)
