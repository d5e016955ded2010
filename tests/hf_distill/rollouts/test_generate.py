"""Completions sampled from a model: where they end, what decides them, and what is left behind."""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hf_distill.models.modes import kept_rng
from hf_distill.rollouts import cut_at_end_token, end_token_ids, generate
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [20, 21]]


def rollout(model: nn.Module, prompts: Any = PROMPTS, **changes: Any) -> list[list[int]]:
    settings = {
        "pad_token_id": models.PAD,
        "eos_token_id": models.EOS,
        "max_completion_length": 12,
        "temperature": 1.0,
        "seed": 7,
    }
    return generate(model, prompts, **settings | changes)


class Scripted(nn.Module):
    """Stands for a model whose `generate` returns rows written by hand, and notes what it got."""

    def __init__(self, completions: list[list[int]], eos: Any = None) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.completions = completions
        self.generation_config = type("Config", (), {"eos_token_id": eos})()

    def generate(self, input_ids: Any, attention_mask: Any, generation_config: Any) -> Any:
        self.seen = input_ids, attention_mask, generation_config
        assert not self.training
        return torch.cat([input_ids, torch.tensor(self.completions)], dim=1)


def test_the_first_end_token_is_kept_and_what_follows_is_not() -> None:
    assert cut_at_end_token([4, 2, 5, 2], [2]) == [4, 2]
    assert cut_at_end_token([2, 2], [2]) == [2]
    assert cut_at_end_token([4, 5], [2]) == [4, 5]
    assert cut_at_end_token([4, 9, 2], [2, 9]) == [4, 9]


def test_padding_with_the_end_tokens_id_is_safe() -> None:
    model = Scripted([[4, 2, 2, 2], [4, 5, 6, 7], [2, 2, 2, 2]])
    found = rollout(model, [[5, 6], [7], [8]], pad_token_id=2)
    assert found == [[4, 2], [4, 5, 6, 7], [2]]
    assert model.seen[0].tolist() == [[5, 6], [2, 7], [2, 8]]
    assert model.seen[1].tolist() == [[1, 1], [0, 1], [0, 1]]


def test_padding_id_inside_a_completion_is_a_token() -> None:
    assert rollout(Scripted([[4, 0, 5, 2]]), [[5]]) == [[4, 0, 5, 2]]


@pytest.mark.parametrize(("config", "want"), [(None, [2]), (9, [2, 9]), ([9, 7], [2, 7, 9])])
def test_every_end_token_counts(config: Any, want: list[int]) -> None:
    model = Scripted([[4, 5, 9, 7, 2]], config)
    assert end_token_ids(model, 2) == want
    (found,) = rollout(model, [[5]])
    assert found == ([4, 5, 9, 7, 2] if config is None else [4, 5, 9])
    assert model.seen[2].eos_token_id == want


def test_no_end_token_at_all() -> None:
    model = Scripted([[4, 5, 2]])
    assert rollout(model, [[5]], eos_token_id=None) == [[4, 5, 2]]
    assert model.seen[2].eos_token_id is None


def test_greedy_is_the_argmax_one_by_one_whatever_the_padding() -> None:
    model = models.llama()
    together = rollout(model, temperature=0.0)
    for prompt, found in zip(PROMPTS, together, strict=True):
        ids = list(prompt)
        for token in found:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            assert logits.argmax() == token
            ids.append(token)
        assert len(found) == 12 or found[-1] == models.EOS


def test_greedy_gpt2_with_learnt_positions() -> None:
    model = models.gpt2()
    together = rollout(model, temperature=0.0)
    assert together == [rollout(model, [p], temperature=0.0)[0] for p in PROMPTS]


def test_the_cache_is_used() -> None:
    model, widths = models.llama(), []
    model.config.use_cache = False
    rollout(model)  # the first one tries out which prompts may share a call
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    rollout(model, max_completion_length=4, eos_token_id=None)
    assert widths == [5, 1, 1, 1]


def test_the_seed_decides() -> None:
    model = models.llama()
    torch.manual_seed(1)
    first = rollout(model)
    torch.manual_seed(2)
    assert rollout(model) == first
    assert rollout(model, seed=8) != first


def test_the_callers_random_state_is_untouched() -> None:
    model = models.llama()
    before = torch.get_rng_state()
    rollout(model)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
