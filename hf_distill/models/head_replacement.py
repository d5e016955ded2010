"""Calls a function of the head's input inside a model's own forward, in the place of its head.

The head is called as ever, and its hooks run; only what it computes is another. So the function has
the head's weight whole, also where an engine holds parameters in pieces and joins them around the
call (FSDP 1 and 2, ZeRO-3). Such an engine joins them again, and takes in their gradients, when the
gradient of the head's output arrives. There the loss leaves as the head's output, and then as the
model's; elsewhere it is handed on as it is.

Shapes: B rows, T positions, H hidden.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_distill.models.heads_apart import around_head, is_apart
from hf_distill.models.layers import States
from hf_distill.models.modes import replaced_forward, replaced_forwards
from hf_distill.models.structure import output_head

Read = Callable[[Tensor, Any], Any]
"""Makes a result of hidden states [B, T, H] and the head: a loss [], or what may have one."""


def _loss_in(result: Any) -> Tensor | None:
    """Return the loss of a result, if it has one that is trained."""
    loss = result if isinstance(result, Tensor) else getattr(result, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.requires_grad else None


def _with_loss(result: Any, loss: Tensor) -> Any:
    return loss if isinstance(result, Tensor) else result._replace(loss=loss)


class _SameValue(torch.autograd.Function):
    """Has the value of `exact`; the gradient goes to `through`, which an engine may round."""

    @staticmethod
    def forward(ctx: Any, through: Tensor, exact: Tensor) -> Tensor:
        ctx.dtype = through.dtype
        return exact.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.to(ctx.dtype), None


class _Beside(torch.autograd.Function):
    """Has the value of `through`; a backward that comes to it leads to the others as well."""

    @staticmethod
    def forward(ctx: Any, through: Tensor, *others: Tensor) -> Tensor:
        ctx.count = len(others)
        return through.view_as(through)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, *(None for _ in range(ctx.count))


@contextmanager
def projected_inside(lm: nn.Module, states: Callable[[], States]) -> Iterator[None]:
    """Inside the block the states of layers are projected in the call of the model's head.

    Projections are a module of the model. An engine that cuts parameters joins them for its
    forward only, and data parallelism waits for the gradients of what its outputs depend on.

    Args:
        lm: the Transformers model.
        states: projects them at the first call.
    """
    last: Any = output_head(lm) or lm
    forward = last.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        hidden = states().hidden
        if isinstance(outputs, Tensor):
            return _Beside.apply(outputs, *hidden)
        outputs.logits = _Beside.apply(outputs.logits, *hidden)
        return outputs

    with replaced_forward(last, run):
        yield


class _Led:
    """Leads a loss through the outputs of head and model, and puts its exact value back."""

    def __init__(self, through_model: bool, through_head: bool) -> None:
        self._through_model, self._through_head = through_model, through_head
        self._loss: Tensor | None = None
        self._output: Tensor | None = None

    def out_of_head(self, result: Any, hidden: Tensor) -> Tensor:
        """Return what the head returns: a tensor that the model's code can go on with."""
        self._loss = _loss_in(result) if self._through_model else None
        if self._loss is None:
            return hidden[..., :1].detach() * 0
        if not self._through_head:
            self._output = self._loss
            return hidden[..., :1].detach() * 0
        return self._loss.reshape(1, 1, 1).expand(*hidden.shape[:-1], 1)

    def note(self, _: nn.Module, __: Any, output: Tensor) -> None:
        """Note the head's output as the engine's hooks have left it."""
        self._output = output

    def out_of_model(self, result: Any) -> Any:
        """Return what the model returns for a result."""
        if self._loss is None or self._output is None:
            return result
        return _with_loss(result, self._output.flatten()[0])

    def arrived(self, result: Any) -> Any:
        """Return the result that has come out of the model, with the exact loss."""
        exact, through = self._loss, _loss_in(result)
        self._loss = self._output = None
        if exact is None or through is None:
            return result
        return _with_loss(result, cast(Tensor, _SameValue.apply(through, exact)))


@contextmanager
def _replaced(
    lm: nn.Module, read: Read, inside: Callable[[Any, Any], Any], led: _Led
) -> Iterator[None]:
    """Inside the block, the model's forward returns inside(outputs, read(head's input, head))."""
    head: Any = cast(Any, lm).get_output_embeddings()  # the probe has found that it has one
    results: list[Any] = []
    forward = lm.forward

    def tap(hidden: Tensor) -> Tensor:
        result = read(hidden, head)
        results.append(result)
        return led.out_of_head(result, hidden)

    def run(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        return inside(outputs, led.out_of_model(results.pop()))

    if is_apart(head):
        with around_head(lm, head, tap), replaced_forwards({lm: run}):
            yield
        return
    hook = head.register_forward_hook(led.note)
    try:
        with replaced_forwards({head: tap, lm: run}):
            yield
    finally:
        hook.remove()


class _Carried:
    """Carries what was read inside of a model's forward out of its adapters, in its outputs.

    Adapters may expect the model's real outputs, and may add to their loss. What has a gradient
    passes through them, because parallel wrappers look for it in what they are given.
    """

    def __init__(self, adds: bool) -> None:
        self._adds = adds
        self._result: Any = None

    def put(self, outputs: Any, result: Any) -> Any:
        self._result = result
        loss = result if isinstance(result, Tensor) else getattr(result, "loss", None)
        if isinstance(loss, Tensor):
            outputs.logits = loss
            if self._adds:
                outputs.loss = torch.zeros((), device=loss.device)
        return outputs

    def take(self, returned: Any) -> tuple[Any, Tensor | None]:
        """Return the result, and what was added to the loss."""
        result, self._result = self._result, None
        if isinstance(result, Tensor):
            result = returned.logits
        elif isinstance(getattr(result, "loss", None), Tensor):
            result = result._replace(loss=returned.logits)
        return result, returned.loss if self._adds else None


class _Alone:
    """Hands on what was read where nothing is around the model but an engine.

    Engines look for tensors in what a forward returns, and may cast them.
    """

    def __init__(self, through_head: bool) -> None:
        self._through_head = through_head
        self._result: Any = None

    def put(self, outputs: Any, result: Any) -> Any:
        if not self._through_head:
            return result
        self._result, loss = result, _loss_in(result)
        return outputs.logits.detach() if loss is None else loss

    def take(self, returned: Any) -> tuple[Any, Tensor | None]:
        """Return the result; nothing was added to it."""
        result, self._result = self._result, None
        if not self._through_head:
            return returned, None
        return (result if _loss_in(result) is None else _with_loss(result, returned)), None


def call_in_head(
    model: nn.Module,
    lm: nn.Module,
    read: Read,
    kwargs: Mapping[str, Any],
    *,
    is_bare: bool,
    adds: bool,
    in_pieces: bool,
) -> tuple[Any, Tensor | None]:
    """Return what `read` made inside of the model's forward, and what adapters added to its loss.

    Args:
        model: to run, wrapped or not.
        lm: the Transformers model in it.
        read: called once, in the place of the head.
        kwargs: of the model's forward.
        is_bare: whether nothing but parallel wrappers is around `lm`.
        adds: whether adapters add to the loss of the model's outputs.
        in_pieces: whether parameters lie in pieces on several processes.
    """
    carried = _Alone(in_pieces) if is_bare else _Carried(adds)
    head = cast(Any, lm).get_output_embeddings()
    led = _Led(in_pieces, in_pieces and not is_apart(head))
    with _replaced(lm, read, carried.put, led):
        result, added = carried.take(model(**kwargs))
    return led.arrived(result), added
