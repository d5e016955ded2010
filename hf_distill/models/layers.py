"""Layers of a model that are compared: which pairs, and their states, taken while the model runs.

Layer k is the output of the k-th block that a forward runs, counted from 1, and -1 is that of the
last one, before the model's final norm. In most models it is `output_hidden_states`' entry k; those
that do not list the embeddings (Mamba, RWKV) have it at k - 1.

Shapes: B rows, T positions, N scored tokens, H hidden, A attention heads.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hf_distill.data.sides import scored
from hf_distill.models.stacks import Layer, Map, decoder_blocks, states_of, tensors

NAMED = ("uniform", "last")
FORMS = f"{NAMED}, a list of student layers such as [6, 12], or of pairs [[6, 12], [12, 24]]"


class LayerPair(NamedTuple):
    """Names a layer of the student and the one of the teacher it is compared with, from 1."""

    student: int
    teacher: int


def parse_layers(value: Any) -> str | list[Any] | None:
    """Return what `match_layers` takes, from what a script, YAML file or command line gives.

    Raises:
        ValueError: it has none of the forms.
    """
    if isinstance(value, str) and value not in NAMED:
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"hidden_layers must be {FORMS}, got {value!r}") from error
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or not value:
        raise ValueError(f"hidden_layers must be {FORMS}, got {value!r}")
    single = [isinstance(x, int) and not isinstance(x, bool) for x in value]
    paired = [isinstance(x, Sequence) and [type(y) for y in x] == [int, int] for x in value]
    if not (all(single) or all(paired)):
        raise ValueError(f"hidden_layers must be {FORMS}, got {value!r}")
    return list(value)


def _partner(layer: int, num_student: int, num_teacher: int) -> int:
    """Return the teacher's layer at the same share of its depth, >= 1; a half is rounded up."""
    return max(1, (2 * layer * num_teacher + num_student) // (2 * num_student))


def _number(layer: int, count: int, whose: str) -> int:
    found = layer + count + 1 if layer < 0 else layer
    if not 1 <= found <= count:
        raise ValueError(f"hidden_layers must name the {whose}'s layers 1 to {count}, or -1 and so "
                         f"on from the end, got {layer}")  # fmt: skip
    return found


def match_layers(layers: str | list[Any], num_student: int, num_teacher: int) -> list[LayerPair]:
    """Return the pairs of layers that are compared.

    Args:
        layers: "uniform", every layer of the student with the teacher's at the same share of the
            depth; "last", the last of both; numbers of student layers, with their partners as
            in "uniform"; or pairs (student, teacher).
        num_student: blocks of the student, >= 1.
        num_teacher: blocks of the teacher, >= 1.

    Raises:
        ValueError: a layer does not exist.
    """
    if layers == "last":
        return [LayerPair(num_student, num_teacher)]
    chosen: Any = range(1, num_student + 1) if layers == "uniform" else layers
    pairs = []
    for entry in chosen:
        if isinstance(entry, Sequence):
            student = _number(entry[0], num_student, "student")
            pairs.append(LayerPair(student, _number(entry[1], num_teacher, "teacher")))
        else:
            student = _number(entry, num_student, "student")
            pairs.append(LayerPair(student, _partner(student, num_student, num_teacher)))
    return pairs


class States(NamedTuple):
    """Holds, of the chosen layers in order, hidden states [N, H] and attention maps [N, A, T]."""

    hidden: tuple[Tensor, ...] = ()
    attention: tuple[Tensor, ...] = ()


class _BeforeDropout(TorchFunctionMode):
    """Remembers what dropout was given, by the memory of what it made of it."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function."""
        made = func(*args, **(kwargs or {}))
        if func in (F.dropout, torch.dropout):
            given = args[0] if args else (kwargs or {})["input"]
            # what was made is kept too, so that no other tensor gets its memory
            self._made[made.untyped_storage().data_ptr()] = made, given
        return made

    def before(self, made: Tensor) -> Tensor:
        """Return what dropout was given where it made this tensor, else the tensor."""
        found = self._made.get(made.untyped_storage().data_ptr())
        return made if found is None else found[1].reshape(made.shape)


Project = Callable[[int, Tensor], Tensor]
"""Makes of the states [N, H] of a layer, by its place among those that are chosen, [N, H']."""


class LayerStates:
    """Holds what hooks have taken in one forward pass.

    Args:
        layers: by number.
        order: the numbers in the order of the states; one may come several times.
        attention: whether maps are taken.
        name: "student" or "teacher", for errors.
        predicts: [B, T] bool, the scored positions.
        checkpoints: whether the forward recomputes blocks for its gradient.
        project: see `LayerWatcher`.
    """

    def __init__(
        self,
        layers: Mapping[int, Layer],
        order: Sequence[int],
        attention: bool,
        name: str,
        predicts: Tensor,
        checkpoints: bool,
        project: Project | None = None,
    ) -> None:
        self._checkpoints, self._project = checkpoints, project
        self._found: States | None = None
        self.layers, self.order = layers, order
        self.with_attention, self.name = attention, name
        self._predicts, self._with_grad = predicts, torch.is_grad_enabled()
        self._hidden: dict[int, Tensor] = {}
        self._attention: dict[int, Tensor] = {}
        self._later: list[Callable[[], None]] = []
        self._turns: Counter[nn.Module] = Counter()

    def states(self) -> States:
        """Return what has been taken; it is projected when it is asked for first.

        Raises:
            ValueError: the model's attention gives no maps, or a layer has another shape.
            RuntimeError: a layer did not run.
        """
        if self._found is None:
            self._found = self._find()
        return self._found

    def _find(self) -> States:
        for take in self._later:
            take()
        self._later.clear()
        missing = [layer for layer in self.layers if layer not in self._hidden]
        if missing:
            raise RuntimeError(f"layer {missing[0]} of the {self.name} did not run")
        blind = [layer for layer in self.layers if layer not in self._attention]
        if self.with_attention and blind:
            raise ValueError(NO_MAP.format(layer=blind[0], name=self.name))
        hidden = [self._hidden[layer] for layer in self.order]
        if self._project is not None:
            hidden = [self._project(i, x) for i, x in enumerate(hidden)]
        return States(
            tuple(hidden),
            tuple(self._attention[layer] for layer in self.order if self.with_attention),
        )

    def turn(self, module: nn.Module) -> int:
        """Return which run of a module has just ended, from 0."""
        self._turns[module] += 1
        return self._turns[module] - 1

    def _take(self, number: int, take: Callable[[], None]) -> None:
        """Take the scored positions: at once, or behind a forward with gradient checkpointing.

        Inside of that the forward must save no tensor that the recomputation, which has no hooks,
        does not save.
        """
        if torch.is_grad_enabled() and self._checkpoints:
            self._later.append(take)
        elif self._with_grad and not torch.is_grad_enabled():
            raise ValueError(
                f"layer {number} of the {self.name} is read where the forward has no gradient: "
                "gradient checkpointing must be that with gradient_checkpointing_kwargs="
                '{"use_reentrant": False}; where it is off, compare other hidden_layers'
            )
        else:
            take()

    def keep(self, number: int, output: Any) -> None:
        """Take a block's output at the scored positions."""
        layer, found = self.layers[number], states_of(output)

        def take() -> None:
            self._hidden[number] = layer.states(found, self._predicts)

        self._take(number, take)

    def keep_map(self, number: int, output: Any, dropped: _BeforeDropout | None) -> None:
        """Take the map [B, A, T, T] of an attention module's output, before its dropout."""
        found = list(tensors(output))
        place = cast(Map, self.layers[number].map).place
        if place >= len(found) or found[place].ndim != 4:
            return
        value = found[place] if dropped is None else dropped.before(found[place])

        def take() -> None:
            self._attention[number] = scored(value.transpose(1, 2), self._predicts)

        self._take(number, take)


NO_MAP = (
    "attention transfer needs attention maps, which few kinds of attention return, and those only "
    "with attn_implementation='eager': layer {layer} of the {name} gave none"
)


class LayerWatcher:
    """Takes the states of chosen layers while a model runs; the others' are not kept.

    Args:
        name: "student" or "teacher", for errors.
        layers: numbers from 1.
        attention: whether to take attention maps as well.

    Attributes:
        project: what is made of the states, or None where they are given as they are.
    """

    project: Project | None = None

    def __init__(self, name: str, layers: Sequence[int] = (), attention: bool = False) -> None:
        self.name, self.layers, self.attention = name, tuple(layers), attention
        self._seen: tuple[nn.Module, Sequence[Layer]] | None = None

    def look(self, lm: nn.Module, every: Sequence[Layer] | None = None) -> Sequence[Layer]:
        """Return the layers of the model, which are found once.

        Args:
            lm: the Transformers model itself.
            every: its layers, if they were found before.

        Raises:
            ValueError: as `decoder_blocks`, or a chosen layer gives no attention map.
        """
        if self._seen is None or self._seen[0] is not lm:
            found = decoder_blocks(lm) if every is None else every
            blind = [i for i in self.layers if self.attention and found[i - 1].map is None]
            if blind:
                raise ValueError(NO_MAP.format(layer=blind[0], name=f"{self.name}'s {_kind(lm)}"))
            self._seen = lm, found
        return self._seen[1]

    @contextmanager
    def on(self, lm: nn.Module, predicts: Tensor) -> Iterator[LayerStates]:
        """Inside the block the model is watched.

        Args:
            lm: the Transformers model itself.
            predicts: [B, T] bool, N are true.

        Raises:
            ValueError: as `look`.
        """
        every = self.look(lm) if self.layers else ()
        chosen = {number: every[number - 1] for number in self.layers}
        checkpoints = bool(self.layers) and lm.training and _checkpoints(lm)
        given = self.attention, self.name, predicts, checkpoints, self.project
        seen = LayerStates(chosen, self.layers, *given)
        with ExitStack() as stack:
            for block in {layer.block for layer in chosen.values()}:
                turns = {x.turn: n for n, x in chosen.items() if x.block is block}
                _hook(stack, seen, block, turns)
                for module in {x.map.module for x in chosen.values() if x.block is block and x.map}:
                    if self.attention:
                        _hook_map(stack, seen, module, turns, lm.training)
            yield seen


def _checkpoints(lm: nn.Module) -> bool:
    """Return whether some module of a Transformers model is recomputed for its gradient."""
    return any(vars(module).get("gradient_checkpointing") is True for module in lm.modules())


def _kind(lm: nn.Module) -> str:
    return type(lm).__name__


def _hook(stack: ExitStack, seen: LayerStates, block: nn.Module, turns: Mapping[int, int]) -> None:
    """Take the output of a block in those of its runs that are layers."""

    def hook(module: Any, _: Any, output: Any) -> None:
        number = turns.get(seen.turn(module))
        if number is not None:
            seen.keep(number, output)

    stack.callback(block.register_forward_hook(hook).remove)


def _hook_map(
    stack: ExitStack,
    seen: LayerStates,
    module: nn.Module,
    turns: Mapping[int, int],
    training: bool,
) -> None:
    """Hook an attention module's map as `_hook` does; in training it is that before dropout."""
    running: list[_BeforeDropout] = []

    def begin(_: Any, __: Any) -> None:
        running.append(_BeforeDropout())
        running[-1].__enter__()

    def end(module: Any, _: Any, output: Any) -> None:
        dropped = running.pop() if running else None
        if dropped is not None:
            dropped.__exit__(None, None, None)
        number = turns.get(seen.turn(module))
        if number is not None:
            seen.keep_map(number, output, dropped)

    if training:
        stack.callback(module.register_forward_pre_hook(begin).remove)
    stack.callback(module.register_forward_hook(end, always_call=training).remove)
