"""Reading a causal LM at its scored positions: hidden states before the head, or logits.

The divergence ops want the input of the output head, so that [B, T, V] logits never exist. The
model's own forward runs as it is (wrappers, hooks and autocast included), with its head replaced,
for that one call, by a function of the head's input; what the function returns is what the call
returns. Models whose logits are not `softcap(scale * head(hidden))` are read by their logits.

Shapes: B rows, T positions, N scored tokens, H hidden, V vocabulary.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.data.sides import Side
from hf_distill.models.layers import LayerWatcher, States
from hf_distill.models.modes import evaluating, replaced_forward
from hf_distill.models.positions import longest_row, positions_of
from hf_distill.models.routers import RouterWatcher
from hf_distill.models.signals import Signal
from hf_distill.models.structure import causal_lm, is_classifier, output_head
from metal_ops import Head

logger = logging.getLogger(__name__)

PROBE_TOKENS = 8


@contextmanager
def _tapped(lm: nn.Module, read: Callable[[Tensor, Any], Any]) -> Iterator[None]:
    """Inside the block, the model's forward returns read(input of the head, head)."""
    head = output_head(lm)
    results: list[Any] = []
    forward = lm.forward

    def tap(hidden: Tensor) -> Tensor:
        results.append(read(hidden, head))
        return hidden[..., :1].detach() * 0  # the model's code after the head needs a tensor

    def run(*args: Any, **kwargs: Any) -> Any:
        forward(*args, **kwargs)
        return results.pop()

    with replaced_forward(head, tap), replaced_forward(lm, run):
        yield


def _post_candidates(config: Any) -> list[tuple[float, float | None]]:
    """(logit scale, softcap) pairs that the config's words could mean, most specific first."""
    config = config.get_text_config()
    scales = [1.0]
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"):
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value:
            # Granite divides by logits_scaling, HyperCLOVA X multiplies by it
            scales = [float(value), *([1.0 / value] if name == "logits_scaling" else []), *scales]
    cap = getattr(config, "final_logit_softcapping", None)
    return [(scale, cap) for scale in scales] + ([(s, None) for s in scales] if cap else [])


def _head_refusal(lm: nn.Module) -> str | None:
    """Why the model's head cannot be applied by itself, or None."""
    head = output_head(lm)
    if head is None:
        return "the model has no output embeddings"
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__module__.split('.')[0]} {type(head).__name__}"
    if not head.weight.is_floating_point():
        return f"the head's weight is {head.weight.dtype}"
    return None


