"""Registers ops with torch, their arguments and results by name.

An operator's schema is a flat list of tensors, numbers and strings. Here it is that of two
NamedTuples, so that what computes, what allocates and what differentiates read fields by name.
"""

import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from metal_ops.backends.blocks.sizes import may_ask

Arguments = TypeVar("Arguments", bound=tuple[Any, ...])
Result = TypeVar("Result", bound=tuple[Tensor, ...])

TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    bool: "bool",
    float: "float",
    float | None: "float?",
}


def schema_of(arguments: type[tuple[Any, ...]], result: type[tuple[Tensor, ...]]) -> str:
    """Write the schema of an op that takes one NamedTuple's fields and returns another's."""
    taken = ", ".join(f"{TYPES[t]} {name}" for name, t in typing.get_type_hints(arguments).items())
    returned = ", ".join(TYPES[t] for t in typing.get_type_hints(result).values())
    return f"({taken}) -> ({returned})"


def register(
    name: str,
    arguments: type[Arguments],
    result: type[Result],
    *,
    compute: Callable[[Arguments], Result],
    allocate: Callable[[Arguments], Result],
) -> CustomOpDef:
    """Make an op of torch from a function of named arguments.

    Args:
        name: with its namespace.
        arguments: a NamedTuple of what the op takes, in the order of its schema.
        result: a NamedTuple of the tensors that it returns.
        compute: the op.
        allocate: tensors like those that `compute` returns, for fake tensors.
    """

    def flat(*values: Any) -> tuple[Tensor, ...]:
        return tuple(compute(arguments(*values)))

    def flat_fake(*values: Any) -> tuple[Tensor, ...]:
        return tuple(allocate(arguments(*values)))

    schema = schema_of(arguments, result)
    op = torch.library.custom_op(name, flat, mutates_args=(), schema=schema)
    op.register_fake(flat_fake)
    return op


def differentiate(
    op: CustomOpDef,
    arguments: type[Arguments],
    result: type[Result],
    *,
    save: Callable[[Any, Arguments, Result], None],
    gradients: Callable[[Any, Tensor], Mapping[str, Tensor | None]],
) -> None:
    """Make the first result of an op, its loss, differentiable.

    Args:
        op: what `register` made of
        arguments: and
        result: these.
        save: keeps in torch's context what `gradients` needs.
        gradients: from that context and the gradient of the loss to those of arguments by name.
    """
    names = list(typing.get_type_hints(arguments))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        save(ctx, arguments(*inputs), result(*output))
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros for the other results, one of them [N, V]

    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        found = {} if upstream is None else gradients(ctx, upstream)
        return tuple(found.get(name) for name in names)

    op.register_autograd(backward, setup_context=setup)


def scaled(grad: Tensor, upstream: Tensor) -> Tensor:
    """Multiply grad by upstream, in the memory of grad where nobody will ask for it again."""
    # a tensor of one element with dimensions takes part in type promotion, one without does not
    upstream = upstream.reshape([1] * grad.ndim) if upstream.ndim == 0 else upstream
    plain = type(grad) is Tensor and not torch.compiler.is_compiling()
    internals: Any = torch._C
    plain = plain and not internals._functorch.is_legacy_batchedtensor(upstream)
    autograd = internals._autograd
    if not plain or autograd._get_current_graph_task_keep_graph():  # retain_graph=True
        return (grad * upstream).to(grad.dtype)
    if may_ask(grad):
        if upstream.numel() == 1 or (upstream.numel() and not any(upstream.stride())):
            # one number for all, in place counts in full precision, and is not converted entry by
            # entry, which takes ten times as long
            upstream = upstream.flatten()[0]
        if bool((upstream == 1).all()):
            return grad
    return grad.mul_(upstream)
