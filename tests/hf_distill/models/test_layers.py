"""Which layers are compared, and what the hooks take."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_distill.models.layers import LayerWatcher, match_layers, parse_layers
from hf_distill.models.stacks import decoder_blocks
from tests.hf_distill.models import stacks
from tests.hf_distill.trainers import models


@pytest.mark.parametrize(
    ("layers", "sizes", "want"),
    [
        ("last", (4, 12), [(4, 12)]),
        ("uniform", (4, 12), [(1, 3), (2, 6), (3, 9), (4, 12)]),
        ("uniform", (2, 3), [(1, 2), (2, 3)]),  # a half is rounded up
        ("uniform", (4, 1), [(1, 1), (2, 1), (3, 1), (4, 1)]),  # never 0
        ("uniform", (3, 3), [(1, 1), (2, 2), (3, 3)]),
        ([2, -1], (4, 12), [(2, 6), (4, 12)]),
        ([[1, 5], [-1, -2]], (4, 12), [(1, 5), (4, 11)]),
        ([[2, 1], [2, 3]], (4, 12), [(2, 1), (2, 3)]),
    ],
)
def test_pairs(layers: Any, sizes: tuple[int, int], want: list[tuple[int, int]]) -> None:
    assert match_layers(layers, *sizes) == want


@pytest.mark.parametrize(("layers", "named"), [([0], "got 0"), ([5], "got 5"), ([-5], "got -5")])
def test_a_layer_that_is_not_there(layers: list[int], named: str) -> None:
    with pytest.raises(ValueError, match=f"student's layers 1 to 4.*{named}"):
        match_layers(layers, 4, 12)
    with pytest.raises(ValueError, match=r"teacher's layers 1 to 12.*got 13"):
        match_layers([[1, 13]], 4, 12)


@pytest.mark.parametrize(
    "value", ["none", [], {"a": 1}, [1, [2, 3]], [[1, 2, 3]], [1.5], 3, [True]]
)
def test_forms(value: Any) -> None:
    with pytest.raises(ValueError, match="hidden_layers must be"):
        parse_layers(value)


@pytest.mark.parametrize("text", ["uniform", "last", "[6, 12]", "[[1, 2], [3, -1]]"])
def test_a_command_line_gives_text(text: str) -> None:
    assert str(parse_layers(text)) == text


@pytest.mark.parametrize("family", models.FAMILIES.values(), ids=models.FAMILIES)
def test_states_are_those_of_output_hidden_states(family: Any) -> None:
    lm = family()
    ids = torch.tensor([row["input_ids"][:4] for row in models.rows(3)])
    predicts = torch.rand(ids.shape) < 0.6
    with torch.no_grad(), LayerWatcher("student", [1, 2]).on(lm, predicts) as seen:
        want = lm(input_ids=ids, output_hidden_states=True).hidden_states
    first, last = seen.states().hidden
    assert torch.equal(first, want[1][predicts])
    *_, norm = (m for n, m in lm.named_modules() if n.endswith(("norm", "ln_f")))
    assert torch.equal(norm(last), want[2][predicts])


def test_hooks_go_with_the_block_and_only_chosen_layers_have_them() -> None:
    lm = models.llama(num_hidden_layers=4, attn_implementation="eager")
    every = decoder_blocks(lm)
    with LayerWatcher("student", [3], attention=True).on(
        lm, torch.ones(1, 3, dtype=torch.bool)
    ) as seen:
        hooked = [i for i, layer in enumerate(every) if layer.block._forward_hooks]
        lm(input_ids=torch.tensor([[3, 4, 5]]))
    assert hooked == [2]
    assert not any(module._forward_hooks for module in lm.modules())
    assert [len(x) for x in seen.states()] == [1, 1]


def test_attention_without_maps_is_named() -> None:
    """In Mamba nothing attends; with sdpa there is no map to return."""
    for lm in (stacks.model("mamba"), models.llama(attn_implementation="sdpa")):
        with pytest.raises(ValueError, match=f"layer 1 of the teacher's {type(lm).__name__} gave"):
            LayerWatcher("teacher", [1], attention=True).look(lm)


def maps(lm: nn.Module) -> Tensor:
    """[N, A, T] of the first layer; what the others read has seen its dropout."""
    ids = torch.tensor([row["input_ids"][:4] for row in models.rows(3)])
    predicts = torch.ones_like(ids, dtype=torch.bool)
    with LayerWatcher("student", [1], attention=True).on(lm, predicts) as seen:
        lm(input_ids=ids)
    return seen.states().attention[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_maps_are_those_before_dropout(family: str) -> None:
    """Of GPT-2 by a module, of Llama by a function, of Bloom in a list of several outputs."""
    lm = stacks.model(family)
    lm.set_attn_implementation("eager")
    for name, module in lm.named_modules():
        if isinstance(module, nn.Dropout) and name.endswith(("attn_dropout", "attention_dropout")):
            module.p = 0.5
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.5
    want = maps(lm)
    found = maps(lm.train())
    assert (want[:, :, 0] > 0.1).all()
    # one softmax of the same scores, twice: some roundings of numbers below 1
    assert (found - want).abs().max() < 1e-6


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, attention: bool) -> None:
    """The gradient is as without it, or the error says why not."""

    def gradient(checkpointing: bool) -> Tensor:
        lm = models.llama(attn_implementation="eager").train()
        if checkpointing:
            lm.activation_checkpointing_enable({"use_reentrant": reentrant})
            lm.enable_input_require_grads()
        ids = torch.tensor([row["input_ids"][:4] for row in models.rows(3)])
        predicts = torch.ones_like(ids, dtype=torch.bool)
        with LayerWatcher("student", [1, 2], attention).on(lm, predicts) as seen:
            lm(input_ids=ids, use_cache=False)
        hidden, attended = seen.states()
        sum(x.square().sum() for x in (*hidden, *attended)).backward()
        return torch.cat([p.grad.flatten() for p in lm.model.layers.parameters()])

    if reentrant and attention:
        with pytest.raises(ValueError, match=r'layer 1 of the student .*\{"use_reentrant": False'):
            gradient(True)
    else:
        found, want = gradient(True), gradient(False)
        assert (found - want).norm() <= 1e-6 * want.norm()  # sums in another order, if reentrant
