"""Whether a model reads packed rows as it reads them alone.

Two short rows are read in one sequence, told apart as the batch tells its own. Where another token
of the first moves the second's logits, the rows see each other: the attention, or a state that goes
on from token to token, does not end with a row. Then both are compared with the rows alone, at the
model's own positions.
"""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from hf_distill.data.packed_rows import BOUNDS, may_be_packed
from hf_distill.data.sides import Side
from hf_distill.models import packed_attention  # noqa: F401 - registers "packed_sdpa"
from hf_distill.models.causality import logits_of
from hf_distill.models.position_trials import LENIENT, Said, Spy, synthetic_row
from hf_distill.models.probe_rows import ProbeRow
from hf_distill.models.structure import Kind, causal_lm, kind_of

logger = logging.getLogger(__name__)

LENGTHS = (5, 6)  # of the two rows; not equal, so that no block of keys is both
ROUNDED = 8  # times the coarsest dtype's step; rounding differs where the width does


def _ids(lm: nn.Module, given: Tensor) -> Tensor:
    """Return [1, n] ids of the batch's first tokens, or others where it has too few."""
    wanted = sum(LENGTHS)
    own = given.flatten()[:wanted]
    if len(own) == wanted:
        return own[None]
    row = synthetic_row(lm, given.device)[0]
    return row.repeat(1 + wanted // len(row))[None, :wanted]


def _told(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return inputs that tell the two rows apart, those that the batch has."""
    first, second = LENGTHS
    ends = torch.tensor([0, first, first + second], dtype=torch.int32, device=device)
    numbers = torch.tensor([[0] * first + [1] * second], dtype=torch.int32, device=device)
    made: dict[str, Any] = dict.fromkeys(BOUNDS[:2], ends) | {BOUNDS[4]: numbers}
    made |= dict.fromkeys(BOUNDS[2:4], max(LENGTHS))
    positions = inputs.get("position_ids")
    if isinstance(positions, Tensor):
        start = positions.flatten()[0]
        made["position_ids"] = torch.cat([torch.arange(n, device=device) for n in LENGTHS]) + start
        made["position_ids"] = made["position_ids"][None]
    return {name: value for name, value in made.items() if inputs.get(name) is not None}


def _read(run: nn.Module, ids: Tensor, told: Mapping[str, Any], whose: str) -> Said:
    names = inspect.signature(causal_lm(run).forward).parameters
    inputs = {"input_ids": ids, **told} | ({"use_cache": False} if "use_cache" in names else {})
    with Spy() as spy:
        logits = logits_of(run, ProbeRow(inputs, is_cut=True), inputs, whose)
    return Said(logits[0, logits.shape[1] - ids.shape[1] :].float(), [], spy.eps)


def _part(said: Said, row: int) -> Said:
    first = LENGTHS[0]
    return Said(said.logits[first:] if row else said.logits[:first], [], said.eps)


@torch.no_grad()
def find_refusal(run: nn.Module, inputs: Mapping[str, Any], whose: str) -> str | None:
    """Return why packed rows are not read as they are alone, or None.

    Args:
        run: the model as it is called.
        inputs: of a batch that `may_be_packed`.
        whose: "student" or "teacher".
    """
    lm = causal_lm(run)
    parameters = inspect.signature(lm.forward).parameters
    takes_any = any(x.kind == x.VAR_KEYWORD for x in parameters.values())
    ids = _ids(lm, inputs["input_ids"])
    told = _told(inputs, ids.device)
    unread = [name for name in told if name not in parameters]
    if unread and not takes_any:
        return f"its forward has no argument {unread[0]!r}"
    packed = _read(run, ids, told, whose)
    others = torch.cat([(ids[:, : LENGTHS[0]] - 1).abs(), ids[:, LENGTHS[0] :]], dim=1)
    moved = _part(_read(run, others, told, whose), 1).apart(_part(packed, 1))
    alone = [_read(run, x, {}, whose) for x in ids.split(LENGTHS, dim=1)]
    apart = max(_part(packed, i).apart(alone[i]) for i in range(2))
    logger.info(
        "%s: packed rows move each other by %.1g of the largest logit, and are %.1g from the rows "
        "alone", whose, moved, apart,
    )  # fmt: skip
    if moved > max(LENIENT, packed.eps):
        kind = getattr(getattr(lm, "config", None), "_attn_implementation", None)
        how = f" with attn_implementation {kind!r}" if kind else ""
        return (
            f"rows of one sequence see each other: another token in one moves the logits of the "
            f"next by {moved:.1g} of the largest{how}, told apart by {', '.join(told)}"
        )
    if apart > max(LENIENT, ROUNDED * packed.eps):
        return (
            f"its logits are {apart:.1g} of the largest from those of the rows alone; the first "
            "position of a row must be the model's own (position_ids_start of "
            "DataCollatorWithFlattening)"
        )
    return None


class PackingCheck:
    """Looks at a model at the first batch that may hold packed rows."""

    def __init__(self) -> None:
        self._is_known, self._refusal = False, None

    def look(self, model: nn.Module, side: Side, whose: str, in_pieces: bool) -> None:
        """Check a batch; all processes ask the model at the same batch.

        Args:
            model: wrapped or not.
            side: its part of the batch.
            whose: "student" or "teacher".
            in_pieces: whether the model's parameters lie in pieces, so that its wrapper must run.

        Raises:
            ValueError: the batch holds packed rows, which the model does not read as it reads them
                alone.
        """
        ids = side.inputs.get("input_ids")
        if not may_be_packed(side.inputs) or not isinstance(ids, Tensor) or ids.ndim != 2:
            return
        if not self._is_known and kind_of(causal_lm(model)) == Kind.CAUSAL:
            run = model
            if not in_pieces:
                run = extract_model_from_parallel(model, keep_torch_compile=False)
            self._refusal = find_refusal(run, side.inputs, whose)
        self._is_known = True
        if self._refusal is not None and side.rows is not None:
            raise ValueError(
                f"{whose}: a {type(causal_lm(model)).__name__} must read packed rows as it reads "
                f"them alone, and {self._refusal}; take padded rows "
                "(DataCollatorForLanguageModeling or DataCollatorForSeq2Seq, or a HintCollator "
                "without packing), or another attn_implementation"
            )
