"""Completions sampled from the student."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from hf_distill.alignment import pad
from hf_distill.heads import causal_lm, evaluating, kept_rng, unwrap


def end_token_ids(model: nn.Module, eos_token_id: int | None) -> list[int]:
    """Every id that ends a completion: the generation config's (maybe several), the tokenizer's."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = ids if isinstance(ids, list | tuple) else [ids]
    return sorted({i for i in (*ids, eos_token_id) if i is not None})


def cut(completion: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """The ids up to and with the first end token; all of them if there is none."""
    for position, token in enumerate(completion):
        if token in end_ids:
            return list(completion[: position + 1])
    return list(completion)


@contextmanager
def _no_generation_defaults(lm: Any) -> Iterator[None]:
    """The model's own generation config is empty inside the block.

    `generate` takes every field that its argument leaves open from the model's config: sampling
    tricks such as min_p or no_repeat_ngram_size would change the policy silently. An adapter
    wrapper and the model in it can each have a config.
    """
    owners: list[Any] = [m for m in (lm, causal_lm(lm)) if "generation_config" in m.__dict__]
    kept = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for owner, config in zip(owners, kept, strict=True):
            owner.generation_config = config


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    eos_token_id: int | None,
    max_completion_length: int,
    temperature: float,
    seed: int,
    generation_kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Completions of the prompts, by `generate` with the key-value cache.

    Args:
        model: wrapped or not; it generates in eval mode and is then as before.
        prompts: lists of token ids; they are padded on the left.
        pad_token_id: may equal an end token: a completion ends at its first end token, not where
            padding begins.
        eos_token_id: the tokenizer's end token; those of the model's generation config count too.
        max_completion_length: tokens.
        temperature: of sampling from the whole vocabulary; 0 is greedy. The loss's temperature is
            another one.
        seed: of the samples. The random state of the caller is left as it is.
        generation_kwargs: fields of `GenerationConfig` to add (top_p, top_k, ...). The
            model's own sampling defaults are not used: they would change the policy silently.

    Returns:
        One list of ids per prompt, with its end token if it has ended, without padding.
    """
    lm: Any = unwrap(model)
    device = next(lm.parameters()).device
    end_ids = end_token_ids(lm, eos_token_id)
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    config = GenerationConfig(
        max_new_tokens=max_completion_length,
        do_sample=temperature > 0,
        **{"repetition_penalty": 1.0, **sampling, **(generation_kwargs or {})},
        pad_token_id=pad_token_id,
        eos_token_id=end_ids or None,
        use_cache=True,
    )
    ids = pad(prompts, pad_token_id, side="left").to(device)
    mask = pad([[1] * len(prompt) for prompt in prompts], 0, side="left").to(device)
    with kept_rng(device), evaluating(lm), _no_generation_defaults(lm):
        torch.manual_seed(seed)
        output = lm.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return [cut(row, end_ids) for row in output[:, ids.shape[1] :].tolist()]
