"""What must be said of single types, where small sizes by name do not fit together."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

LINEAR_FIRST = {"layer_types": ["linear_attention", "full_attention"]}
HEADS_OF_8 = {"head_dim": 8}
QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 2,
}
DOTS3 = {
    "index_n_heads": 32,
    "qk_nope_head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
# Scores of few index heads are zero for whole rows, and `topk` breaks such ties by the rows' width
MANY_INDEX_HEADS = {"index_n_heads": 32}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
MROPE_LAYERS = dict.fromkeys(("full_attention", "sliding_attention"), MROPE)
BLT_PART = {"hidden_size_global": 32, "vocab_size": 97}
CHANGES: Mapping[str, dict[str, Any]] = {
    "axk2": MANY_INDEX_HEADS,
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_config": BLT_PART,
        "decoder_config": BLT_PART,
        "encoder_hash_byte_group_vocab": 64,
    },
    "cohere_compass_text": {
        "layer_types": list(MROPE_LAYERS),
        "rope_parameters": MROPE_LAYERS,
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v32": MANY_INDEX_HEADS,
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": DOTS3,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 48},
    "glm_moe_dsa": MANY_INDEX_HEADS,
    "granitemoehybrid": LINEAR_FIRST,
    "hunyuan_v1_dense": HEADS_OF_8,
    "hunyuan_v1_moe": HEADS_OF_8,
    # Its head has more rows than its vocabulary
    "inkling2_loop_text": {"vocab_size": 104, "unpadded_vocab_size": 97},
    "inkling2_text": {"vocab_size": 104, "unpadded_vocab_size": 97},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "ministral": HEADS_OF_8,
    "nemotron": HEADS_OF_8 | {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "hash_seed": 0},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1},
}
SLIDING = {"sliding_window": 4}
WITH_SLIDING = """afmoe beam cohere2 cohere2_moe cohere_compass_text cwm deepseek_v4 dory exaone4
exaone_moe flint gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text gpt_oss granite_swa
granitemoe_swa kolibri1 lara_mini mimo_v2_flash ministral ministral3 mistral mixtral
modernbert-decoder olmo3 phi3 phi4_multimodal phimoe starcoder2 vaultgemma"""
FOR_ALL_LAYERS = {
    "use_sliding_window": True,
    "max_window_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}
# Windows, chunks and numbers of selected keys that are shorter than the sweep's rows
WINDOWS: Mapping[str, dict[str, Any]] = {
    **dict.fromkeys(WITH_SLIDING.split(), SLIDING),
    **dict.fromkeys(("dots1", "qwen2", "qwen2_moe", "qwen3"), SLIDING | FOR_ALL_LAYERS),
    "laguna": SLIDING | {"layer_types": ["sliding_attention", "full_attention"]},
    "lfm3": SLIDING | {"layer_types": ["conv", "sliding_attention"]},
    "mellum": SLIDING | {"layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": SLIDING | FOR_ALL_LAYERS,
    "axk2": {"index_topk": 4},
    "bamba": {"mamba_chunk_size": 4},
    "deepseek_v32": {"index_topk": 4},
    "doge": {"keep_window_size": 4},
    "dots3_note_text": {"index_topk": 4, "sliding_window": 4},
    "falcon_h1": {"mamba_chunk_size": 4},
    "glm_moe_dsa": {"index_topk": 4},
    "gpt_neo": {"window_size": 4},
    "granitemoehybrid": {"mamba_chunk_size": 4},
    "hy_v4": {"index_topk": 4, "index_n_heads": 32},
    "inkling2_loop_text": {"sliding_window_size": 4},
    "inkling2_text": {"sliding_window_size": 4},
    "inkling_text": {"sliding_window_size": 4},
    "llama4_text": {"attention_chunk_size": 4},
    "mamba2": {"chunk_size": 4},
    "minimax": {"block_size": 4},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 1,
        "index_n_heads": 2,
    },
    "qwen4_exp_text": {"indexer_budget": 4, "indexer_n_heads": 32},
    "recurrent_gemma": {"attention_window_size": 4},
    "reformer": {"local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4},
    "xlstm": {"chunk_size": 8},
    "zamba2": {"chunk_size": 4},
}


@torch.no_grad()
def _spread_keep_scores(model: nn.Module) -> None:
    """Doge's `A` is zero at first, so that all keys have one score and `topk` breaks the tie."""
    for name, parameter in model.named_parameters():
        if name.endswith(".A"):
            parameter.normal_()


EDITS: Mapping[str, Callable[[nn.Module], None]] = {"doge": _spread_keep_scores}
