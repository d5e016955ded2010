"""Trying out how a model counts positions: a short row alone, and the same row beside padding.

Shapes: n tokens of the row, V vocabulary.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hf_distill.models.structure import causal_lm, in_pieces

ROW = 8  # tokens of a trial, where the model's table of positions is long enough
PADDING = 7  # odd, so that blocks of keys that follow the columns are others beside padding
SHORT = 2  # tokens that any table has, and one more
LENIENT = 1e-4  # of the largest logit, in float32; padding that counts gives more than 1e-3
MOST_NOISE = 0.05  # padding on the right that changes more than this is no rounding


class Lookup(NamedTuple):
    """Says what was looked up in a table: how many rows it has, and which were asked for."""

    rows: int
    numbers: list[int]


class Spy(TorchFunctionMode):
    """Notes the lookups of one row, and the coarsest dtype that results have."""

    def __init__(self) -> None:
        super().__init__()
        self.lookups: list[Lookup] = []
        self.eps = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding:
            numbers, table = (*args, *kwargs.values())[:2]
            self._note(table, numbers)
        elif func is Tensor.__getitem__ and isinstance(args[0], nn.Parameter):
            first = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
            if isinstance(first, Tensor):
                self._note(args[0], first)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_floating_point() and result.element_size() > 1:
            self.eps = max(self.eps, torch.finfo(result.dtype).eps)
        return result

    def _note(self, table: Tensor, numbers: Tensor) -> None:
        if in_pieces(numbers):  # as tensor parallelism hands them to its embeddings
            numbers = cast(Any, numbers).full_tensor()
        whole = numbers.dtype in (torch.int32, torch.int64)
        if whole and numbers.ndim and numbers.numel() == numbers.shape[-1]:
            self.lookups.append(Lookup(len(table), numbers.flatten().tolist()))


@dataclass
class Said:
    """Holds what a model says of a row's n tokens: logits [n, V] in float32, and what led to it."""

    logits: Tensor
    lookups: list[Lookup]
    eps: float

    def apart(self, other: "Said") -> float:
        """Return the mean over tokens of the largest difference, over the other's largest logit."""
        difference = (self.logits - other.logits).abs().amax(-1).mean()
        found = float(difference / other.logits.abs().max().clamp_min(1e-30))
        return found if found == found else float("inf")


@dataclass
class Trial:
    """Holds a row, and a model to read it.

    Attributes:
        run: the model as it is called.
        lm: the Transformers model in it.
        name: of the row's input, "input_ids" or "inputs_embeds".
        row: [1, n] or [1, n, H].
        others: further inputs of one row, [1] or [1, n, ...].
        masked: whether the model is given an attention mask.
    """

    run: Callable[..., Any]
    lm: nn.Module
    name: str
    row: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)
    masked: bool = True

    def first(self, length: int) -> "Trial":
        """Return the trial with the row's first tokens only."""
        others = {k: x if x.ndim == 1 else x[:, :length] for k, x in self.others.items()}
        return Trial(self.run, self.lm, self.name, self.row[:, :length], others, self.masked)

    @property
    def takes_positions(self) -> bool:
        """Return whether the forward has an argument for positions."""
        return "position_ids" in inspect.signature(self.lm.forward).parameters

    def read(
        self,
        left: int = 0,
        right: int = 0,
        fill: Tensor | int = 0,
        first_position: int | None = None,
    ) -> Said:
        """Run the model.

        Args:
            left: columns of padding before the row.
            right: columns of padding behind it.
            fill: a token of the padding.
            first_position: of the row's first token, given to the model; None gives none.
        """
        length, device = self.row.shape[1], self.row.device
        mask = F.pad(torch.ones(1, length, dtype=torch.long, device=device), (left, right))
        inputs: dict[str, Any] = {self.name: _surrounded(self.row, left, right, fill)}
        inputs |= {k: _surrounded(x, left, right, 0) for k, x in self.others.items()}
        if self.masked:
            inputs["attention_mask"] = mask
        if first_position is not None:
            at = torch.arange(-left, length + right, device=device).clamp_min(0)
            inputs["position_ids"] = at[None] + first_position
        if "use_cache" in inspect.signature(self.lm.forward).parameters:
            inputs["use_cache"] = False
        with Spy() as spy, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of adapters that leave positions out, say
            outputs = self.run(**inputs)
        logits = getattr(outputs, "logits", None)
        logits = outputs[0] if logits is None else logits  # a model without a head
        if logits.ndim == 3:  # tokens of an adapter may stand before the padding
            logits = logits[0, logits.shape[1] - right - length : logits.shape[1] - right]
        return Said(logits.float(), spy.lookups, spy.eps)


