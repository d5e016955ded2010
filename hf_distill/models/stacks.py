"""The stack of a model's blocks: which they are, and how the states of tokens lie in their outputs.

Both are found by running the model on one row of a few tokens: what a model calls its decoder need
not be the stack, a loop may run a block several times, and outputs differ in their form.

Shapes: B rows, T positions, S streams, H hidden, A attention heads.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hf_distill.data.sides import scored
from hf_distill.models.modes import evaluating, kept_rng
from hf_distill.models.structure import Kind, input_embeddings, is_sharded, kind_of

CHARACTERS = 256  # ids of a model that names no vocabulary
TOKENS = 7  # of the row; no stream, head or width has this size
NEEDS_STACK = "hidden_layers need a model with one stack of blocks, each of which gives the states"

# Of one row of TOKENS: the sizes of axes that are told apart, and the order that makes [B, T, ...]
FORMS: Sequence[tuple[int, dict[int, int], tuple[int, ...]]] = (
    (3, {0: 1, 1: TOKENS}, (0, 1, 2)),  # [B, T, H]
    (3, {0: TOKENS, 1: 1}, (1, 0, 2)),  # [T, B, H], as XLNet's
    (4, {0: 1, 1: TOKENS}, (0, 1, 2, 3)),  # [B, T, S, H], as DeepSeek-V4's
    (4, {1: 1, 2: TOKENS}, (1, 2, 0, 3)),  # [S, B, T, H], as Gemma 3n's
)


def tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of a module's output, in order; those of its lists and tuples too."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for value in output:
            yield from tensors(value)


def states_of(output: Any) -> Tensor | None:
    """Return the states in a block's output: the first tensor, or the one that is named so."""
    named = getattr(output, "hidden_states", None)
    return named if isinstance(named, Tensor) else next(tensors(output), None)


def _order(states: Tensor) -> tuple[int, ...] | None:
    """Return the order of axes that makes [B, T, ...] of a block's output for a row of TOKENS."""
    for ndim, sizes, order in FORMS:
        if states.ndim == ndim and all(states.shape[k] == v for k, v in sizes.items()):
            return order
    return None


class Map(NamedTuple):
    """Says where an attention map [B, A, T, T] is: a module, and which tensor of its output."""

    module: nn.Module
    place: int


@dataclass(frozen=True)
class Layer:
    """Describes a run of a block in a forward.

    block: what runs. turn: which of its runs it is, from 0. order: of the output's axes, so that
    they become [B, T, ...]. width: what a token has, S * H, or None if it is not known. map: where
    its attention map is, or None.
    """

    block: nn.Module
    turn: int = 0
    order: tuple[int, ...] = (0, 1, 2)
    width: int | None = None
    map: Map | None = None

    def states(self, output: Any, predicts: Tensor) -> Tensor:
        """Return [N, S * H] of a block's output at the scored positions.

        Args:
            output: of the block.
            predicts: [B, T] bool, N are true.

        Raises:
            ValueError: the output has other axes than were found.
        """
        found = states_of(output)
        if found is not None and found.ndim == len(self.order):
            placed = found if self.order == (0, 1, 2) else found.permute(self.order)
            if placed.shape[:2] == predicts.shape:
                return scored(placed, predicts).flatten(1)
        shape = "no tensor" if found is None else list(found.shape)
        raise ValueError(
            f"hidden_layers need blocks that give the states of each of the {list(predicts.shape)} "
            f"tokens; a {type(self.block).__name__} gives {shape}"
        )


@dataclass
class _Run:
    """Holds what a run of a member of a list took and gave, and the maps of the modules in it."""

    stack: nn.ModuleList
    member: nn.Module
    given: set[int]
    output: Any = None
    maps: list[Map] = field(default_factory=list)

    @property
    def made(self) -> set[int]:
        return {id(x) for x in tensors(self.output)}


class _Recorder:
    """Notes the runs of lists' members in one forward, but not those inside of another's run."""

    def __init__(self) -> None:
        self.runs: list[_Run] = []
        self._open: list[_Run] = []

    def begin(self, stack: nn.ModuleList, member: nn.Module, args: Any, kwargs: Any) -> None:
        given = {id(x) for x in tensors([*args, *kwargs.values()])}
        self._open.append(_Run(stack, member, given))

    def end(self, output: Any) -> None:
        run = self._open.pop()
        run.output = output
        if not self._open:
            self.runs.append(run)

    def look(self, module: nn.Module, output: Any) -> None:
        """Note a square output of any module inside."""
        if not self._open or isinstance(output, Tensor):
            return
        for place, value in enumerate(tensors(output)):
            if value.ndim == 4 and value.shape[0] == 1 and value.shape[2:] == (TOKENS, TOKENS):
                self._open[0].maps.append(Map(module, place))
                return


def _plain_ids(lm: Any) -> Tensor:
    """Return [1, TOKENS] ids that the config gives no meaning to, such as that of an image."""
    config = lm.config
    parts = [config, config.get_text_config()]
    words = ("token_id", "token_index")
    named = [v for x in parts for k, v in x.to_dict().items() if any(word in k for word in words)]
    taken = {x for v in named for x in (v if isinstance(v, list) else [v])}
    count = getattr(input_embeddings(lm), "num_embeddings", None)
    count = count or getattr(config.get_text_config(), "vocab_size", None) or CHARACTERS
    free = [i for i in range(min(count, 4 * TOKENS + len(taken))) if i not in taken]
    ids = [free[i % len(free)] for i in range(TOKENS)]
    return torch.tensor([ids], device=next(lm.parameters()).device)


