"""Tiny models of causal-LM types, from configs made by the names of their fields."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.sweeps.difficult import CHANGES, EDITS, WINDOWS

VOCAB, LAYERS, POSITIONS = 97, 2, 128
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STD = 0.25  # of weights, so that logits spread as in a trained model
NAMES: tuple[tuple[int, str], ...] = (
    (VOCAB, "vocab_size decoder_vocab_size vocab_size_per_layer_input"),
    (VOCAB, "pronunciation_vocab_size shape_vocab_size"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers"),
    (LAYERS, "num_encoder_layers num_decoder_layers num_blocks"),
    (POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length"),
    (POSITIONS, "context_length max_target_positions max_source_positions"),
    (32, "hidden_size d_model n_embd dim emb_dim embedding_dim embedding_size lru_width"),
    (32, "word_embed_proj_dim input_embedding_size output_embedding_size dim_model_base"),
    (32, "pronunciation_embed_dim shape_embed_dim"),
    (48, "intermediate_size n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim dff dim_ff d_inner"),
    (48, "feed_forward_size ffn_hidden_size intermediate_size_mlp dense_intermediate_size"),
    (16, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"),
    (16, "expert_ffn_hidden_size moe_shared_expert_intermediate_size kv_lora_rank q_lora_rank"),
    (16, "shared_experts_intermediate_size router_hidden_size o_lora_rank qk_head_dim"),
    (16, "state_size mamba_d_state ssm_state_size mamba_d_head mamba_head_dim linear_head_dim"),
    (16, "mamba_headdim laurel_rank hc_lowrank hidden_size_per_layer_input mamba_chunk_size"),
    (16, "chunk_size prompt_mid_dim gated_norm_rank time_step_rank mamba_dt_rank"),
    (8, "head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim index_head_dim swa_head_dim"),
    (8, "linear_key_head_dim linear_value_head_dim attention_head_dim attention_head_size"),
    (8, "d_head dim_head kv_channels rotary_dim adapter_rank ple_embed_dim d_rel"),
    (4, "num_attention_heads n_head n_heads num_heads encoder_attention_heads attention_heads"),
    (4, "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num"),
    (4, "linear_num_value_heads linear_num_heads swa_num_attention_heads n_mamba_heads"),
    (4, "mamba_n_heads mamba_num_heads index_n_heads"),
    (2, "num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_topk"),
    (2, "moe_k linear_num_key_heads swa_num_key_value_heads num_query_groups"),
    (1, "n_group topk_group num_expert_group first_k_dense_replace num_dense_layers"),
    (1, "n_groups mamba_n_groups mamba_ngroups decoder_sparse_step"),
)
SIZES = {name: value for value, names in NAMES for name in names.split()}
CHANCES = ("drop", "jitter")  # in names of settings that make a forward random


def types() -> list[str]:
    """The types that the installed Transformers maps to a causal LM."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _cut(values: Sequence[Any], count: int) -> list[Any]:
    """So many entries, of as many kinds as there are."""
    kinds = list({repr(x): x for x in values}.values())
    return (kinds + [kinds[-1]] * count)[:count]


def _small(default: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for a config that is as `default`, but small."""
    given = {k: v for k, v in vars(default).items() if v is not None and not k.startswith("_")}
    found: dict[str, Any] = {name: SIZES[name] for name in given if name in SIZES}
    if hasattr(default, "is_decoder"):
        found["is_decoder"] = True  # encoders that can be decoders see later tokens without it
    found |= {name: value for name, value in TOKENS.items() if hasattr(default, name)}
    if "kv_lora_rank" in given and "num_key_value_heads" in given:
        found["num_key_value_heads"] = SIZES["num_attention_heads"]
    layers = next((given[n] for n in NAMES[2][1].split() if n in given), None)
    for name, value in given.items():
        if isinstance(value, float) and any(word in name for word in CHANCES):
            found[name] = 0.0
        if isinstance(value, list | tuple) and layers and len(value) == layers:
            found[name] = _cut(value, changes.get("num_hidden_layers", LAYERS))
    return found


def small_config(made: type[Any], changes: Mapping[str, Any]) -> Any:
    """A small config; `changes` of a part are a mapping under the part's name."""
    default, parts = made(), {}
    for name in made.sub_configs:
        part, inner = getattr(default, name, None), changes.get(name, {})
        if isinstance(part, PreTrainedConfig) and isinstance(inner, Mapping):
            parts[name] = small_config(type(part), inner)
    plain = {k: v for k, v in changes.items() if k not in parts}
    return made(**_small(default, plain) | parts | plain)


def config(kind: str, windows: bool = False) -> Any:
    """A tiny config of a type; with `windows`, those are shorter than the sweep's rows."""
    changes = CHANGES.get(kind, {}) | (WINDOWS.get(kind, {}) if windows else {})
    return small_config(CONFIG_MAPPING[kind], changes)


@torch.no_grad()
def spread(model: nn.Module) -> nn.Module:
    """Weights large enough that logits spread; in evaluation mode."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and 0 < (std := float(parameter.std())) < STD:
            parameter.mul_(STD / std)
    return model.eval()


def model(kind: str, seed: int = 0, windows: bool = False) -> Any:
    """A tiny float32 model of a type, whose weights depend on the seed."""
    torch.manual_seed(seed)
    lm = spread(AutoModelForCausalLM.from_config(config(kind, windows)).float())
    if kind in EDITS:
        EDITS[kind](lm)
    return lm