def _surrounded(x: Tensor, left: int, right: int, fill: Tensor | int) -> Tensor:
    """Return [1, left + n + right, ...] of [1, n, ...]; what is one a row stays."""
    if x.ndim == 1:
        return x
    one = torch.zeros_like(x[:, :1]) + fill
    return torch.cat([*[one] * left, x, *[one] * right], dim=1)


def ascends(numbers: list[int]) -> bool:
    """Return whether they are two or more numbers that ascend by one."""
    return len(numbers) > 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def positions_in(said: Said, shorter: Said, row: Tensor) -> Lookup | None:
    """Return the first lookup by numbers that ascend by one, of which a longer row has more.

    Args:
        said: of the row.
        shorter: of the row without its last token.
        row: [1, n] or [1, n, H]; its own ids may ascend too.
    """
    own = None if row.is_floating_point() else row.flatten().tolist()
    before = [lookup.numbers for lookup in shorter.lookups]
    for lookup in said.lookups:
        grows = lookup.numbers[:-1] in before and lookup.numbers != own
        if grows and ascends(lookup.numbers):
            return lookup
    return None


def synthetic_row(lm: nn.Module, device: torch.device) -> Tensor:
    """Return [1, n] descending ids, which are not taken for positions, without the padding's."""
    ids = torch.arange(ROW + 1, 0, -1, device=device) % _num_ids(lm)
    return ids[ids != pad_id(lm)][None, :ROW]


def one_row(
    run: Callable[..., Any], model: nn.Module, inputs: Mapping[str, Any], name: str
) -> Trial:
    """Make a trial of the first tokens of the batch's longest row, without its padding.

    Inputs that have neither the shape of the ids nor one entry a row (images, say) are left out,
    so the row is read as text.
    """
    lm, given, mask = causal_lm(model), inputs[name], inputs.get("attention_mask")
    width = given.shape[:2]
    real = torch.ones(width, dtype=torch.bool, device=given.device) if mask is None else mask != 0
    if not given.is_floating_point():
        # without ids that only stand for images, and the padding's, which may have no position
        real = real & (given >= 0) & (given < _num_ids(lm)) & (given != pad_id(lm))
    at = int(real.sum(1).argmax())
    keep = real[at]
    row, others = given[at][keep][None, :ROW], {}
    for key, x in inputs.items():
        if key in (name, "attention_mask", "labels") or not isinstance(x, Tensor):
            continue
        if x.shape[:2] == width and x.ndim >= 2:
            others[key] = x[at][keep][None, :ROW]
        elif x.shape == width[:1]:
            others[key] = x[at : at + 1]
    if row.shape[1] < 2 and not given.is_floating_point():
        row, others = synthetic_row(lm, given.device), {}
    return Trial(run, lm, name, row, others, mask is not None)


def pad_id(lm: nn.Module) -> int:
    """Return the padding's id as the model knows it, or -1."""
    config: Any = getattr(lm, "config", None)
    found = None if config is None else getattr(config.get_text_config(), "pad_token_id", None)
    return -1 if found is None else found


def _num_ids(lm: nn.Module) -> int:
    """Return how many ids the model has embeddings of."""
    config: Any = getattr(lm, "config", None)
    found = None if config is None else getattr(config.get_text_config(), "vocab_size", None)
    return 2**31 if found is None else found
