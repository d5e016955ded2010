"""Positions of tokens: a model counts them itself, unless rows that are padded on the left need it.

A model that counts from the padding on reads a row that is padded on the left otherwise than the
row alone. Giving it positions counted from the row's first token mends that for many; others count
in ways of their own (from the padding's id on, along three axes where there are images), and must
be left alone. What is right is tried out once for each model, on a short row.

Shapes: B rows, T columns of the batch.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_distill.models.modes import evaluating, kept_rng
from hf_distill.models.position_trials import (
    LENIENT,
    MOST_NOISE,
    PADDING,
    ROW,
    SHORT,
    Said,
    Trial,
    ascends,
    one_row,
    pad_id,
    positions_in,
)
from hf_distill.models.structure import causal_lm, is_sharded, unwrap

logger = logging.getLogger(__name__)

OWN, OWN_BY_ID, GIVEN, NEITHER = "own", "own by id", "given", "neither"
UNPADDED = "unpadded"
TEXT_INPUTS = {"input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "use_cache"}


@dataclass
class Way:
    """Says how rows that are padded on the left are read right.

    Attributes:
        kind: one of the five above.
        own: how far a row is from itself alone at the model's own positions, see `Said.apart`.
        given: the same at positions that are given; NaN if the forward takes none.
        own_is_right: whether the model's own are right as well.
        fill: the padding's id that the model itself knows, for "own by id".
    """

    kind: str
    own: float
    given: float
    own_is_right: bool = False
    fill: int = 0


def _knows_padding(padded: Said, alone: Said, trial: Trial) -> bool:
    """Return whether the row's positions are looked up as they are without padding."""
    ids = trial.row[0].tolist()
    tails = [x.numbers[-len(ids) :] for x in padded.lookups if len(x.numbers) > len(ids)]
    found = [x.numbers for x in alone.lookups if ascends(x.numbers) and x.numbers != ids]
    return any(numbers in tails for numbers in found)


