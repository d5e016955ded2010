"""The engine "generate": Transformers' `generate` with the key-value cache."""

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from itertools import groupby
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import GenerationConfig

from hf_distill.data.batches import pad
from hf_distill.models import pieces
from hf_distill.models.modes import evaluating, kept_rng
from hf_distill.models.routers import silent_routers
from hf_distill.models.structure import causal_lm, is_sharded, unwrap
from hf_distill.rollouts.decoding import IN_PIECES, decode, leaving_refusal, say_staying
from hf_distill.rollouts.left_padding import ANY, NONE, LeftPadding, left_padding
from hf_distill.rollouts.sampling import Sampling, cut_at_end_token, end_token_ids


@contextmanager
def _no_generation_defaults(lm: Any) -> Iterator[None]:
    """Empty the model's own generation config inside the block.

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


@contextmanager
def _whole_root(model: nn.Module) -> Iterator[None]:
    """Make whole, inside the block, what only an FSDP root's forward would bring together.

    `generate` calls the module inside FSDP 1's wrapper; the wrapped blocks gather themselves. After
    forwards without a backward, FSDP 2 would leave its root in one piece.
    """
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, recurse=False, writeback=False):
            yield
        return
    try:
        yield
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()


def generation_config(sampling: Sampling, end_ids: list[int]) -> GenerationConfig:
    """Return the config of one call: no field of the model's own config enters it."""
    t = sampling.temperature
    defaults = {"temperature": t, "top_k": 0, "top_p": 1.0} if t > 0 else {}
    return GenerationConfig(
        max_new_tokens=sampling.max_completion_length,
        do_sample=t > 0,
        **{"repetition_penalty": 1.0, **defaults, **sampling.generation_kwargs},
        pad_token_id=sampling.pad_token_id,
        eos_token_id=end_ids or None,
        use_cache=True,
    )


def manual_seed(seed: int) -> None:
    """Seed torch on all devices, with any integer."""
    torch.manual_seed(seed % 2**64)


MoreInputs = Callable[[Sequence[int], torch.Tensor], Mapping[str, torch.Tensor]]
"""Makes what a model reads besides some of the prompts, from their numbers and ids [b, T]."""


def _batches(
    prompts: Sequence[Sequence[int]], batch_size: int | None, share: str
) -> list[list[int]]:
    """Return the prompts' indices of each call: short ones together, so that little is padded.

    Args:
        prompts: of all calls.
        batch_size: of a call, at most.
        share: which prompts may share a call, see `left_padding`.
    """
    rows = list(range(len(prompts)))
    if batch_size is None and share == ANY:
        return [rows]
    rows.sort(key=lambda i: len(prompts[i]))
    groups = [rows]
    if share != ANY:
        groups = [list(group) for _, group in groupby(rows, lambda i: len(prompts[i]))]
    size = 1 if share == NONE else batch_size or max(1, len(rows))
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    eos_token_id: int | Sequence[int] | None,
    max_completion_length: int,
    temperature: float,
    seed: int,
    generation_kwargs: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    more_inputs: MoreInputs | None = None,
) -> list[list[int]]:
    """Generate completions of the prompts, by `generate` with the key-value cache.

    Args:
        model: wrapped or not; it generates in eval mode and is then as before. Where its
            parameters are sharded all processes must call this together, with any number of
            prompts each: who has fewer calls to make takes part in those of the others.
        prompts: lists of token ids; they are padded on the left, unless the model continues them
            otherwise then, see `rollouts.left_padding`.
        pad_token_id: may equal an end token: a completion ends at its first end token, not where
            padding begins.
        eos_token_id: the tokenizer's end token, or several; those of the model's generation config
            count too.
        max_completion_length: tokens.
        temperature: of sampling from the whole vocabulary; 0 is greedy. The loss's temperature is
            another one.
        seed: of the samples. The random state of the caller is left as it is.
        generation_kwargs: fields of `GenerationConfig` to add (top_p, top_k, ...). The
            model's own sampling defaults are not used: they would change the policy silently.
        batch_size: prompts of one call of the model's `generate`, short ones together, each batch
            with a seed of its own; None is all at once, as they come, or all of one length where
            nothing may be padded.
        more_inputs: makes further inputs of a call, of images say. Rows then stay in their call
            until all have ended.

    Returns:
        One list of ids per prompt, with its end token if it has ended, without padding.

    Raises:
        ValueError: a prompt is longer than the model's learnt positions.
    """
    lm: Any = unwrap(model)
    device = next(lm.parameters()).device
    end_ids = end_token_ids(lm, eos_token_id)
    sampling = Sampling(
        pad_token_id, eos_token_id, max_completion_length, temperature, generation_kwargs or {}
    )
    config = generation_config(sampling, end_ids)
    with (
        kept_rng(device),
        evaluating(lm),
        _no_generation_defaults(lm),
        silent_routers(causal_lm(lm)),
        _whole_root(model),
    ):
        padding = left_padding(lm, prompts, pad_token_id, device)
        padding = padding if more_inputs is None else padding.with_images()
        share = padding.sharing(max(map(len, prompts), default=0), max_completion_length)
        batches = _batches(prompts, batch_size, share)
        one = batch_size is None and len(batches) == 1
        options = {} if is_sharded(model) else _leaving(lm, config, padding)
        if is_sharded(model):
            # a process that has ended goes on with the others, who need its parameters
            batches += [[]] * (pieces.most(len(batches)) - len(batches))
            say_staying(lm, IN_PIECES)
            options["synced_gpus"] = torch.distributed.get_world_size() > 1
        found: dict[int, list[int]] = {}
        for number, rows in enumerate(batches):
            manual_seed(seed if one else _seed_of(seed, number))
            given = [prompts[i] for i in rows] or [[pad_token_id]]  # of which nothing is kept
            further = {} if more_inputs is None else {"more": partial(more_inputs, rows)}
            completions = _call(lm, given, config, padding, options, **further)
            found |= {
                i: cut_at_end_token(row, end_ids) for i, row in zip(rows, completions, strict=False)
            }
    return [found[i] for i in range(len(prompts))]


