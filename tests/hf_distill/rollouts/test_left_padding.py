"""Prompts that share a call of `generate` are continued as each of them is alone."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from hf_distill.rollouts import Sampling, generate, left_padding
from hf_distill.rollouts.continuous_batching import ContinuousEngine
from tests.hf_distill.models import numbering

NEW = 6
SETTINGS: dict[str, Any] = {
    "pad_token_id": numbering.PAD,
    "eos_token_id": None,
    "max_completion_length": NEW,
    "temperature": 0.0,
    "seed": 0,
}


def prompts(lengths: Sequence[int] = (3, 9, 5, 9, 1)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, 90, (n,), generator=generator).tolist() for n in lengths]


def made(family: str) -> Any:
    model: Any = numbering.make(family)
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def is_greedy(model: nn.Module, prompt: list[int], completion: list[int]) -> bool:
    """Whether each token is the most probable by the forward on the row alone, up to rounding."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(-1, torch.tensor(completion)[:, None])[:, 0]
    return bool((logits.amax(-1) - chosen <= 1e-4 * logits.abs().max()).all())


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("family", numbering.FAMILIES)
def test_prompts_are_continued_as_they_are_alone(family: str, batch_size: int | None) -> None:
    model, given = made(family), prompts()
    found = generate(model, given, **SETTINGS, batch_size=batch_size)
    assert [len(x) for x in found] == [NEW] * len(given)
    assert all(is_greedy(model, *pair) for pair in zip(given, found, strict=True))


@pytest.mark.parametrize(
    ("family", "share", "widths"),
    [
        ("gpt2", left_padding.ANY, [9]),
        ("roberta", left_padding.ANY, [9]),
        ("bart", left_padding.OF_ONE_LENGTH, [1, 3, 5, 9]),
        ("rwkv", left_padding.NONE, [1, 3, 5, 9, 9]),  # two rows in one call mix their states
    ],
)
def test_which_prompts_share_a_call(caplog: Any, family: str, share: str, widths: Any) -> None:
    model, calls = made(family), []
    caplog.set_level(logging.INFO, "hf_distill.rollouts.left_padding")
    generate(model, prompts(), **SETTINGS)
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == (share != left_padding.ANY)
    assert all(f"prompts that share a call: {share}, because" in text for text in texts)
    plain = model.generate

    def noted(input_ids: Any, **kwargs: Any) -> Any:
        calls.append(input_ids.shape[1])
        return plain(input_ids=input_ids, **kwargs)

    model.generate = noted
    generate(model, prompts(), **SETTINGS)
    assert calls == widths  # and nothing is tried a second time
    assert len(caplog.records) == len(texts)


def test_calls_of_one_length_have_seeds_of_their_own() -> None:
    model = made("bart")
    same = [[5, 6], [5, 6], [7, 8, 9], [5, 6]]
    sampled = SETTINGS | {"temperature": 1.0}
    found = generate(model, same, **sampled)
    assert found == generate(model, same, **sampled)
    assert len({tuple(x) for x in found}) > 1
    assert found != generate(model, same, **sampled | {"seed": 1})


@pytest.mark.parametrize(("family", "limit"), [("gpt2", 64), ("roberta", 62), ("bart", 64)])
def test_completions_end_with_the_learnt_positions(family: str, limit: int) -> None:
    model, given = made(family), prompts((60, 5))
    found = generate(model, given, **SETTINGS | {"max_completion_length": 100})
    # nobody reads the last one
    assert [len(x) for x in found] == [limit - len(prompt) + 1 for prompt in given]
    pairs = zip(given, found, strict=True)
    assert all(is_greedy(model, prompt, completion[:-1]) for prompt, completion in pairs)
    with pytest.raises(ValueError, match=rf"student: a row has 70 tokens, .* are for {limit}: sh"):
        generate(model, prompts((5, 70)), **SETTINGS)


def test_continuous_batching_counts_from_zero() -> None:
    sampling = Sampling(0, None, NEW, 0.0)
    engine = ContinuousEngine(sampling, {})
    with pytest.raises(ValueError, match="it counts positions from 2, continuous batching from 0"):
        engine.sample(made("roberta"), prompts(), 0)
