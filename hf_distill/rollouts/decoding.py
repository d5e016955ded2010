"""A decoding loop for `generate` from which rows leave when their completions have ended.

Transformers' own loop runs every row until the longest completion has ended. This one runs the
model on the rows that go on. What surrounds the model sees all rows, as there: logits processors,
the draw of the next tokens and stopping criteria. So the random numbers of a seed stay where they
were, and a row's tokens do not depend on which rows have ended.

Shapes: B rows of a call, T columns, V vocabulary.
"""

import logging
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from peft.utils import PeftType
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from hf_distill.models.structure import causal_lm, in_pieces, is_sharded

logger = logging.getLogger(__name__)

# What the loop calls of a model besides its public methods
CALLED = ("_prefill", "_update_model_kwargs_for_generation", "_optimize_model_for_decode")
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
CACHES = ("cache", "past_key_values")  # the name depends on the version of Transformers
PER_ROW = ("attention_mask", "position_ids", "token_type_ids")  # [B, T]
OTHERS = ("use_cache", "logits_to_keep")
IN_PIECES = "parameters in pieces need all processes at every token"

_SAID: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def say_staying(lm: nn.Module, reason: str) -> None:
    """Log once for each model and reason that rows which have ended stay in the batch."""
    said = _SAID.setdefault(causal_lm(lm), set())
    if reason not in said:
        said.add(reason)
        logger.info("rollouts: rows that have ended stay in the batch of `generate`: %s", reason)


def leaving_refusal(lm: nn.Module, config: GenerationConfig) -> str | None:
    """Return why rows cannot leave the batch while a model samples, or None.

    Args:
        lm: not wrapped, with its adapters.
        config: of the call.
    """
    return (
        _refusal_of_model(causal_lm(lm)) or _refusal_of_adapters(lm) or _refusal_of_config(config)
    )


def _refusal_of_model(lm: nn.Module) -> str | None:
    base, kind = cast(Any, lm), type(lm)
    if not issubclass(kind, GenerationMixin) or "generate" in vars(lm):
        return f"the `generate` of a {kind.__name__} is its own"
    for name in ("generate", "_sample"):
        if getattr(kind, name) is not getattr(GenerationMixin, name):
            return f"the `{name}` of a {kind.__name__} is its own"
    for name in CALLED:
        if not hasattr(base, name):
            return f"this version of Transformers has no `{name}`"
    if base.config.is_encoder_decoder or base._is_stateful:
        return "the model keeps more than a cache of keys and values"
    if base.device.type == "mps":
        return "on mps `generate` does not wait for the device at every token"
    if is_sharded(lm) or any(in_pieces(p) for p in lm.parameters()):
        return IN_PIECES
    return None


def _refusal_of_adapters(lm: nn.Module) -> str | None:
    found: dict[str, Any] = lm.peft_config if isinstance(lm, PeftModel) else {}
    for config in found.values():
        if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
            return f"adapters of type {PeftType(config.peft_type).value} keep something of each row"
    return None


def _refusal_of_config(config: GenerationConfig) -> str | None:
    mode = config.get_generation_mode()
    if mode not in MODES:
        return f"the generation mode is {mode.value}"
    if config.cache_implementation not in (None, "dynamic"):
        return f"cache_implementation is {config.cache_implementation!r}"
    return None


def unfit_inputs(model_kwargs: dict[str, Any]) -> str | None:
    """Return which input of a model's forward the loop cannot take rows out of, or None."""
    cache = next((model_kwargs[x] for x in CACHES if model_kwargs.get(x) is not None), None)
    if type(cache) is not DynamicCache:
        return f"the cache is a {type(cache).__name__}"
    for name, value in model_kwargs.items():
        if value is None or name in (*CACHES, *OTHERS):
            continue
        if name not in PER_ROW or value.ndim != 2:
            return f"its forward is given {name}"
    return None


def _take_rows(model_kwargs: dict[str, Any], rows: Tensor) -> None:
    """Keep these rows, of those that are there, of the cache and of every input."""
    for name in PER_ROW:
        if model_kwargs.get(name) is not None:
            model_kwargs[name] = model_kwargs[name].index_select(0, rows)
    cache = next(model_kwargs[x] for x in CACHES if model_kwargs.get(x) is not None)
    # all kinds of layers have it, also those whose states are not keys and values
    cache.reorder_cache(rows)


def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Tensor:
    """Continue prompts, as `custom_generate` of `generate`, by greedy search or sampling.

    Args:
        model: the causal LM.
        input_ids: [B, T] prompts, padded on the left.
        logits_processor: gets all rows; what those that have ended say is 0.
        stopping_criteria: get all rows.
        generation_config: its pad token fills the rows that have ended.
        **model_kwargs: of the forward.

    Returns:
        [B, T + new] ids.
    """
    unfit = unfit_inputs(model_kwargs)
    if unfit is not None:
        say_staying(model, unfit)
        around = logits_processor, stopping_criteria, generation_config
        return model._sample(input_ids, *around, **model_kwargs)
    goes_on = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    rows = goes_on.nonzero()[:, 0]  # of the batch, those that the model runs
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    with model._optimize_model_for_decode():
        while True:
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            logits = _of_all_rows(outputs.logits[:, -1], rows, len(input_ids))
            del outputs  # of a prompt they can be large
            tokens = _next_tokens(logits_processor(input_ids, logits), generation_config)
            tokens = torch.where(goes_on, tokens, generation_config.pad_token_id)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
            goes_on &= ~stopping_criteria(input_ids, None)
            left = goes_on[rows].nonzero()[:, 0]
            if not len(left):
                return input_ids
            if len(left) < len(rows):
                _take_rows(model_kwargs, left)
                rows = rows[left]
            inputs = model.prepare_inputs_for_generation(
                input_ids[rows], next_sequence_length=1, **model_kwargs
            )
            outputs = model(**inputs, return_dict=True)


def _of_all_rows(logits: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return float32 logits [B, V] of all rows, 0 where the model has not run."""
    logits = logits.to(torch.float32, copy=True)
    if len(rows) == count:
        return logits
    return logits.new_zeros(count, logits.shape[1]).index_copy_(0, rows, logits)


def _next_tokens(scores: Tensor, config: GenerationConfig) -> Tensor:
    """Return [B] ids, drawn for all rows at once as Transformers' loop does."""
    if not config.do_sample:
        return scores.argmax(-1)
    return torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
