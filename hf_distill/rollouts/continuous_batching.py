"""The engine "continuous": Transformers' continuous batching.

A row that has ended makes room for the next prompt, and nothing is padded. The keys and values of
all rows lie in one paged cache.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import ContinuousBatchingConfig

from hf_distill.models.modes import evaluating, kept_rng
from hf_distill.models.position_trials import synthetic_row
from hf_distill.models.positions import positions_of
from hf_distill.models.routers import silent_routers
from hf_distill.models.structure import causal_lm, is_sharded, unwrap
from hf_distill.rollouts.generate import generation_config, manual_seed
from hf_distill.rollouts.sampling import Sampling, cut_at_end_token, end_token_ids

# Of prompts in one forward, and of a page. Without flash attention a mask of [tokens of a forward,
# tokens of the cache] is kept; flash attention's kernels want whole pages of 256.
PREFILL_TOKENS = 512
PAGE_SIZE = {True: 256, False: 32}
LAYER_TYPES = ("full_attention", "sliding_attention")


def _attention_refusal(lm: Any) -> str | None:
    attention, config = lm.config._attn_implementation or "eager", lm.config.get_text_config()
    if "flash" in attention:
        # mixed precision does not help: the cache has the weights' dtype
        return (
            f"flash attention needs 16-bit weights, got {lm.dtype}"
            if lm.dtype.itemsize > 2
            else None
        )
    if attention not in ("eager", "sdpa", "paged|eager"):
        return f"attention implementation {attention!r} has no paged form"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return (
            f"paged {attention} attention leaves out attn_logit_softcapping; flash attention has it"
        )
    return None


def _positions_refusal(model: nn.Module) -> str | None:
    """Return why its positions are wrong there, found by a short forward at the first call."""
    lm = causal_lm(model)
    row = synthetic_row(lm, next(lm.parameters()).device)
    positions = positions_of(model)
    positions.arguments(model, {"input_ids": row}, "student")
    if positions.first:
        return f"it counts positions from {positions.first}, continuous batching from 0"
    return None


def continuous_batching_refusal(model: nn.Module) -> str | None:
    """Return why continuous batching cannot sample from a model, or None.

    Args:
        model: wrapped or not.
    """
    lm: Any = causal_lm(model)
    if is_sharded(model):
        return "its parameters are sharded"
    if not hasattr(lm, "init_continuous_batching"):
        return f"{type(lm).__name__} has no init_continuous_batching"
    if getattr(lm, "_cached_continuous_batching_manager", None) is not None:
        return (
            "it keeps a manager of another session; call destroy_cached_continuous_batching_manager"
        )
    if lm._is_stateful:
        return "it keeps a state that is no key-value cache"
    kinds = set(getattr(lm.config.get_text_config(), "layer_types", None) or ()) - set(LAYER_TYPES)
    if kinds:
        return f"layers of type {min(kinds)!r} have no paged cache"
    return _attention_refusal(lm)


@contextmanager
def _without_autocast(lm: Any) -> Iterator[None]:
    """Take accelerate's mixed precision off: the paged cache has the weights' dtype."""
    mixed, plain = lm.__dict__.get("forward"), lm.__dict__.get("_original_forward")
    if plain is None:
        yield
        return
    lm.forward = plain
    try:
        yield
    finally:
        lm.forward = mixed


class ContinuousEngine:
    """Samples with Transformers' continuous batching, on any device that it runs on.

    Every sample starts a manager of its own, whose cache has room for all rows at their full
    length, unless `engine_kwargs` sets `num_blocks`. The attention implementation stays the model's
    own unless `auto_switch_to_flash` is set. Mixed precision is off: it samples in the dtype of the
    weights.

    Args:
        sampling: its settings; of generation_kwargs only top_k and top_p work here.
        engine_kwargs: fields of `ContinuousBatchingConfig`.
    """

    def __init__(self, sampling: Sampling, engine_kwargs: Mapping[str, Any]) -> None:
        self.sampling, self.engine_kwargs = sampling, dict(engine_kwargs)

    def _config(
        self,
        prompts: Sequence[Sequence[int]],
        flash: bool,
        seed: int,
        max_new_tokens: int | None = None,
    ) -> ContinuousBatchingConfig:
        # left open, the cache would take most of the device's free memory
        flash = flash or self.engine_kwargs.get("auto_switch_to_flash", False)
        page = self.engine_kwargs.get("page_size", PAGE_SIZE[flash])
        longest = self.sampling.at_most(max_new_tokens).max_completion_length
        pages = sum(-(-(len(prompt) + longest) // page) for prompt in prompts)
        tokens = max(len(prompts), min(PREFILL_TOKENS, sum(map(len, prompts))))
        defaults = {
            "page_size": page,
            "num_blocks": pages + 2 * len(prompts),  # layer types round up each for themselves
            "max_batch_tokens": tokens,
            "auto_switch_to_flash": False,
        }
        return ContinuousBatchingConfig(**defaults | self.engine_kwargs, seed=seed % 2**63)

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        seed: int,
        max_new_tokens: int | None = None,
    ) -> list[list[int]]:
        """Return one list of ids per prompt, see `Engine.sample`.

        Raises:
            ValueError: continuous batching cannot sample from this model; the message says why.
            RuntimeError: it failed on a prompt.
        """
        reason = continuous_batching_refusal(model) or _positions_refusal(model)
        if reason is not None:
            raise ValueError(f"engine 'continuous' cannot sample from this model: {reason}")
        lm: Any = causal_lm(model)
        end_ids = end_token_ids(unwrap(model), self.sampling.eos_token_id)
        sampling = self.sampling.at_most(max_new_tokens)
        # -1 is no token; without any, Transformers would set it and warn
        config = generation_config(sampling, end_ids or [-1])
        attention = lm.config._attn_implementation
        batching = self._config(prompts, "flash" in (attention or ""), seed, max_new_tokens)
        try:
            with (
                kept_rng(lm.device),
                evaluating(unwrap(model)),
                silent_routers(lm),
                _without_autocast(lm),
            ):
                manual_seed(seed)
                outputs = _run(lm, prompts, config, batching)
        finally:
            if lm.config._attn_implementation != attention:
                lm.set_attn_implementation(attention)
        return [cut_at_end_token(output, end_ids) for output in outputs]

    def weights_changed(self) -> None:
        """Do nothing: it samples from the model itself."""


def _run(lm: Any, prompts: Sequence[Sequence[int]], config: Any, batching: Any) -> list[list[int]]:
    manager = lm.init_continuous_batching(
        generation_config=config, continuous_batching_config=batching
    )
    results: dict[str, Any] = {}
    # all are queued before the loop starts: the same rows then share a forward in every run
    names = manager.add_requests([list(prompt) for prompt in prompts])
    manager.start()
    try:
        while len(results) < len(names):
            result = manager.get_result(timeout=1.0)
            if result is None and not manager.is_running():
                break
            if result is not None and result.is_finished():
                results[result.request_id] = result
    finally:
        manager.stop()
        manager.destroy()
    for i, name in enumerate(names):
        error = results[name].error if name in results else "no result"
        if error is not None:
            raise RuntimeError(f"continuous batching failed on prompt {i}: {error}")
    return [results[name].generated_tokens for name in names]
