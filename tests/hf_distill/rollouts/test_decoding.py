"""Rows leave a call of `generate` when they have ended, and no token notices."""

import importlib
import logging
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PromptTuningConfig, get_peft_model
from torch import nn
from transformers import DynamicCache

from hf_distill.models.structure import causal_lm
from hf_distill.rollouts import decoding, generate
from tests.hf_distill.models import numbering
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

MODULE = importlib.import_module("hf_distill.rollouts.generate")  # a function has its name
ENDS = list(range(5, 17))
NEW = 16
SETTINGS: dict[str, Any] = {
    "pad_token_id": models.PAD,
    "eos_token_id": ENDS,
    "max_completion_length": NEW,
    "temperature": 1.0,
    "seed": 4,
}
PROMPTS = [[25, 26, 27], [28], [29, 30, 31, 32, 33, 34, 35], [40, 41], [42], [43, 44, 45, 46]]
LAYERED = models.BASE | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def sliding() -> nn.Module:
    """Its window is shorter than the rows."""
    kinds = ["sliding_attention", "full_attention"]
    sizes = LAYERED | {"num_hidden_layers": 2, "layer_types": kinds, "sliding_window": 5}
    torch.manual_seed(0)
    return models._spread(hf.Gemma2ForCausalLM(hf.Gemma2Config(**sizes)))


def convolutions() -> nn.Module:
    """Its cache holds the last inputs of convolutions too."""
    kinds = ["conv", "full_attention", "conv"]
    sizes = LAYERED | {"num_hidden_layers": 3, "layer_types": kinds}
    torch.manual_seed(0)
    return models._spread(hf.Lfm2ForCausalLM(hf.Lfm2Config(**sizes)))


MADE: dict[str, Any] = {
    "sliding": sliding,
    "convolutions": convolutions,
    "lora": lambda: models.lora(models.llama()),
    **models.FAMILIES,
    **{f"numbering {x}": lambda x=x: numbering.make(x) for x in numbering.FAMILIES},
}
# these run all rows to the end, or rows of one length in a call
STAYING = {f"numbering {x}" for x in ("rwkv", "recurrent gemma", "mamba", "bart", "whisper")}


def rollout(model: nn.Module, **changes: Any) -> list[list[int]]:
    return generate(model, PROMPTS, **SETTINGS | changes)


def all_rows(monkeypatch: Any, model: nn.Module, **changes: Any) -> list[list[int]]:
    """Sample by Transformers' own loop."""
    with monkeypatch.context() as patch:
        patch.setattr(MODULE, "leaving_refusal", lambda *_: "switched off")
        return rollout(model, **changes)


def counted(model: nn.Module, **changes: Any) -> tuple[list[list[int]], list[int]]:
    """Return completions, and how many rows each forward has."""
    rollout(model, max_completion_length=1)  # the first one tries things out
    sizes: list[int] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        if "input_ids" in kwargs:  # not of the forward that guidance adds
            sizes.append(len(kwargs["input_ids"]))

    with causal_lm(model).register_forward_pre_hook(note, with_kwargs=True):
        found = rollout(model, **changes)
    return found, sizes


def rows_that_go_on(completions: list[list[int]]) -> list[int]:
    longest = max(map(len, completions))
    return [sum(len(x) > n for x in completions) for n in range(longest)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", MADE)
def test_tokens_are_those_of_transformers_own_loop(
    monkeypatch: Any, name: str, temperature: float
) -> None:
    model = MADE[name]()
    wanted = all_rows(monkeypatch, model, temperature=temperature)
    found, sizes = counted(model, temperature=temperature)
    assert found == wanted
    lengths = set(map(len, found))
    assert temperature == 0.0 or len(lengths) > 2
    if name not in STAYING:
        assert sizes == rows_that_go_on(found)


KWARGS: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "typical_p": {"typical_p": 0.5},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "min_new_tokens": {"min_new_tokens": 4},
    "suppress_tokens": {"suppress_tokens": list(range(17, 40))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(5, 40))},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.5)},
    "forced_eos_token_id": {"forced_eos_token_id": 5},
    "guidance_scale": {"guidance_scale": 1.5},
    "prefill_chunk_size": {"prefill_chunk_size": 2},
}
# greedy completions repeat themselves, and reach the longest length
GREEDY = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "forced_eos_token_id",
)


@pytest.mark.parametrize("name", KWARGS)
def test_settings_of_sampling_count_as_before(monkeypatch: Any, name: str) -> None:
    model = models.llama()
    longer: dict[str, Any] = {"max_completion_length": 40, "eos_token_id": ENDS[:3]}
    longer["temperature"] = 0.0 if name in GREEDY else 1.0
    more = longer | {"generation_kwargs": KWARGS[name]}
    wanted = all_rows(monkeypatch, model, **more)
    found, sizes = counted(model, **more)
    assert found == wanted
    assert min(sizes) < len(PROMPTS)
    if name != "prefill_chunk_size":
        assert found != rollout(model, **longer)