def _leaving(lm: nn.Module, config: GenerationConfig, padding: LeftPadding) -> dict[str, Any]:
    """Return what lets rows leave a call of `generate` when they have ended; nothing if none may.

    Without an end token no row ends before the others.
    """
    if config.eos_token_id is None:
        return {}
    reason = leaving_refusal(lm, config) or padding.stays
    if reason is None:
        return {"custom_generate": decode}
    say_staying(lm, reason)
    return {}


def _call(
    lm: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    padding: LeftPadding,
    options: dict[str, Any],
    more: Callable[[torch.Tensor], Mapping[str, torch.Tensor]] = lambda _: {},
) -> list[list[int]]:
    """Return what one call of the model's `generate` writes behind prompts."""
    device, fill = next(lm.parameters()).device, cast(int, config.pad_token_id)
    ids = pad(prompts, fill, side="left").to(device)
    mask = pad([[1] * len(prompt) for prompt in prompts], 0, side="left").to(device)
    more_inputs = {name: x.to(device) for name, x in more(ids).items()}
    config = copy.copy(config)
    config.max_new_tokens = padding.new_tokens(cast(int, config.max_new_tokens), ids.shape[1])
    options = options | padding.arguments(mask) | more_inputs
    output = lm.generate(input_ids=ids, attention_mask=mask, generation_config=config, **options)
    return output[:, ids.shape[1] :].tolist()


def _seed_of(seed: int, number: int) -> int:
    return random.Random(f"{seed} {number}").getrandbits(63)


class GenerateEngine:
    """Samples with Transformers' `generate`.

    Args:
        sampling: its settings.
        batch_size: as in `generate`.
    """

    def __init__(self, sampling: Sampling, batch_size: int | None = None) -> None:
        self.sampling, self.batch_size = sampling, batch_size

    def sample(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        seed: int,
        max_new_tokens: int | None = None,
        more_inputs: MoreInputs | None = None,
    ) -> list[list[int]]:
        """Return one list of ids per prompt, see `Engine.sample` and, of inputs, `generate`."""
        sampling = self.sampling.at_most(max_new_tokens)
        settings = {x.name: getattr(sampling, x.name) for x in fields(sampling)}
        others = {"batch_size": self.batch_size, "more_inputs": more_inputs}
        return generate(model, prompts, **settings, seed=seed, **others)

    def weights_changed(self) -> None:
        """Do nothing: it samples from the model itself."""
