"""A rollout in several calls: which rows share one, their seeds; greedy does not notice."""

from typing import Any

import pytest
import torch
from torch import nn

from hf_distill.rollouts import GenerateEngine, Sampling, generate
from tests.hf_distill.rollouts import checks
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [20, 21], [8], [30, 31, 32]]
SETTINGS = {
    "pad_token_id": models.PAD,
    "eos_token_id": models.EOS,
    "max_completion_length": 12,
    "temperature": 1.0,
}


def rollout(model: nn.Module, prompts: Any = PROMPTS, **changes: Any) -> list[list[int]]:
    return generate(model, prompts, **SETTINGS | {"seed": 7} | changes)


class Echo(nn.Module):
    """A model whose completion is 100 + the prompt's length and a random number."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.generation_config = None
        self.calls: list[Any] = []

    def generate(self, input_ids: Any, attention_mask: Any, generation_config: Any) -> Any:
        self.calls.append(attention_mask.sum(1).tolist())
        assert input_ids.shape[1] == attention_mask.sum(1).max()  # no wider than its longest row
        noise = torch.randint(1000, 2**40, (len(input_ids), 1))
        lengths = 100 + attention_mask.sum(1, keepdim=True)
        return torch.cat([input_ids, lengths, noise], dim=1)


def test_short_prompts_share_a_call_and_results_keep_the_callers_order() -> None:
    model = Echo()
    found = rollout(model, batch_size=4)
    assert model.calls == [[1, 1, 2, 3], [3, 5]]
    assert [length for length, _ in found] == [100 + len(prompt) for prompt in PROMPTS]


def test_prompts_of_one_length_stay_in_order() -> None:
    model = Echo()
    prompts = [[i, i] for i in range(10, 16)]
    seen: list[int] = []
    plain = model.generate

    def noted(input_ids: Any, **kwargs: Any) -> Any:
        seen.extend(input_ids[:, 0].tolist())
        return plain(input_ids, **kwargs)

    model.generate = noted  # type: ignore[method-assign]
    rollout(model, prompts, batch_size=2)
    assert seen == [10, 11, 12, 13, 14, 15]


def test_without_a_size_all_go_at_once_as_they_come() -> None:
    model = Echo()
    rollout(model)
    assert model.calls == [[3, 1, 5, 2, 1, 3]]


def test_every_call_has_a_seed_of_its_own_that_the_rollouts_seed_decides() -> None:
    prompts = [[5, 6]] * 4

    def noise(seed: int, size: int | None) -> list[int]:
        return [row[1] for row in rollout(Echo(), prompts, seed=seed, batch_size=size)]

    first = noise(7, 1)
    assert len(set(first)) == 4
    assert noise(7, 1) == first
    assert not set(noise(8, 1)) & set(first)
    assert noise(7, 2)[0::2] == first[:2]  # the first row of a call is drawn with the call's seed
    assert noise(7, None)[0] not in first


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_greedy_does_not_notice(size: int) -> None:
    model = models.llama()
    assert rollout(model, temperature=0.0, batch_size=size) == rollout(model, temperature=0.0)


def test_samples_of_a_real_model_repeat() -> None:
    model = models.llama()
    engine = GenerateEngine(Sampling(**SETTINGS), batch_size=2)
    found = engine.sample(model, PROMPTS, 7)
    assert found == rollout(model, batch_size=2)
    assert engine.sample(model, PROMPTS, 7) == found
    assert engine.sample(model, PROMPTS, 8) != found
    engine.weights_changed()
    assert engine.sample(model, PROMPTS, 7) == found


def test_seeds_of_any_size() -> None:
    model = models.llama()
    assert rollout(model, seed=7 + 2**64) == rollout(model, seed=7)
    assert rollout(model, seed=2**70 + 1, batch_size=2) != rollout(model, seed=1, batch_size=2)


def test_the_end_token_counts_in_every_call() -> None:
    model = models.llama()
    with torch.no_grad():
        model.lm_head.weight[models.EOS] = 0.5 * model.lm_head.weight[5:20].sum(0)
    found = rollout(model, batch_size=2)
    assert any(row[-1] == models.EOS and len(row) < 12 for row in found)
    assert all(models.EOS not in row[:-1] for row in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_cache_padding_checkpointing_adapters_and_bfloat16(dtype: Any, adapted: bool) -> None:
    model: Any = models.llama()
    model = (models.lora(model) if adapted else model).to(dtype)
    plain = models.copied(model).eval()
    base = model.get_base_model() if adapted else model
    model.train()
    base.config.use_cache = False
    base.activation_checkpointing_enable({"use_reentrant": False})
    found = rollout(model, temperature=0.0, max_completion_length=10, batch_size=3)
    assert checks.greedy_gap(plain, PROMPTS, found) <= checks.GAPS[dtype]
    assert all(len(row) == 10 or row[-1] == models.EOS for row in found)
    assert model.training
    assert base.model.layers[0].training
    assert base.model.layers[0].gradient_checkpointing
    assert base.config.use_cache is False


def test_the_gap_shows_what_is_not_greedy() -> None:
    model = models.llama()
    assert checks.greedy_gap(model, PROMPTS, rollout(model)) > 50 * max(checks.GAPS.values())
