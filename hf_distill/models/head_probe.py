"""What a model does with its head's output, and what its adapters do around its forward.

A model's logits are wanted as `softcap * tanh(scale * head(hidden) / softcap)`, cut to the first
entries of the vocabulary. To see scale, softcap and cut, the head is replaced for one call by a
function that returns known values: small and large ones, in float32, whatever the model computes
in. The model's own logits tell the same only as far as they are large and not rounded.

Shapes: B rows, T positions, H hidden, V entries of the head.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from hf_distill.models.modes import evaluating, kept_rng, replaced_forward
from hf_distill.models.probe_rows import PROBE_TOKENS
from hf_distill.models.structure import causal_lm, in_pieces, output_head, unwrap

NOT_LINEAR = "the head does more than a linear map (an adapter or a hook)"
NOT_KNOWN = "the logits are not a scale and softcap of the head's output"


class Post(NamedTuple):
    """Says what follows the head: logit scale, softcap, and how many entries stay (None: all)."""

    scale: float
    softcap: float | None
    vocab: int | None = None


class Seen(NamedTuple):
    """Holds what a call of a model went through.

    outputs: what its own forward returned, at each time. hidden: what its head was given. returned:
    what came out of the wrappers (adapters) around it. marks: the loss that was put into outputs.
    entries: how many entries its head has.
    """

    outputs: list[Any]
    hidden: list[Tensor]
    marks: list[Tensor]
    entries: list[int]
    returned: Any = None


@contextmanager
def marked_loss(lm: nn.Module, seen: Seen) -> Iterator[None]:
    """Inside the block the model's outputs have a loss of 0, which wrappers can add to."""
    forward = lm.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        seen.outputs.append(outputs)
        if getattr(outputs, "loss", outputs) is None:
            outputs.loss = torch.zeros((), device=next(lm.parameters()).device)
            seen.marks.append(outputs.loss)
        return outputs

    with replaced_forward(lm, run):
        yield


def added_loss(seen: Seen, returned: Any) -> Tensor | None:
    """Return what wrappers have added to the loss of 0 in the outputs, or None."""
    loss = getattr(returned, "loss", None)
    if not seen.marks or not isinstance(loss, Tensor):
        return None
    return loss if loss.requires_grad or bool(loss != 0) else None


