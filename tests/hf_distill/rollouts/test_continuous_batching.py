"""Continuous batching, on the CPU: the tokens of `generate`, and where it refuses."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import (
    ContinuousBatchingManager,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from hf_distill.rollouts import Sampling, generate
from hf_distill.rollouts.continuous_batching import ContinuousEngine, continuous_batching_refusal
from tests.hf_distill.rollouts import checks
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

NUM_DRAWS = 400
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [20, 21], [8]]


def sampling(**changes: Any) -> Sampling:
    settings = {
        "pad_token_id": models.PAD,
        "eos_token_id": models.EOS,
        "max_completion_length": 12,
        "temperature": 0.0,
    }
    return Sampling(**settings | changes)


def continuous(model: nn.Module, seed: int = 7, options: Any = None, **changes: Any) -> Any:
    return ContinuousEngine(sampling(**changes), options or {}).sample(model, PROMPTS, seed)


def plain(model: nn.Module, seed: int = 7, **changes: Any) -> Any:
    return generate(model, PROMPTS, **vars(sampling(**changes)), seed=seed)


def ending(model: Any) -> Any:
    """A model in which the end token is likely, so that lengths differ."""
    with torch.no_grad():
        model.lm_head.weight[models.EOS] = 0.5 * model.lm_head.weight[5:20].sum(0)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [f for f in models.FAMILIES if f != "gemma2"])
def test_greedy_is_that_of_generate(family: str, attention: str) -> None:
    model: Any = models.FAMILIES[family]()
    model.set_attn_implementation(attention)
    assert continuous(model) == plain(model)
    assert model.config._attn_implementation == attention


def test_a_sliding_window() -> None:
    torch.manual_seed(0)
    model = models._spread(MistralForCausalLM(MistralConfig(**models.SIZES, sliding_window=4)))
    whole = models.copied(model)
    whole.config.sliding_window = None
    assert continuous(model) == plain(model)
    assert plain(model) != plain(whole)


def test_rows_that_end_early() -> None:
    model = ending(models.llama())
    found = continuous(model)
    assert found == plain(model)
    assert len({len(row) for row in found}) > 1


@pytest.mark.parametrize("ends", [9, [9, 35], None])
def test_every_end_token_of_the_model_counts(ends: Any) -> None:
    model = models.llama()
    model.generation_config.eos_token_id = ends
    found = continuous(model)
    assert found == plain(model)
    stops = {models.EOS} | set([] if ends is None else ends if isinstance(ends, list) else [ends])
    assert all(not stops & set(row[:-1]) for row in found)
    assert any(row[-1] in stops - {models.EOS} for row in found) == (ends is not None)


def test_no_end_token_at_all() -> None:
    model = ending(models.llama())
    model.generation_config.eos_token_id = None  # its config still has one
    found = continuous(model, eos_token_id=None)
    assert found == plain(model, eos_token_id=None)
    assert [len(row) for row in found] == [12] * 5


def test_adapters() -> None:
    model = models.lora(models.llama())
    assert continuous(model) == plain(model)
    assert continuous(model) != continuous(models.llama())


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_bfloat16(adapted: bool) -> None:
    model: Any = models.lora(models.llama()) if adapted else models.llama()
    model = model.to(torch.bfloat16)
    found = continuous(model)
    assert checks.greedy_gap(model, PROMPTS, found) <= checks.GAPS[torch.bfloat16]


@pytest.fixture
def new_precision() -> Iterator[None]:
    """An `Accelerator` of another precision than one made before in this process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_mixed_precision_is_off_while_it_samples(new_precision: None, adapted: bool) -> None:
    model: Any = models.lora(models.llama()) if adapted else models.llama()
    want = plain(model)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    mixed = prepared.forward
    assert continuous(prepared) == want
    assert prepared.forward == mixed


def test_a_small_cache_gives_the_same_tokens() -> None:
    model = ending(models.llama())
    small = {"num_blocks": 3, "page_size": 8, "max_batch_tokens": 4, "max_requests_per_batch": 2}
    assert continuous(model, options=small) == plain(model)


def test_the_seed_decides() -> None:
    model = models.llama()
    torch.manual_seed(1)
    first = continuous(model, temperature=1.0)
    torch.manual_seed(2)
    assert continuous(model, temperature=1.0) == first
    assert continuous(model, temperature=1.0, seed=8) != first
    assert first[1] != first[4]  # two rows of one prompt


def test_the_temperature_and_top_k() -> None:
    model = models.llama()
    greedy = plain(model)
    assert continuous(model, temperature=1e-4) == greedy
    assert continuous(model, temperature=1.0, generation_kwargs={"top_k": 1}) == greedy
    assert continuous(model, temperature=1.0, generation_kwargs={"top_p": 1e-6}) == greedy
    assert continuous(model, temperature=1.0) != greedy
    engine = ContinuousEngine(sampling(temperature=0.5, max_completion_length=1), {})
    tokens = torch.tensor(engine.sample(model, [[5]] * NUM_DRAWS, 3))[:, 0]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5]])).logits[0, -1]
    shares = torch.bincount(tokens, minlength=models.VOCAB) / NUM_DRAWS
    for temperature, holds in ((0.5, True), (1.0, False)):
        p = (logits / temperature).softmax(-1)
        assert ((shares - p).abs() <= 5 * (p / NUM_DRAWS).sqrt() + 1 / NUM_DRAWS).all() == holds


