"""Which modules a model's layers are, and how the states of tokens lie in their outputs."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import CanineConfig, CanineForTokenClassification
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_distill.models.layers import LayerWatcher
from hf_distill.models.stacks import decoder_blocks, states_of
from tests.hf_distill.models import stacks

IDS = torch.randint(3, 61, (5, 5), generator=torch.Generator().manual_seed(0))
PREDICTS = torch.rand(5, 5, generator=torch.Generator().manual_seed(1)) < 0.6
NAMED_OTHERWISE = ("mamba", "rwkv")  # `hidden_states` begin behind the first block
WRONG = ("cpmant", "prophetnet", "xlm")


def flat(states: Tensor) -> Tensor:
    """[N, S * H] of what the library gives, whose streams may come first."""
    if states.ndim == 4 and states.shape[:2] != PREDICTS.shape:
        states = states.permute(1, 2, 0, 3)
    return states[PREDICTS].flatten(1)


@pytest.mark.parametrize("kind", [x for x in stacks.CONFIGS if x not in WRONG])
@torch.no_grad()
def test_states_are_those_of_the_library(kind: str) -> None:
    """As many rows as tokens: the shape of such a batch does not tell the axes apart."""
    lm = stacks.model(kind)
    layers = decoder_blocks(lm)
    with LayerWatcher("student", range(1, len(layers) + 1)).on(lm, PREDICTS) as seen:
        every = lm(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states
    assert len(every) == len(layers) + 1
    found = seen.states().hidden
    assert {x.shape[1] for x in found} == {layer.width for layer in layers}
    first = 0 if kind in NAMED_OTHERWISE else 1
    for number, states in enumerate(found[:-1]):  # the last of the library is behind the norm
        assert torch.equal(states, flat(every[number + first])), number


def test_streams_lie_side_by_side() -> None:
    assert {layer.width for layer in decoder_blocks(stacks.model("gemma3n_text"))} == {4 * 32}


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("cpmant", r"block 1, a CpmAntTransformerBlock, gives \[1, 39, 32\]"),
        ("prophetnet", r"of a ProphetNetForCausalLM block 1, .* gives \[1, 21, 32\]"),
        ("xlm", "a XLMWithLMHeadModel has 0"),
    ],
)
def test_what_cannot_be_told_is_an_error(kind: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"hidden_layers need .*{named}.* hidden_layers=None"):
        decoder_blocks(stacks.model(kind))


def test_a_batch_of_another_form_is_an_error() -> None:
    lm = stacks.model("llama")
    named = r"\[5, 5\] tokens; a LlamaDecoderLayer gives \[5, 4, 32"
    with (
        pytest.raises(ValueError, match=named),
        LayerWatcher("student", [1]).on(lm, PREDICTS),
    ):
        lm(input_ids=IDS[:, :4])


class OfBlock(NamedTuple):
    """What a block gives whose states stand behind its attention map."""

    weights: Tensor
    hidden_states: Tensor


def test_states_that_are_named_may_stand_behind_other_tensors() -> None:
    output = OfBlock(torch.zeros(1, 2, 7, 7), torch.ones(1, 7, 4))
    assert states_of(output) is output.hidden_states


class WithMixers(LlamaDecoderLayer):
    """A block that has its attention in a list of its own."""

    self_attn = property(lambda self: self.mixers[0])


def test_a_map_may_be_in_a_list_inside_of_a_block() -> None:
    lm = stacks.model("llama")
    lm.set_attn_implementation("eager")
    for block in lm.model.layers:
        block.mixers = nn.ModuleList([block._modules.pop("self_attn")])
        block.__class__ = WithMixers
    maps = [layer.map for layer in decoder_blocks(lm)]
    assert [x and x.module for x in maps] == [block.mixers[0] for block in lm.model.layers]


def test_finding_layers_leaves_no_trace() -> None:
    lm, before = stacks.model("hrm_text").train(), torch.get_rng_state()
    decoder_blocks(lm)
    assert lm.training
    assert torch.equal(before, torch.get_rng_state())
    hooks = [m for m in lm.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks


@pytest.mark.parametrize("kind", ["llama", "gpt2", "modernbert-decoder"])
def test_of_sharded_parameters_blocks_are_found_without_a_forward(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = stacks.model(kind)
    lm.set_attn_implementation("eager")
    run = decoder_blocks(lm)
    monkeypatch.setattr("hf_distill.models.stacks.is_sharded", lambda _: True)
    lm.register_forward_pre_hook(lambda *_: pytest.fail("it runs"))
    named = decoder_blocks(lm)
    assert [x.block for x in named] == [x.block for x in run]
    assert [x.map for x in named] == [x.map for x in run]
    lm.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match=f"one list of 7 blocks .* a {type(lm).__name__} has 0"):
        decoder_blocks(lm)


def test_ids_with_a_meaning_are_not_asked_about() -> None:
    lm, asked = stacks.model("llama"), []
    lm.config.image_token_id, lm.config.audio_token_index = 4, 6
    hook = lambda _, __, kwargs: asked.extend(kwargs["input_ids"].flatten().tolist())
    lm.register_forward_pre_hook(hook, with_kwargs=True)
    decoder_blocks(lm)
    assert asked
    assert not {0, 1, 2, 4, 6} & {*asked}


def test_a_model_of_characters_names_no_vocabulary() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    lm = CanineForTokenClassification(CanineConfig(**sizes, num_hidden_layers=2))
    assert not hasattr(lm.config, "vocab_size")
    with pytest.raises(ValueError, match=r"a CanineLayer, gives \[1, 1, 32\] for one row of 7"):
        decoder_blocks(lm)