def find_way(trial: Trial, limit: int | None, first: int) -> Way:
    """Read the row alone, and padded on either side.

    Args:
        trial: the row.
        limit: tokens that the model has positions for, or None.
        first: the position of a row's first token, as the model itself counts.
    """
    room = ROW + PADDING if limit is None else limit
    row = trial.first(max(2, min(trial.row.shape[1], room // 2)))
    columns = max(1, min(PADDING, room - row.row.shape[1]))
    alone, fill = row.read(), row.row[0, 0]  # any token but the padding's
    noise = row.read(right=columns, fill=fill).apart(alone)
    reads_padding = MOST_NOISE < noise < math.inf  # no number says nothing
    noise = noise if noise <= MOST_NOISE else 0.0
    limits = max(LENIENT, 8 * alone.eps, 4 * noise)  # rounding differs where the width does
    padded = row.read(columns, fill=fill)
    own = padded.apart(alone)
    given = float("nan")
    if row.takes_positions:
        given = row.read(columns, fill=fill, first_position=first).apart(alone)
    pad = pad_id(row.lm)
    by_id = row.read(columns, fill=max(pad, 0))
    if own <= limits:
        # where both are right, a model may still learn to tell how far the row was moved: scales
        # behind rotary positions that are all 1 at the start do, and 16 bits hide small differences
        # adapters with virtual tokens ignore what they are given, to the bit
        moves = given <= limits and given != own and not _knows_padding(padded, alone, row)
        return Way(GIVEN if moves else OWN, own, given, own_is_right=True)
    if pad >= 0 and by_id.apart(alone) <= limits and _knows_padding(by_id, alone, row):
        return Way(OWN_BY_ID, by_id.apart(alone), given, fill=pad)
    if given <= limits:
        return Way(GIVEN, own, given)
    return Way(UNPADDED if reads_padding else NEITHER, own, given)


WHY = {
    OWN: "positions are the model's own",
    OWN_BY_ID: "positions are the model's own, which tells padding by its id: where rows are "
    "padded on the left they get that id",
    GIVEN: "positions are counted from each row's first token, because a row that is padded on "
    "the left is not read as it is alone at the model's own",
    UNPADDED: "rows must be as long as each other, because one that is padded on the right is not "
    "read as it is alone",
    NEITHER: "positions are the model's own; rows must be padded on the right, because one that is "
    "padded on the left is not read as it is alone, at whatever positions",
}


EITHER = (
    "positions are counted from each row's first token where the forward takes them; the model's "
    "own are right as well"
)


class Positions:
    """Holds what is known of one model's positions.

    Attributes:
        limit: the most tokens of a row that the model has learnt positions for; None if it has
            none such, or is not known yet.
        first: the position of a row's first token where the model counts itself, as it would have
            to be given.
        way: how rows that are padded on the left are read, or None if that is not known yet.
        are_never_given: whether `arguments` returns none, and raises nothing, whatever the batch.
    """

    def __init__(self) -> None:
        self.limit: int | None = None
        self.first = 0
        self.way: Way | None = None
        self.are_never_given = self._is_measured = False

    def arguments(self, model: nn.Module, inputs: Mapping[str, Any], whose: str) -> dict[str, Any]:
        """Return forward inputs to add or to change: `position_ids` [B, T], `input_ids`, or none.

        Nothing is changed where rows have no padding on the left, the batch has positions, or its
        mask is not [B, T].

        Args:
            model: wrapped or not.
            inputs: of its forward.
            whose: "student" or "teacher", for messages.

        Raises:
            ValueError: a row is longer than the learnt positions, or is padded on the left where
                the model cannot read that.
        """
        name = "input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"
        tokens, mask = inputs.get(name), inputs.get("attention_mask")
        if tokens is None or inputs.get("position_ids") is not None:
            return {}
        if mask is not None and not (isinstance(mask, Tensor) and mask.shape == tokens.shape[:2]):
            return {}
        self._find_out(model, inputs, name, whose)
        self.check_length(model, tokens, mask, whose)
        return {} if mask is None else self._changes(model, tokens, mask, inputs, whose)

    def _find_out(self, model: nn.Module, inputs: Mapping[str, Any], name: str, whose: str) -> None:
        """Try the model at the first batch, and at the first one with a mask."""
        masked = inputs.get("attention_mask") is not None
        if self._is_measured and (self.way is not None or not masked):
            return
        run = model if is_sharded(model) else unwrap(model)
        with torch.no_grad(), evaluating(run), kept_rng(inputs[name].device):
            trial = one_row(run, model, inputs, name)
            if not self._is_measured:
                self._measure(trial)
            if masked:
                self.way = find_way(trial, self.limit, self.first)
                self.are_never_given = self.limit is None and self.way.kind == OWN
                # what is as in `Trainer` need not be said
                level = logging.DEBUG if self.way.own_is_right else logging.INFO
                logger.log(
                    level,
                    "%s: %s (%.1g of the largest logit apart at its own, %.1g at given ones)",
                    whose,
                    EITHER if self.way.own_is_right else WHY[self.way.kind],
                    self.way.own,
                    self.way.given,
                )

    def _measure(self, trial: Trial) -> None:
        """Find how many learnt positions there are, and the first of them."""
        self._is_measured = True
        shorter, row = trial.first(SHORT), trial.first(SHORT + 1)
        own = positions_in(row.read(), shorter.read(), row.row)
        if own is not None:
            self.limit = row.row.shape[1] + own.rows - 1 - own.numbers[-1]
        if trial.takes_positions:
            read = [each.read(first_position=0) for each in (row, shorter)]
            given = positions_in(read[0], read[1], row.row)
            if own is not None and given is not None:
                self.first = own.numbers[0] - given.numbers[0]

    def check_length(
        self, model: nn.Module, tokens: Tensor, mask: Tensor | None, whose: str
    ) -> None:
        """Check that no row has more tokens than there are learnt positions, by shapes first.

        Raises:
            ValueError: one has.
        """
        longest = tokens.shape[1]
        if self.limit is None or longest <= self.limit:
            return
        if mask is not None:  # padding alone may stand out; this waits for the device
            longest = int((_from_start(mask) * (mask != 0)).max()) + 1
        if longest > self.limit:
            raise ValueError(
                f"{whose}: a row has {longest} tokens, but the learnt positions of this "
                f"{type(causal_lm(model)).__name__} are for {self.limit}: shorten the rows (a "
                "HintCollator has max_prompt_length, max_hint_length and max_completion_length), "
                "or take a model with more positions"
            )

    def _changes(
        self,
        model: nn.Module,
        tokens: Tensor,
        mask: Tensor,
        inputs: Mapping[str, Any],
        whose: str,
    ) -> dict[str, Any]:
        assert self.way is not None
        kind = self.way.kind
        if kind == OWN or (self.way.own_is_right and not inputs.keys() <= TEXT_INPUTS):
            return {}  # with images, say, positions may be more than a count
        if kind == UNPADDED:
            self._refuse_padding(model, mask, whose)
            return {}
        if kind == NEITHER:
            self._refuse_padding_on_the_left(model, mask, whose)
            return {}
        at = _from_start(mask)
        if kind == OWN_BY_ID:
            return {"input_ids": tokens.masked_fill(at < 0, self.way.fill)}
        at = at.clamp(0, None if self.limit is None else self.limit - 1)
        return {"position_ids": at + self.first}

    def _refuse_padding(self, model: nn.Module, mask: Tensor, whose: str) -> None:
        if bool(((mask == 0).any(1) & (mask != 0).any(1)).any()):
            raise ValueError(
                f"{whose}: a {type(causal_lm(model)).__name__} does not read a row that is padded "
                "on the right as it reads the row alone: give batches of one row, or of rows of "
                "one length"
            )

    def _refuse_padding_on_the_left(self, model: nn.Module, mask: Tensor, whose: str) -> None:
        # waits for the device, at each batch of these few models only
        if bool(((mask[:, 0] == 0) & (mask != 0).any(1)).any()):
            raise ValueError(
                f"{whose}: a {type(causal_lm(model)).__name__} does not read a row that is padded "
                "on the left as it reads the row alone, and positions do not mend it: pad on the "
                "right (padding_side='right' of the tokenizer or the data collator)"
            )


def _from_start(mask: Tensor) -> Tensor:
    """Return [B, T]: columns counted from each row's first token, negative before it.

    Behind it every column counts, also a hole in the mask, as models count themselves.
    """
    start = (mask != 0).int().argmax(-1, keepdim=True)  # the first of equals; 0 for no token
    return torch.arange(mask.shape[1], device=mask.device) - start


_KNOWN: WeakKeyDictionary[nn.Module, dict[str, Positions]] = WeakKeyDictionary()


def positions_of(model: nn.Module, by: str = "input_ids") -> Positions:
    """Return what is known of a model, wrapped or not; one record for all who run it.

    Args:
        model: wrapped in parallel wrappers or not; adapters are part of it.
        by: what its rows are made of, "input_ids" or "inputs_embeds".
    """
    return _KNOWN.setdefault(unwrap(model), {}).setdefault(by, Positions())
