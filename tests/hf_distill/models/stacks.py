"""Tiny models whose stack of blocks is not where, or its states are not what, most models have."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
USUAL = TOKENS | {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
SMALL_GPT = TOKENS | {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
RANKS = {"q_lora_rank": 16, "kv_lora_rank": 16, "o_lora_rank": 16}
GEMMA3N: dict[str, Any] = USUAL | {
    "vocab_size_per_layer_input": 61,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 48,
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "activation_sparsity_pattern": [0.0, 0.0, 0.0],
}
DEEPSEEK_V4: dict[str, Any] = USUAL | MOE | RANKS
DEEPSEEK_V4 |= {
    "index_n_heads": 4,
    "index_head_dim": 8,
    "qk_rope_head_dim": 8,
    "layer_types": ["heavily_compressed_attention"] * 3,
    "mlp_layer_types": ["moe"] * 3,
}
LONGCAT: dict[str, Any] = TOKENS | RANKS
LONGCAT |= {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "ffn_hidden_size": 48,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 8,
    "moe_topk": 2,
    "n_routed_experts": 4,
    "zero_expert_num": 4,
    "expert_ffn_hidden_size": 16,
}
XLNET = {"vocab_size": 61, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48, "dropout": 0.0}
CPMANT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "dim_head": 8,
    "dim_ff": 48,
}
PROPHETNET = TOKENS | {"vocab_size": 61, "hidden_size": 32, "is_decoder": True}
XLM = {"n_words": 61, "vocab_size": 61, "emb_dim": 32, "n_layers": 3, "n_heads": 4, "causal": True}
XLM |= {"dropout": 0.0, "attention_dropout": 0.0}

CONFIGS: dict[str, dict[str, Any]] = {
    "openai-gpt": SMALL_GPT | NO_DROPOUT,  # lists
    "gpt2": SMALL_GPT | NO_DROPOUT,
    "bloom": TOKENS | {"vocab_size": 61, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "llama": USUAL,
    "gemma3n_text": GEMMA3N,  # [S, B, T, H]
    "deepseek_v4": DEEPSEEK_V4,  # [B, T, S, H]
    "xlnet": XLNET,  # [T, B, H]
    "modernbert-decoder": USUAL | {"cls_token_id": 1, "sep_token_id": 2},  # its decoder is a head
    "longcat_flash": LONGCAT,  # two layers of the config are one block
    "hrm_text": USUAL,  # two stacks that run in turns
    "mamba": USUAL | {"state_size": 8, "time_step_rank": 8},
    "rwkv": USUAL | {"context_length": 64, "attention_hidden_size": 32},
    "cpmant": CPMANT | {"num_hidden_layers": 3},
    "prophetnet": PROPHETNET | {"num_decoder_layers": 3, "num_decoder_attention_heads": 4},
    "xlm": XLM,
}


def model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A model in evaluation mode; the test is skipped where Transformers does not know it."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"the installed Transformers has no {kind}")
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**CONFIGS[kind] | changes))
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return lm.eval()