def test_the_models_own_defaults_are_not_used() -> None:
    model = models.llama()
    want = continuous(model, temperature=1.0)
    model.generation_config.update(
        top_k=1, temperature=0.01, do_sample=True, num_return_sequences=2
    )
    assert continuous(model, temperature=1.0) == want
    assert model.generation_config.top_k == 1


def test_nothing_is_left_behind() -> None:
    model = models.llama(attention_dropout=0.5).train()
    model.config.use_cache = False
    model.activation_checkpointing_enable({"use_reentrant": False})
    threads, before = threading.active_count(), torch.get_rng_state()
    found = continuous(model, temperature=1.0)
    assert torch.equal(before, torch.get_rng_state())
    assert threading.active_count() == threads
    assert model.training
    assert model.model.layers[0].self_attn.training
    assert model.model.layers[0].gradient_checkpointing
    assert model.config.use_cache is False
    assert found == continuous(model.eval(), temperature=1.0)  # no dropout while it samples


def test_later_weights_are_seen() -> None:
    model, engine = models.llama(), ContinuousEngine(sampling(), {})
    before = engine.sample(model, PROMPTS, 7)
    model.load_state_dict(models.llama(1).state_dict())
    engine.weights_changed()
    assert engine.sample(model, PROMPTS, 7) == plain(models.llama(1)) != before


def test_the_cache_is_as_large_as_the_rows_and_all_rows_are_there_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else it would take most of the memory, and which rows share a forward would be chance."""
    seen: list[Any] = []
    start = ContinuousBatchingManager.start

    def noted(self: Any) -> None:
        seen.append((self.continuous_batching_config, self.input_queue.qsize()))
        start(self)

    monkeypatch.setattr(ContinuousBatchingManager, "start", noted)
    continuous(models.llama())
    continuous(models.llama(), options={"page_size": 16, "num_blocks": 40})
    (own, waiting), (given, _) = seen
    assert waiting == len(PROMPTS)
    assert 15 <= own.num_blocks * own.page_size // len(PROMPTS) <= 96
    assert own.max_batch_tokens == sum(map(len, PROMPTS))
    assert own.auto_switch_to_flash is False
    assert (given.page_size, given.num_blocks) == (16, 40)
    big = ContinuousEngine(sampling(max_completion_length=1000), {})
    for flash, page in ((False, 32), (True, 256)):
        config = big._config([[1] * 500] * 100, flash, 2**65)
        assert (config.page_size, config.max_batch_tokens) == (page, 512)
        assert 1 <= config.num_blocks * page / 150_000 <= 1.5
    assert big._config([[1]] * 900, False, 0).max_batch_tokens == 900  # a token of each row
    other = ContinuousEngine(sampling(), {"auto_switch_to_flash": True})
    assert other._config(PROMPTS, False, 0).page_size == 256


def capped(cap: float | None) -> Any:
    torch.manual_seed(0)
    config = Gemma2Config(**models.SIZES, head_dim=8, attn_logit_softcapping=cap)
    model = models._spread(Gemma2ForCausalLM(config))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(20)
    return model


def test_softcapped_attention_is_refused() -> None:
    uncapped = capped(None)
    assert continuous(uncapped) == plain(uncapped)
    with pytest.raises(
        ValueError, match=r"cannot sample from this model: paged eager attention .*"
    ):
        continuous(capped(1e-3))
    assert plain(capped(1e-3)) != plain(uncapped)  # what would have come out


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = models.llama()
    assert continuous_batching_refusal(model) is None
    assert continuous_batching_refusal(models.lora(models.llama())) is None
    model.model.layers[0].mlp.up_proj.weight.ds_id = 0
    assert continuous_batching_refusal(model) == "its parameters are sharded"
    model = models.llama()
    model.config._attn_implementation_internal = "flex_attention"
    assert "'flex_attention' has no paged form" in (continuous_batching_refusal(model) or "")
    model = models.llama()
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert (
        continuous_batching_refusal(model)
        == "layers of type 'linear_attention' have no paged cache"
    )
    model = models.llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    assert (
        continuous_batching_refusal(model)
        == "flash attention needs 16-bit weights, got torch.float32"
    )
    assert continuous_batching_refusal(model.to(torch.bfloat16)) is None
    model = models.llama()
    model._cached_continuous_batching_manager = object()
    assert "destroy_cached_continuous_batching_manager" in (
        continuous_batching_refusal(model) or ""
    )
    monkeypatch.setattr(type(model), "_is_stateful", True)
    assert "a state" in (continuous_batching_refusal(models.llama()) or "")
    assert continuous_batching_refusal(nn.Linear(2, 2)) == "Linear has no init_continuous_batching"
    with pytest.raises(ValueError, match="'continuous' cannot sample from this model: Linear has"):
        continuous(nn.Linear(2, 2))


def test_a_failure_names_itself_and_leaves_the_model_as_it_was() -> None:
    model = models.llama()
    model.set_attn_implementation("eager")
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match=r"continuous batching failed on prompt 0: .*memory"):
        continuous(model, options={"num_blocks": 2**40})
    assert threading.active_count() == threads
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="page_size"):
        continuous(model, options={"page_size": 1})
    assert model.config._attn_implementation == "eager"
    assert continuous(model) == plain(model)
