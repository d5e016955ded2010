"""Which layers are compared, and what the hooks take."""

from typing import Any

import pytest
import torch

from hf_distill.models.layers import LayerWatcher, decoder_blocks, match_layers, parse_layers
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
    lm = models.llama(num_hidden_layers=4)
    with LayerWatcher("student", [3], attention=True).on(
        lm, torch.ones(1, 3, dtype=torch.bool)
    ) as seen:
        hooked = [i for i, block in enumerate(decoder_blocks(lm)) if block._forward_hooks]
        lm(input_ids=torch.tensor([[3, 4, 5]]))
    assert hooked == [2]
    assert not any(module._forward_hooks for module in lm.modules())
    assert [len(x) for x in (seen._hidden, seen._attention)] == [1, 0]  # sdpa gives no map
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        seen.states()


def test_a_model_without_blocks_is_named() -> None:
    lm = models.llama()
    lm.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="one list of 7 blocks, LlamaForCausalLM has 0"):
        decoder_blocks(lm)
