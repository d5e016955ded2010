"""A teacher that lies in pieces on the processes, cut by the engine that cuts the student."""

import copy
import logging
from contextlib import nullcontext
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from hf_distill.models.heads_apart import heads_apart, shards_heads
from hf_distill.models.pieces import lies_in_pieces
from hf_distill.models.structure import causal_lm

logger = logging.getLogger(__name__)


def _why_whole(accelerator: Accelerator, model: nn.Module, shares: bool) -> str | None:
    """Return why a frozen model stays whole on each process, or None."""
    if getattr(model, "is_quantized", False):
        return "it is quantized"
    if getattr(model, "hf_device_map", None):
        return "it was placed when it was loaded"
    if shares:
        return "it has modules in common with the student"
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        return "FSDP 1 cuts models that are trained"
    return None


def _cut_by_fsdp2(accelerator: Accelerator, model: nn.Module) -> None:
    """Cut a model in place, layer by layer of its own class and not of the student's."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model  # noqa: PLC0415 - slow

    plugin: Any = accelerator.state.fsdp_plugin
    names, policy = plugin.transformer_cls_names_to_wrap, plugin.auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = None
    apart = heads_apart(model) if shards_heads(accelerator) else nullcontext()
    try:
        with apart:
            fsdp2_prepare_model(accelerator, model)
    finally:
        plugin.transformer_cls_names_to_wrap, plugin.auto_wrap_policy = names, policy


def _cut_by_zero3(accelerator: Accelerator, model: nn.Module) -> Any:
    """Cut a model in place by an engine of its own, which has no optimizer; returns the engine."""
    import deepspeed  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

    plugin: Any = accelerator.deepspeed_plugin
    given = copy.deepcopy(plugin.deepspeed_config)
    size = cast(Any, causal_lm(model).config).get_text_config().hidden_size
    zero = given["zero_optimization"] | {
        # those of the student, which "auto" stood for, are of its own width
        "reduce_bucket_size": size * size,
        "stage3_prefetch_bucket_size": int(0.9 * size * size),
    }
    zero.pop("offload_optimizer", None)
    kept = {key: given[key] for key in ("bf16", "fp16") if key in given}
    config = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1, **kept}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def cut_by_engine(accelerator: Accelerator, model: nn.Module, shares: bool) -> Any:
    """Cut a frozen model into pieces if the run's engine holds models so, and say what was done.

    All processes must ask it together from then on.

    Args:
        accelerator: of the trainer.
        model: on its device, in eval mode.
        shares: whether modules of it are the student's too.

    Returns:
        What must be kept beside the model, or None.
    """
    kind, plugin = accelerator.distributed_type, accelerator.deepspeed_plugin
    zero3 = kind == DistributedType.DEEPSPEED and plugin is not None and plugin.zero_stage == 3
    cut = any(hasattr(p, "ds_id") for p in model.parameters())  # at loading, by no engine yet
    if not (zero3 or kind == DistributedType.FSDP) or (lies_in_pieces(model) and not cut):
        return None
    why = _why_whole(accelerator, model, shares)
    if why is not None:
        logger.info("teacher: whole on every process, because %s", why)
        return None
    logger.info("teacher: in pieces on the processes, by the student's engine (%s)", kind.value)
    if zero3:
        return _cut_by_zero3(accelerator, model)
    _cut_by_fsdp2(accelerator, model)
    return None