def test_calls_of_few_prompts(monkeypatch: Any) -> None:
    model = models.llama()
    found = rollout(model, batch_size=2)
    assert found == all_rows(monkeypatch, model, batch_size=2)
    assert found != rollout(model)


def test_16_bits(monkeypatch: Any) -> None:
    model = models.llama().to(torch.bfloat16)
    assert rollout(model) == all_rows(monkeypatch, model)


def said(caplog: Any) -> list[str]:
    texts = [record.getMessage() for record in caplog.records]
    return [x.partition("of `generate`: ")[2] for x in texts if "stay in the batch" in x]


REFUSED: dict[str, Any] = {
    "the generation mode is beam_search": {"num_beams": 2},
    "cache_implementation is 'static'": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_loop_does_not_do_is_said_once(caplog: Any, reason: str) -> None:
    model = models.llama()
    caplog.set_level(logging.INFO, decoding.__name__)
    options = {"temperature": 0.0, "generation_kwargs": REFUSED[reason]}
    found = [rollout(model, **options) for _ in range(2)]
    assert found[0] == found[1]
    assert said(caplog) == [reason]


def refusal(model: nn.Module, **changes: Any) -> str | None:
    return decoding.leaving_refusal(model, hf.GenerationConfig(**changes))


def test_models_that_are_refused(monkeypatch: Any) -> None:
    assert refusal(models.llama()) is None
    assert refusal(nn.Linear(1, 1)) == "the `generate` of a Linear is its own"
    model: Any = models.llama()
    model.generate = lambda **_: None
    assert refusal(model) == "the `generate` of a LlamaForCausalLM is its own"
    rwkv = refusal(numbering.make("rwkv"))
    assert rwkv == "the model keeps more than a cache of keys and values"
    assert refusal(models.llama(), prompt_lookup_num_tokens=2) == (
        "the generation mode is assisted_generation"
    )
    monkeypatch.setattr(decoding, "CALLED", ("_not_there",))
    assert refusal(models.llama()) == "this version of Transformers has no `_not_there`"


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_adapters_with_virtual_tokens_are_refused() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(models.llama(), config)
    assert refusal(model) == "adapters of type PROMPT_TUNING keep something of each row"
    assert len(rollout(model)) == len(PROMPTS)


def test_a_model_whose_rows_do_not_go_on_alone_keeps_them(monkeypatch: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO, decoding.__name__)
    # the row that stays would go on with the keys and values of another
    monkeypatch.setattr(
        DynamicCache,
        "reorder_cache",
        lambda self, rows: [x.reorder_cache(torch.zeros_like(rows)) for x in self.layers],
    )
    model = models.llama()
    wanted = all_rows(monkeypatch, model)
    assert rollout(model) == wanted
    (reason,) = [x for x in said(caplog) if x != "switched off"]
    assert "of the largest apart once another has left" in reason


def test_so_does_one_whose_cache_cannot_be_cut(monkeypatch: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO, decoding.__name__)

    def fail(*_: Any) -> None:
        raise IndexError("no rows here")

    monkeypatch.setattr(DynamicCache, "reorder_cache", fail)
    model = models.llama()
    assert len(rollout(model)) == len(PROMPTS)
    assert said(caplog) == ["without one of its rows the model raises IndexError: no rows here"]


def test_inputs_of_a_forward_that_have_no_rows_are_seen() -> None:
    mask = torch.ones(2, 3)
    cache = DynamicCache()
    assert (
        decoding.unfit_inputs({"cache": cache, "attention_mask": mask, "use_cache": True}) is None
    )
    assert decoding.unfit_inputs({"attention_mask": mask}) == "the cache is a NoneType"
    others = {"cache": cache, "position_ids": torch.ones(3, 2, 3)}
    assert decoding.unfit_inputs(others) == "its forward is given position_ids"
    assert decoding.unfit_inputs({"cache": cache, "pixels": mask}) == (
        "its forward is given pixels"
    )


@pytest.mark.parametrize("sample", [False, True])
def test_ids_behind_the_end_are_padding_as_in_transformers_own_loop(sample: bool) -> None:
    model = models.llama()
    ids = torch.tensor([[20, 21], [22, 23], [24, 25], [26, 27]])
    config = hf.GenerationConfig(
        max_new_tokens=NEW, do_sample=sample, eos_token_id=ENDS, pad_token_id=models.PAD, top_k=0
    )
    found = []
    for options in ({}, {"custom_generate": decoding.decode}):
        torch.manual_seed(0)
        found.append(
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                **options,
            )
        )
    assert (found[0][:, 2:] == models.PAD).any()
    assert torch.equal(*found)