def test_mode_and_cache_are_restored(training: bool, use_cache: bool) -> None:
    model = models.llama(attention_dropout=0.5).train(training)
    model.config.use_cache = use_cache
    greedy = rollout(model, temperature=0.0)
    assert greedy == rollout(model.eval(), temperature=0.0)  # no dropout while it generates
    model.train(training)
    rollout(model)
    assert model.training == training
    assert model.model.layers[0].self_attn.training == training
    assert model.config.use_cache == use_cache


# one default each that a checkpoint may bring; all of them would change the policy
DEFAULTS = {
    "top_k": {"top_k": 1, "do_sample": True},
    "top_p": {"top_p": 0.01, "do_sample": True},
    "temperature": {"temperature": 0.01, "do_sample": True},
    "repetition_penalty": {"repetition_penalty": 50.0},
    "min_p": {"min_p": 0.99, "do_sample": True},
    "typical_p": {"typical_p": 0.01, "do_sample": True},
    "epsilon_cutoff": {"epsilon_cutoff": 0.9, "do_sample": True},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "suppress_tokens": {"suppress_tokens": list(range(3, 50))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 50))},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(3, 50)]},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "min_new_tokens": {"min_new_tokens": 12},
    "num_beams": {"num_beams": 2},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 5.0)},
}


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_models_own_defaults_are_not_used(name: str, temperature: float) -> None:
    plain, model = models.llama(), models.llama()
    with torch.no_grad():  # the end token is likely, so that lengths differ
        for each in (plain, model):
            each.lm_head.weight[models.EOS] = 0.5 * each.lm_head.weight[5:20].sum(0)
    model.generation_config.update(**DEFAULTS[name])
    assert rollout(model, temperature=temperature) == rollout(plain, temperature=temperature)
    assert model.generation_config.to_dict()[name] == DEFAULTS[name][name]


@pytest.mark.parametrize("name", ["min_p", "num_beams", "repetition_penalty"])
def test_nor_are_those_of_an_adapted_model(name: str) -> None:
    plain, model = models.lora(models.llama()), models.lora(models.llama())
    for owner in (model, model.get_base_model()):
        owner.generation_config = models.copied(owner.generation_config)
        owner.generation_config.update(**DEFAULTS[name])
    assert rollout(model) == rollout(plain)
    for owner in (model, model.get_base_model()):
        assert owner.generation_config.to_dict()[name] == DEFAULTS[name][name]


def test_generation_arguments_are_used() -> None:
    model = models.llama()
    greedy = rollout(model, temperature=0.0)
    assert rollout(model, generation_kwargs={"top_k": 1}) == greedy
    assert rollout(model) != greedy


def test_the_temperature_is_that_of_sampling() -> None:
    model = models.llama()
    greedy = rollout(model, temperature=0.0)
    assert rollout(model, temperature=1e-4) == greedy
    with torch.no_grad():
        p = (model(input_ids=torch.tensor([[5]])).logits[0, -1] / 0.5).softmax(-1)
    tokens = torch.tensor(
        rollout(model, [[5]] * 4000, temperature=0.5, max_completion_length=1, eos_token_id=None)
    )[:, 0]
    shares = torch.bincount(tokens, minlength=models.VOCAB) / 4000
    # a share of 4000 draws has a standard deviation of sqrt(p / 4000): five of them
    assert ((shares - p).abs() <= 5 * (p / 4000).sqrt() + 1 / 4000).all()
    wrong = (model(input_ids=torch.tensor([[5]])).logits[0, -1]).softmax(-1)
    assert ((shares - wrong).abs() > 5 * (wrong / 4000).sqrt() + 1 / 4000).any()


def test_adapted_models_sample_from_the_adapted_policy() -> None:
    student, base = models.lora(models.llama()), models.llama()
    assert rollout(student, temperature=0.0) != rollout(base, temperature=0.0)
    merged = models.copied(student).merge_and_unload()
    assert rollout(student, temperature=0.0) == rollout(merged, temperature=0.0)


@pytest.mark.parametrize("fails", [False, True])
def test_the_random_state_of_a_device_is_kept(monkeypatch, fails):
    """Of one that this machine need not have: seeding seeds them all."""
    states = ["before"]
    fake = SimpleNamespace(get_rng_state=lambda: states[-1], set_rng_state=states.append)
    monkeypatch.setattr(torch, "mps", fake)
    before = torch.get_rng_state()
    with contextlib.suppress(KeyError), kept_rng(torch.device("mps")):
        states.append("changed")
        torch.rand(1)
        if fails:
            raise KeyError
    assert states == ["before", "changed", "before"]
    assert torch.equal(torch.get_rng_state(), before)
