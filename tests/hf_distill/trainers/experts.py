"""Tiny mixtures of experts whose routers say what they choose."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.hf_distill.trainers import models

COEFFICIENT = 0.25  # large, so that the auxiliary loss is seen beside the others
USUAL = models.SIZES | {"num_experts_per_tok": 2, "head_dim": 8}
LOCAL = USUAL | {"num_local_experts": 4}
NAMED = USUAL | {"num_experts": 4, "moe_intermediate_size": 16}
SHARED = NAMED | {"shared_expert_intermediate_size": 16}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
DBRX: dict[str, Any] = models.BASE | {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
    "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": LOCAL,
    "qwen2_moe": SHARED,
    "qwen3_moe": NAMED,
    "qwen3_5_moe_text": SHARED | LINEAR,
    "olmoe": USUAL | {"num_experts": 4},
    "phimoe": LOCAL | {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "gpt_oss": LOCAL,
    "dbrx": DBRX,
    "jetmoe": LOCAL | {"kv_channels": 8},
    "granitemoe": LOCAL | {"logits_scaling": 2.0},
}


def set_routers(lm: Any, say: bool) -> None:
    lm.config.output_router_logits = say


def moe(kind: str = "mixtral", seed: int = 0, say: bool = True, **changes: Any) -> Any:
    """A model in evaluation mode; the test is skipped where Transformers does not know it."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"the installed Transformers has no {kind}")
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[kind](**CONFIGS[kind] | changes)
    lm: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    set_routers(lm, say)
    for name in ("router_aux_loss_coef", "aux_loss_coef"):
        if hasattr(lm, name):
            setattr(lm, name, COEFFICIENT)
    return lm.eval()


def gradients(lm: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}