def _close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to a few roundings in the coarsest dtype on the way."""
    eps = max(torch.finfo(d).eps for d in (a.dtype, b.dtype, dtype))
    a, b = a.float(), b.float()
    return bool((a - b).abs().max() <= 8 * eps * b.abs().max().clamp_min(1e-6))


@torch.no_grad()
def probe_head(lm: nn.Module, input_ids: Tensor) -> tuple[float, float | None] | str:
    """(logit scale, softcap) found by running the model on [1, positions] ids, or a refusal."""
    refusal = _head_refusal(lm)
    if refusal is not None:
        return refusal
    head = output_head(lm)
    seen: list[tuple[Any, Any]] = []
    hook = head.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    try:
        with evaluating(lm):
            logits = lm(input_ids=input_ids).logits
    finally:
        hook.remove()
    if len(seen) != 1 or seen[0][0].ndim != 3:
        return f"the forward calls its head {len(seen)} times"
    hidden, raw = seen[0]
    if not _close(nn.functional.linear(hidden, head.weight, head.bias), raw, raw.dtype):
        return "the head does more than a linear map (an adapter or a hook)"
    for scale, cap in _post_candidates(lm.config):
        scaled = raw.float() * scale
        expected = scaled if cap is None else cap * torch.tanh(scaled / cap)
        if _close(expected, logits, raw.dtype):
            return scale, cap
    return "the logits are not a known scale or softcap of the head's output"


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
        self._refusal = refusal
        self._post: tuple[float, float | None] | None = None

    def reads_hidden(self, model: nn.Module, inputs: dict[str, Tensor]) -> bool:
        """Whether `model` is read by its hidden states; decided, and logged, at the first call."""
        if self._post is None and self._refusal is None:
            result = self._probe(causal_lm(model), inputs)
            if isinstance(result, str):
                self._refusal = result
                logger.warning(
                    "%s: read by its logits, not its hidden states: %s", self.name, result
                )
            else:
                self._post = result
                logger.info(
                    "%s: read by its hidden states before the head, logit scale %g, softcap %s",
                    self.name,
                    *self._post,
                )
        return self._post is not None

    def _probe(self, lm: nn.Module, inputs: dict[str, Tensor]) -> tuple[float, float | None] | str:
        ids = inputs.get("input_ids")
        if ids is None:
            return "the batch has no input_ids"
        mask = inputs.get("attention_mask")
        row = ids[0] if mask is None or mask.ndim != 2 else longest_row(ids, mask)
        return probe_head(lm, row[None, :PROBE_TOKENS])

    def forward_inputs(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """The inputs, with the cache off, and positions where `models.positions` adds them.

        A classifier gets those inputs that its forward names, as they are: encoders count their
        positions in ways of their own.

        Raises:
            ValueError: see `Positions.arguments`.
        """
        lm = causal_lm(model)
        names = inspect.signature(lm.forward).parameters
        if is_classifier(lm):
            named = {name: value for name, value in inputs.items() if name in names}
            return named or dict(inputs)  # a forward of *args and **kwargs names none
        result: dict[str, Any] = dict(inputs)
        if "use_cache" in names:
            result.setdefault("use_cache", False)
        return result | positions_of(model).arguments(model, result, self.name)

    def at_head(self, model: nn.Module, side: Side, read: Callable[[Tensor, Head], Any]) -> Any:
        """What `read(hidden [N, H], head)` returns, called inside the model's forward."""
        assert self._post is not None
        scale, cap = self._post

        def read_scored(hidden: Tensor, head: Any) -> Any:
            whole = Head(head.weight, head.bias, scale, cap)
            used = whole if self.vocab is None else whole.first(self.vocab)
            return read(hidden[side.predicts], used)

        kwargs = self.forward_inputs(model, side.inputs)
        with _tapped(causal_lm(model), read_scored):
            return model(**kwargs)

    def logits(self, model: nn.Module, side: Side) -> Tensor:
        """[N, V] logits of the scored positions; of a classifier [N, C], of the rows."""
        kwargs = self.forward_inputs(model, side.inputs)
        if "logits_to_keep" in inspect.signature(causal_lm(model).forward).parameters:
            kwargs["logits_to_keep"] = side.predicts
        logits = model(**kwargs).logits
        scored = logits if logits.ndim == 2 else logits[side.predicts]
        return scored if self.vocab is None else scored[:, : self.vocab]

    def run(
        self,
        model: nn.Module,
        side: Side,
        read: Callable[[Signal], Any],
        at_head: bool = True,
    ) -> Any:
        """What `read` makes of the model's signal, with a gradient.

        Args:
            model: the model to run, wrapped or not.
            side: its part of the batch.
            read: called once. Where the model is read by its hidden states it is called inside the
                model's forward, so that parallel wrappers see its gradients.
            at_head: False reads the logits in any case.
        """
        at_head = at_head and self.reads_hidden(model, side.inputs)
        with self.watching(model, side) as states:
            if not at_head:
                logits = self.logits(model, side)
                return read(Signal(logits=logits, states=states()))
            return self.at_head(model, side, lambda *x: read(Signal(None, *x, states=states())))

    @contextmanager
    def watching(self, model: nn.Module, side: Side) -> Iterator[Callable[[], States]]:
        """Inside the block routers and the chosen layers are watched.

        What is yielded gives the layers' states.
        """
        self.forward_inputs(model, side.inputs)  # may try the model out, which must not be watched
        lm = causal_lm(model)
        with self.routers.on(lm, side.predicts):
            if not self.watch.layers:
                yield States
                return
            with self.watch.on(lm, side.predicts) as seen:
                yield seen.states

    @torch.no_grad()
    def signal(self, model: nn.Module, side: Side, frozen_head: bool = True) -> Signal:
        """The model's signal without gradient.

        Args:
            model: the model to read.
            side: its part of the batch.
            frozen_head: False keeps the head's own parameter in the signal, so that the op can see
                that student and teacher share it; True takes its value now.
        """
        said = self.run(model, side, _frozen if frozen_head else _same)
        return replace(said, experts=self.routers.experts)


def _same(signal: Signal) -> Signal:
    return signal


def _frozen(signal: Signal) -> Signal:
    """The signal with the values that its head has now."""
    if signal.head is None:
        return signal
    bias = None if signal.head.bias is None else signal.head.bias.detach()
    return replace(signal, head=replace(signal.head, weight=signal.head.weight.detach(), bias=bias))
