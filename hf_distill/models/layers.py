"""Layers of a model that are compared: which pairs, and their states, taken while the model runs.

A layer's number is that of `output_hidden_states`: k is the output of block k, counted from 1, and
-1 is that of the last block. The last one is taken before the model's final norm.

Shapes: B rows, T positions, N scored tokens, H hidden, A attention heads.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

NAMED = ("uniform", "last")
FORMS = f"{NAMED}, a list of student layers such as [6, 12], or of pairs [[6, 12], [12, 24]]"


class LayerPair(NamedTuple):
    """A layer of the student and the layer of the teacher that it is compared with, from 1."""

    student: int
    teacher: int


def parse_layers(value: Any) -> str | list[Any] | None:
    """What `match_layers` takes, from what a script, a YAML file or a command line gives.

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
    """The teacher's layer at the same share of its depth, at least 1; a half is rounded up."""
    return max(1, (2 * layer * num_teacher + num_student) // (2 * num_student))


def _number(layer: int, count: int, whose: str) -> int:
    found = layer + count + 1 if layer < 0 else layer
    if not 1 <= found <= count:
        raise ValueError(f"hidden_layers must name the {whose}'s layers 1 to {count}, or -1 and so "
                         f"on from the end, got {layer}")  # fmt: skip
    return found


def match_layers(layers: str | list[Any], num_student: int, num_teacher: int) -> list[LayerPair]:
    """The pairs of layers that are compared.

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


def decoder_blocks(lm: nn.Module) -> nn.ModuleList:
    """The blocks of a Transformers model, in order.

    Raises:
        ValueError: there is no list of as many modules as the config has layers, or more than one.
    """
    get_decoder = getattr(lm, "get_decoder", None)
    root = lm if get_decoder is None else get_decoder() or lm
    config: Any = lm.config
    count = config.get_text_config().num_hidden_layers
    found = [m for m in root.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    inner = {id(x) for m in found for x in m.modules() if x is not m}
    found = [m for m in found if id(m) not in inner]
    if len(found) != 1:
        raise ValueError(
            f"hidden_layers need a model with one list of {count} blocks, {type(lm).__name__} has "
            f"{len(found)}"
        )
    return found[0]


class States(NamedTuple):
    """Of the chosen layers, in order: hidden states [N, H], and attention maps [N, A, T]."""

    hidden: tuple[Tensor, ...] = ()
    attention: tuple[Tensor, ...] = ()


class LayerStates:
    """What hooks have taken in one forward pass."""

    def __init__(self, layers: Sequence[int], attention: bool, name: str) -> None:
        self.layers, self.with_attention, self.name = layers, attention, name
        self._hidden: dict[int, Tensor] = {}
        self._attention: dict[int, Tensor] = {}

    def states(self) -> States:
        """What has been taken.

        Raises:
            ValueError: the model's attention gives no maps.
            RuntimeError: a layer did not run.
        """
        missing = [layer for layer in self.layers if layer not in self._hidden]
        if missing:
            raise RuntimeError(f"layer {missing[0]} of the {self.name} did not run")
        blind = [layer for layer in self.layers if layer not in self._attention]
        if self.with_attention and blind:
            raise ValueError(
                "attention transfer needs attention maps, which only attn_implementation='eager' "
                f"returns: layer {blind[0]} of the {self.name} gave none"
            )
        return States(
            tuple(self._hidden[layer] for layer in self.layers),
            tuple(self._attention[layer] for layer in self.layers if self.with_attention),
        )

    def keep(self, layer: int, output: Any, predicts: Tensor) -> None:
        """Take a block's output at the scored positions."""
        hidden = output[0] if isinstance(output, tuple) else output
        self._hidden[layer] = hidden[predicts]

    def keep_attention(self, layer: int, output: Any, predicts: Tensor) -> None:
        """Take the map [B, A, T, T] of an attention module's output, if there is one."""
        for value in output if isinstance(output, tuple) else ():
            if isinstance(value, Tensor) and value.ndim == 4 and value.shape[2] == value.shape[3]:
                self._attention[layer] = value.transpose(1, 2)[predicts]


class LayerWatcher:
    """Takes the states of chosen layers while a model runs; the others' are not kept.

    Args:
        name: "student" or "teacher", for errors.
        layers: numbers from 1.
        attention: whether to take attention maps as well.
    """

    def __init__(self, name: str, layers: Sequence[int] = (), attention: bool = False) -> None:
        self.name, self.layers, self.attention = name, tuple(layers), attention

    @contextmanager
    def on(self, lm: nn.Module, predicts: Tensor) -> Iterator[LayerStates]:
        """Inside the block the model is watched.

        Args:
            lm: the Transformers model itself.
            predicts: [B, T] bool, N are true.
        """
        seen = LayerStates(self.layers, self.attention, self.name)
        if not self.layers:
            yield seen
            return
        every = decoder_blocks(lm)
        with ExitStack() as stack:
            for layer in set(self.layers):
                block = every[layer - 1]

                def hook(_: Any, __: Any, output: Any, layer: int = layer) -> None:
                    seen.keep(layer, output, predicts)

                def look(_: Any, __: Any, output: Any, layer: int = layer) -> None:
                    seen.keep_attention(layer, output, predicts)

                stack.callback(block.register_forward_hook(hook).remove)
                for module in block.modules() if self.attention else ():
                    if "Attention" in type(module).__name__:
                        stack.callback(module.register_forward_hook(look).remove)
            yield seen