def adds_to_loss(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Return whether wrappers (AdaLoRA's, say) add to the loss that the model's outputs have.

    Args:
        model: with its adapters, without parallel wrapper.
        inputs: of its forward, without labels.
    """
    lm, seen = causal_lm(model), Seen([], [], [], [])
    if lm is unwrap(model):
        return False
    with marked_loss(lm, seen):
        returned = _calm(model, inputs)
    return added_loss(seen, returned) is not None


def _calm(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Return the model's outputs in eval mode; a model that samples there leaves no trace."""
    with evaluating(model), kept_rng(next(model.parameters()).device):
        return model(**inputs)


def _is_linear_of_fsdp(head: Any) -> bool:
    """Return whether FSDP 2 has made the head's class of that of a linear layer."""
    return isinstance(head, FSDPModule) and nn.Linear in type(head).__bases__


def _head_refusal(head: Any) -> str | None:
    """Return why the model's head cannot be applied by itself, or None."""
    if head is None:
        return "the model has no output embeddings"
    if type(head) is not nn.Linear and not _is_linear_of_fsdp(head):
        return f"the head is a {type(head).__module__.split('.')[0]} {type(head).__name__}"
    weight = head.weight
    if not weight.is_floating_point():
        return f"the head's weight is {weight.dtype}"
    if type(weight) not in (Tensor, nn.Parameter) and not in_pieces(weight):
        return f"the head's weight is a {type(weight).__module__.split('.')[0]} " + (
            type(weight).__name__
        )
    if weight.is_meta:
        return "the head's weight is not kept on a device (offloaded)"
    return None


def _is_linear(head: nn.Linear) -> bool:
    """Return whether calling the head, with its hooks, is the linear map of its weight and bias.

    Rows of one entry that is not 0 pick columns of the weight, which no dtype rounds.
    """
    weight = head.weight
    size = min(PROBE_TOKENS, weight.shape[1])
    columns = torch.arange(size, device=weight.device) * (weight.shape[1] // size)
    picks = torch.zeros(1, size, weight.shape[1], dtype=weight.dtype, device=weight.device)
    picks[0, torch.arange(size), columns] = 2.0 ** (torch.arange(size) % 3).to(picks)
    said, wanted = head(picks), F.linear(picks, weight, head.bias)
    return isinstance(said, Tensor) and torch.equal(said, wanted)


FLOAT32 = torch.finfo(torch.float32).eps
MAGNITUDES = 64
SMALLEST, LARGEST = 2.0**-6, 2.0**15  # within float16, to which some models round logits


def ramp(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return known float32 values of both signs, other ones at each position, small and large."""
    sizes = torch.logspace(math.log2(SMALLEST), math.log2(LARGEST), MAGNITUDES, base=2.0)
    table = torch.cat([sizes, -sizes]).to(device)
    count = math.prod(shape[:-1])
    positions = torch.arange(count, device=device) * 37
    at = torch.arange(shape[-1], device=device) * 5 + positions[:, None]
    return table[at % len(table)].view(shape)


def _see(model: nn.Module, lm: nn.Module, head: nn.Linear, inputs: Mapping[str, Any]) -> Seen:
    """Call the model with a head that returns a ramp, and return what the call goes through."""
    seen = Seen([], [], [], [])

    def of_head(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.hidden.append(hidden.detach())
        entries = len(head.weight)  # as it is inside of the call
        seen.entries.append(entries)
        rows = hidden[:1, :PROBE_TOKENS] if hidden.ndim == 3 else hidden
        torch.set_grad_enabled(True)  # from here on, to see whether what follows is trained
        return ramp((*rows.shape[:-1], entries), hidden.device)

    with torch.no_grad(), replaced_forward(head, of_head), marked_loss(lm, seen):
        return seen._replace(returned=_calm(model, inputs))


def _around(model: nn.Module, lm: nn.Module, head: nn.Linear, seen: Seen) -> str | None:
    """Return why what is called in the head's place would not come out of the model, or None."""
    inner = getattr(unwrap(model), "base_model", lm)
    name = type(unwrap(model) if inner is lm else inner).__name__
    if not seen.outputs:
        return f"its wrapper {name} has kept the model's forward, which cannot be replaced there"
    if len(seen.outputs) > 1:
        return f"its wrapper {name} runs the model {len(seen.outputs)} times a call"
    if len(seen.hidden) != 1:
        return f"the forward calls its head {len(seen.hidden)} times"
    if seen.hidden[0].ndim != 3:
        return f"the head gets hidden states of {seen.hidden[0].ndim} axes, not 3"
    inside, outside = (getattr(x, "logits", None) for x in (seen.outputs[0], seen.returned))
    if not isinstance(inside, Tensor) or not isinstance(outside, Tensor):
        return "the forward returns no logits"
    if inside.shape != outside.shape or not torch.equal(inside.float(), outside.float()):
        return f"its wrapper {name} changes the model's logits"
    if seen.hidden[0].device != head.weight.device:
        return "the head is on another device than its input"
    return None


def _deviation(x: Tensor, y: Tensor, scale: float, softcap: float | None) -> float:
    """Return the largest relative deviation of y from what a scale and a softcap make of x."""
    want = x * scale
    if softcap is not None:
        want = softcap * torch.tanh(want / softcap)
    return float(((y - want).abs() / want.abs()).max())


def _fit(x: Tensor, y: Tensor) -> tuple[float, float | None]:
    """Return the scale and softcap that lead through the smallest and the largest value."""
    small, large = int(x.abs().argmin()), int(x.abs().argmax())
    x0, y0, x1, y1 = (abs(float(v)) for v in (x[small], y[small], x[large], y[large]))
    if y0 == 0.0 or y1 / x1 >= y0 / x0:
        return y1 / x1, None

    def scale(cap: float) -> float:
        return cap * math.atanh(min(y0 / cap, 1 - 1e-16)) / x0

    low, high = max(y0, y1), 1e3 * LARGEST * y0 / x0
    for _ in range(200):  # the softcap at which the larger value is met
        middle = math.sqrt(low * high)
        is_below = middle * math.tanh(scale(middle) * x1 / middle) < y1
        low, high = (middle, high) if is_below else (low, middle)
    return scale(high), high


def _numbers(config: Any) -> list[float]:
    """Return the numbers in a config, which say scales and softcaps exactly, and their inverses."""
    words = {} if config is None else vars(config.get_text_config())
    values = [v for v in words.values() if isinstance(v, int | float)]
    found = [float(v) for v in values if not isinstance(v, bool) and 0 < abs(v) < math.inf]
    return [1.0, *found, *(1.0 / v for v in found)]


def _near(value: float, numbers: list[float]) -> list[float]:
    """Return a value, the same with few digits, and the nearest number."""
    return [value, float(f"{value:.4g}"), min(numbers, key=lambda x: abs(x - value))]


def fit_post(x: Tensor, y: Tensor, config: Any) -> tuple[float, float | None] | None:
    """Return (scale, softcap) that make y of x, or None.

    Args:
        x: [..., V] float32, what the head returned: not 0.
        y: [..., V] the logits.
        config: of the model, or None. A number of it is taken where it fits as well as others.
    """
    eps = torch.finfo(y.dtype).eps
    x, y = x.double().flatten(), y.detach().double().flatten()
    if not bool(y.isfinite().all()):
        return None
    scale, cap = _fit(x, y)
    numbers = _numbers(config)
    caps = [] if cap is None else _near(cap, numbers)
    tried = [(s, c) for c in [*caps, None] for s in _near(scale, numbers)]
    errors = {pair: _deviation(x, y, *pair) for pair in tried}
    best = min(errors.values())
    if not best <= 8 * eps:  # a handful of roundings
        return None
    # of those that fit alike, the last: no softcap, and numbers of the config
    return [pair for pair in tried if errors[pair] <= 2 * best + 4 * FLOAT32][-1]


def _cut_head(model: nn.Module, lm: nn.Module, head: Any, inputs: Mapping[str, Any]) -> Post | str:
    """Probe as `probe_head` does, by the head's real output: hooks that join its pieces need it."""
    calls: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda _, args, out: calls.append((args[0], out)))
    try:
        logits = _calm(model, inputs).logits
    finally:
        hook.remove()
    if len(calls) != 1 or calls[0][0].ndim != 3:
        return f"the forward calls its head {len(calls)} times"
    hidden, raw = calls[0]
    weight, bias = head.weight, head.bias
    if not in_pieces(hidden):  # tensor parallelism: all processes have it whole
        weight, bias = _whole(weight), None if bias is None else _whole(bias)
    linear, raw = (_whole(x) for x in (F.linear(hidden, weight, bias), raw))
    eps = torch.finfo(raw.dtype).eps
    if not bool((linear - raw).abs().max() <= 8 * eps * raw.abs().max()):
        return NOT_LINEAR
    if not in_pieces(hidden):
        seen = _see(model, lm, head, inputs)
        return _around(model, lm, head, seen) or _post(lm, seen)
    if logits.shape != raw.shape:
        return NOT_KNOWN
    large = raw.abs() >= SMALLEST
    found = fit_post(raw[large].float(), _whole(logits)[large], _config(lm))
    return NOT_KNOWN if found is None else Post(*found)


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if in_pieces(x) else x  # pyright: ignore[reportAttributeAccessIssue]


def _config(lm: nn.Module) -> Any:
    return getattr(lm, "config", None)


@torch.no_grad()
def probe_head(model: nn.Module, inputs: Mapping[str, Any] | Tensor) -> Post | str:
    """Return what follows the model's head, or why logits cannot be made of its hidden states.

    Args:
        model: a causal LM, or one with adapters around it, without parallel wrapper.
        inputs: of its forward, few tokens; or only the ids [B, T].
    """
    given: Mapping[str, Any] = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
    lm = causal_lm(model)
    head = output_head(lm)
    refusal = _head_refusal(head)
    if refusal is not None:
        return refusal
    if in_pieces(head.weight):
        return _cut_head(model, lm, head, given)
    if not _is_linear(head):
        return NOT_LINEAR
    seen = _see(model, lm, head, given)
    return _around(model, lm, head, seen) or _post(lm, seen)


@torch.no_grad()
def probe_joined_head(model: nn.Module, inputs: Mapping[str, Any]) -> Post | str:
    """Probe as `probe_head` does, a model whose head an engine joins inside of its call only.

    All processes must call it together.

    Args:
        model: as it is called in training.
        inputs: of its forward, few tokens.
    """
    lm = causal_lm(model)
    head = output_head(lm)
    refusal = _head_refusal(head)
    if refusal is not None:
        return refusal
    own, said, wanted = head.forward, [], []

    def compared(hidden: Tensor) -> Tensor:
        wanted.append(F.linear(hidden, head.weight, head.bias))
        return own(hidden)

    hook = head.register_forward_hook(lambda _, __, out: said.append(out))
    try:
        with replaced_forward(head, compared):
            _calm(model, inputs)
    finally:
        hook.remove()
    if len(wanted) != 1:
        return f"the forward calls its head {len(wanted)} times"
    if not torch.equal(said[0].to(wanted[0]), wanted[0]):
        return NOT_LINEAR
    seen = _see(model, lm, head, inputs)
    return _around(model, lm, head, seen) or _post(lm, seen)


def _post(lm: nn.Module, seen: Seen) -> Post | str:
    """Return what the logits of a ramp say."""
    entries, logits = seen.entries[0], getattr(seen.returned, "logits", None)
    hidden = seen.hidden[0][:1, :PROBE_TOKENS]
    said = ramp((*hidden.shape[:-1], entries), hidden.device)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != said.shape[:-1]:
        return "the logits are not those of the head's output"
    if logits.requires_grad:
        return "what follows the head is trained"
    size = logits.shape[-1]
    found = fit_post(said[..., :size], logits, _config(lm)) if size <= entries else None
    if found is None:
        return NOT_KNOWN
    return Post(*found, vocab=size if size < entries else None)