@torch.no_grad()
def _recorded(lm: nn.Module) -> list[_Run]:
    """Return the runs of all lists' members, for one row of TOKENS; of a seq2seq's its decoder's.

    Raises:
        ValueError: the model reads no ids.
    """
    recorder = _Recorder()
    reads = getattr(lm, "main_input_name", "input_ids")
    if reads != "input_ids":
        raise ValueError(
            f"{NEEDS_STACK} of its tokens, and are found with a row of ids; a {type(lm).__name__} "
            f"reads {reads}: set hidden_layers=None"
        )
    ids, decodes = _plain_ids(lm), kind_of(lm) == Kind.SEQ2SEQ
    root: nn.Module = cast(Any, lm).get_decoder() if decodes else lm
    given = {"input_ids": ids} | ({"decoder_input_ids": ids} if decodes else {})
    with ExitStack() as stack, evaluating(lm), kept_rng(ids.device):
        for module in root.modules():
            hook = module.register_forward_hook(lambda m, _, output: recorder.look(m, output))
            stack.callback(hook.remove)
        for module in root.modules():
            if isinstance(module, nn.ModuleList):
                for member in module:
                    _watch_member(stack, recorder, module, member)
        caches = "use_cache" in inspect.signature(lm.forward).parameters
        lm(**given, **({"use_cache": False} if caches else {}))
    return recorder.runs


def _watch_member(
    stack: ExitStack, recorder: _Recorder, members: nn.ModuleList, member: nn.Module
) -> None:
    def begin(_: Any, args: Any, kwargs: Any) -> None:
        recorder.begin(members, member, args, kwargs)

    stack.callback(member.register_forward_pre_hook(begin, with_kwargs=True).remove)
    after = member.register_forward_hook(lambda _, __, output: recorder.end(output))
    stack.callback(after.remove)


def _count(lm: Any) -> int | None:
    """Return the number of layers that the config says, or None."""
    return getattr(lm.config.get_text_config(), "num_hidden_layers", None)


def _passes_on(runs: Sequence[_Run]) -> bool:
    """Return whether a run takes what the one before it made."""
    return any(one.made & other.given for one, other in pairwise(runs))


def _choose(lm: nn.Module, runs: Sequence[_Run]) -> list[_Run]:
    """Return the runs of the stack.

    Raises:
        ValueError: there is none, or there are several.
    """
    by_list: dict[int, list[_Run]] = {}
    for run in runs:
        by_list.setdefault(id(run.stack), []).append(run)
    lists = list(by_list.values())
    if len(lists) > 1:
        lists = [x for x in lists if _passes_on(x) or len(x) == len(x[0].stack) == _count(lm) == 1]
    if len(lists) > 1:
        ours = {id(x[0].stack) for x in lists}
        kept = [run for run in runs if id(run.stack) in ours]
        named = [x for x in lists if len(x[0].stack) == _count(lm)]
        lists = [kept] if len(kept) == _count(lm) else named if len(named) == 1 else lists
    if len(lists) != 1:
        raise ValueError(
            f"{NEEDS_STACK} of its tokens to the next; a {type(lm).__name__} has {len(lists)}: "
            "set hidden_layers=None"
        )
    return lists[0]


def _layers(lm: nn.Module, runs: Sequence[_Run]) -> list[Layer]:
    made, turns = [], {}
    for number, run in enumerate(runs, 1):
        states = states_of(run.output)
        order = None if states is None else _order(states)
        if states is None or order is None:
            shape = "no tensor" if states is None else list(states.shape)
            raise ValueError(
                f"{NEEDS_STACK} of its tokens; of a {type(lm).__name__} block {number}, a "
                f"{type(run.member).__name__}, gives {shape} for one row of {TOKENS} tokens: set "
                "hidden_layers=None"
            )
        turn = turns.get(run.member, 0)
        turns[run.member] = turn + 1
        width = states.numel() // TOKENS
        found = run.maps[0] if run.maps else None
        made.append(Layer(run.member, turn, order, width, found))
    return made


def _named_blocks(lm: Any) -> list[Layer]:
    """Find the blocks of a model that one process cannot run, by the config's number of layers.

    Raises:
        ValueError: there is no list of as many modules, or more than one.
    """
    count = _count(lm)
    found = [m for m in lm.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    inner = {id(x) for m in found for x in m.modules() if x is not m}
    found = [m for m in found if id(m) not in inner]
    if len(found) > 1:
        root = lm.get_decoder()
        found = [m for m in found if any(m is x for x in root.modules())]
    if len(found) != 1:
        raise ValueError(
            f"hidden_layers need a model with one list of {count} blocks where parameters are "
            f"sharded, a {type(lm).__name__} has {len(found)}"
        )
    return [Layer(block, map=_named_map(block)) for block in found[0]]


def _named_map(block: nn.Module) -> Map | None:
    named = [m for m in block.modules() if "Attention" in type(m).__name__]
    return Map(named[0], 1) if named else None


def decoder_blocks(lm: nn.Module) -> list[Layer]:
    """Return the layers of a Transformers model, in the order in which a forward runs them.

    Args:
        lm: without wrappers. It runs once on a few tokens, unless its parameters are sharded: then
            its blocks are looked for by name, and their outputs must be [B, T, H].

    Raises:
        ValueError: it has not one stack of blocks, or their outputs have no form that is known.
    """
    if is_sharded(lm):
        return _named_blocks(lm)
    return _layers(lm, _choose(lm, _recorded(lm)))
