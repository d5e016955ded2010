"""Tiny models that count positions in different ways, and batches for them.

Every model has an input embedding and padding that would be heard if they were not told apart.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.hf_distill.trainers import models

VOCAB, PAD = 97, 0
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES: dict[str, Any] = COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
BERT: dict[str, Any] = SIZES | {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "is_decoder": True,
}
ROBERTA: dict[str, Any] = BERT | {"pad_token_id": 1, "bos_token_id": 0}
GPT: dict[str, Any] = COMMON | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SEQ2SEQ: dict[str, Any] = COMMON | {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 48,
    "decoder_attention_heads": 4,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "dropout": 0.0,
}


def _decoder_of(config: Any, **positions: int) -> Any:
    return config(**SEQ2SEQ, **positions)


# by family, what makes its model; learnt positions: how many tokens there are positions for
OWN: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            **COMMON,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            dropout=0.0,
        )
    ),
    "bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(**COMMON, hidden_size=32, n_layer=2, n_head=4)
    ),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(**COMMON, hidden_size=32, num_hidden_layers=2, state_size=8)
    ),
    "gptj": lambda: hf.GPTJForCausalLM(
        hf.GPTJConfig(**GPT, rotary_dim=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ),
}
BY_ID: dict[str, Callable[[], nn.Module]] = {
    "roberta": lambda: hf.RobertaForCausalLM(hf.RobertaConfig(**ROBERTA)),
    "roberta pre-norm": lambda: hf.RobertaPreLayerNormForCausalLM(
        hf.RobertaPreLayerNormConfig(**ROBERTA)
    ),
    "xmod": lambda: hf.XmodForCausalLM(hf.XmodConfig(**ROBERTA, default_language="en_XX")),
}
GIVEN: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(**GPT, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ),
    "bert": lambda: hf.BertLMHeadModel(hf.BertConfig(**BERT)),
    "biogpt": lambda: hf.BioGptForCausalLM(
        hf.BioGptConfig(
            **{k: v for k, v in BERT.items() if k != "is_decoder"}, activation_dropout=0.0
        )
    ),
    "xglm": lambda: hf.XGLMForCausalLM(
        hf.XGLMConfig(
            **COMMON, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, dropout=0.0
        )
    ),
}
NEITHER: dict[str, Callable[[], nn.Module]] = {
    "bart": lambda: hf.BartForCausalLM(_decoder_of(hf.BartConfig, max_position_embeddings=64)),
    "whisper": lambda: hf.WhisperForCausalLM(
        _decoder_of(hf.WhisperConfig, max_target_positions=64)
    ),
    "rwkv": lambda: hf.RwkvForCausalLM(
        hf.RwkvConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            attention_hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            context_length=64,
        )
    ),
    # padding has an embedding of its own as soon as the tied head is trained
    "recurrent gemma": lambda: hf.RecurrentGemmaForCausalLM(
        hf.RecurrentGemmaConfig(
            **SIZES | {"intermediate_size": 96, "num_hidden_layers": 3},
            num_key_value_heads=2,
            lru_width=32,
            head_dim=8,
        )
    ),
}
FAMILIES = OWN | BY_ID | GIVEN | NEITHER
LEARNT = dict.fromkeys(("opt", "gpt2", "bert", "biogpt", "bart", "whisper"), 64)
LEARNT |= dict.fromkeys(BY_ID, 62)  # two are for padding


def make(family: str, seed: int = 0) -> nn.Module:
    """Of large weights, so that what is read shows in the logits."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and 0 < float(parameter.std()) < 0.25:
                parameter.mul_(0.25 / parameter.std())
    return model.eval()


def rows(longest: int = 13) -> list[dict[str, list[int]]]:
    """Rows of three lengths, labelled from the third token on."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for length in (longest, 9, 6):
        ids = torch.randint(5, 90, (length,), generator=generator).tolist()
        labels = [-100, -100, *ids[2:]]
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return made


def batch(side: str, fill: int | None = None, width: int | None = None) -> dict[str, Tensor]:
    """ids and mask of the rows, padded with an id."""
    padded = models.Pad(side, width)(rows())
    del padded["labels"]
    if fill is not None:
        padded["input_ids"][padded["attention_mask"] == 0] = fill
    return padded


@torch.no_grad()
def alone(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Logits [n, V] of each row by itself, without a mask; of an empty row none."""
    pairs = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    rows = [ids[keep][None] for ids, keep in pairs]
    return [model(input_ids=x).logits[0] if x.numel() else torch.zeros(0, VOCAB) for x in rows]
