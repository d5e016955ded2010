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
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn

from hf_distill.alignment import Side
from hf_distill.layers import States, Watch
from hf_distill.model_kinds import is_classifier
from metal_ops import Head, SparseTeacher, reference

logger = logging.getLogger(__name__)

PROBE_TOKENS = 8


class TailRule(NamedTuple):
    """How the loss reads a sparse signal outside the known entries.

    See `tail` and `max_ratio` of `metal_ops.sparse_divergence`.
    """

    tail: str = "auto"
    max_ratio: float | None = 4.0


@dataclass(frozen=True)
class Signal:
    """What a model says about the N scored tokens, in one of three forms.

    `logits` [N, V]; `hidden` [N, H] and `head`; or `sparse`, the log-probabilities of a few entries
    and the mass of the rest, with a rule for that rest. Exactly one form is set. `states` are
    those of the layers that are compared.

    `paired` [N] bool: the scored tokens that the signal is about, its rows in their order; None is
    all of them. Teachers with another tokenizer have not a token for each of the student's.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    head: Head | None = None
    sparse: SparseTeacher | None = None
    tail: TailRule = field(default_factory=TailRule)
    states: States = field(default_factory=States)
    paired: Tensor | None = None

    def dense(self) -> Tensor:
        """[N, V] logits, projected now if they were not.

        Raises:
            ValueError: the signal is sparse.
        """
        if self.logits is not None:
            return self.logits
        if self.sparse is not None:
            raise ValueError(
                f"a sparse signal has no logits: it knows {self.sparse.ids.shape[-1]} entries of "
                "the vocabulary"
            )
        assert self.hidden is not None
        assert self.head is not None
        h = self.head
        return reference.head(self.hidden, h.weight, h.bias, h.logit_scale, h.softcap)


def unwrap(model: nn.Module) -> nn.Module:
    """The model without its parallel wrapper; adapters stay."""
    return extract_model_from_parallel(model)


def causal_lm(model: nn.Module) -> nn.Module:
    """The Transformers model itself, without parallel wrapper and PEFT wrapper."""
    model = unwrap(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def output_head(lm: nn.Module) -> Any:
    """The model's output embeddings, a module, or None."""
    getter = getattr(lm, "get_output_embeddings", None)
    return None if getter is None else getter()


def vocab_size(lm: nn.Module) -> int | None:
    """Number of logits per position, or per row; None if the model does not say."""
    if is_classifier(lm):
        return cast(Any, lm.config).num_labels
    head = output_head(lm)
    if isinstance(head, nn.Linear):
        return head.out_features
    config = getattr(lm, "config", None)
    return None if config is None else getattr(config.get_text_config(), "vocab_size", None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode (no dropout, no gradient checkpointing) inside the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def kept_rng(device: torch.device) -> Iterator[None]:
    """The random state of the CPU and of a device is afterwards as it was."""
    module = None if device.type == "cpu" else getattr(torch, device.type)
    state = None if module is None else module.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            if module is not None:
                module.set_rng_state(state)


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    had = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if had is None:
            del module.forward
        else:
            module.forward = had


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

    with _replaced_forward(head, tap), _replaced_forward(lm, run):
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
def probe(lm: nn.Module, input_ids: Tensor) -> tuple[float, float | None] | str:
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
        self.watch = Watch(name)  # layers whose states a signal has
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
        row = ids[0] if mask is None or mask.ndim != 2 else ids[0][mask[0].bool()]
        return probe(lm, row[None, :PROBE_TOKENS])

    def forward_inputs(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """The inputs, with the cache off and positions counted from each row's first real token.

        Explicit positions make a left-padded row mean what the right-padded one does, also for
        models with learnt positions. A classifier gets those inputs that its forward names, as
        they are: encoders count their positions in ways of their own.
        """
        lm = causal_lm(model)
        names = inspect.signature(lm.forward).parameters
        if is_classifier(lm):
            named = {name: value for name, value in inputs.items() if name in names}
            return named or dict(inputs)  # a forward of *args and **kwargs names none
        result: dict[str, Any] = dict(inputs)
        if "use_cache" in names:
            result.setdefault("use_cache", False)
        mask = inputs.get("attention_mask")
        if "position_ids" in names and mask is not None and mask.ndim == 2:
            result.setdefault("position_ids", (mask.long().cumsum(-1) - 1).clamp_min(0))
        return result

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

    @torch.no_grad()
    def signal(self, model: nn.Module, side: Side, frozen_head: bool = True) -> Signal:
        """The model's signal without gradient.

        Args:
            model: the model to read.
            side: its part of the batch.
            frozen_head: False keeps the head's own parameter in the signal, so that the op can see
                that student and teacher share it; True takes its value now.
        """
        reads_hidden = self.reads_hidden(model, side.inputs)
        with self.watch.on(causal_lm(model), side.predicts) as seen:
            found = self._signal(model, side, frozen_head, reads_hidden)
        return replace(found, states=seen.states())

    def _signal(
        self, model: nn.Module, side: Side, frozen_head: bool, reads_hidden: bool
    ) -> Signal:
        if not reads_hidden:
            return Signal(logits=self.logits(model, side))

        def read(hidden: Tensor, head: Head) -> Signal:
            if frozen_head:
                bias = None if head.bias is None else head.bias.detach()
                head = replace(head, weight=head.weight.detach(), bias=bias)
            return Signal(hidden=hidden, head=head)

        return self.at_head(model, side, read)
