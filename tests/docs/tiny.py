"""Tiny models in folders that have the names of the models that the pages use."""

from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

CHARACTERS = [chr(i) for i in range(32, 127)] + ["\n"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
IMAGE_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
CAUSAL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
BERT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def tokenizer(end: str, backwards: bool = False) -> PreTrainedTokenizerFast:
    """One id per character; the end token is id 1."""
    tokens = ["<pad>", end, "<unk>", *(CHARACTERS[::-1] if backwards else CHARACTERS)]
    words = Tokenizer(models.WordLevel({x: i for i, x in enumerate(tokens)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token=end, unk_token="<unk>"
    )
    made.chat_template = TEMPLATE
    return made


def causal_lm(seed: int, num_layers: int) -> LlamaForCausalLM:
    """Weights large enough that logits spread."""
    torch.manual_seed(seed)
    ids = {"vocab_size": len(CHARACTERS) + 3, "pad_token_id": 0, "eos_token_id": 1}
    config = LlamaConfig(**CAUSAL, **ids, num_hidden_layers=num_layers, bos_token_id=None)
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return made


def save_llava(folder: Path, seed: int) -> None:
    """An image-text model with its processor; an image is four tokens."""
    words = tokenizer("</s>")
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    words.chat_template = IMAGE_TEMPLATE
    size = {"height": 8, "width": 8}
    images = LlavaImageProcessorPil(size=size, crop_size=size)
    given: dict[str, Any] = {"patch_size": 4, "vision_feature_select_strategy": "full"}
    made = LlavaProcessor(images, words, chat_template=IMAGE_TEMPLATE, **given)
    text = CAUSAL | {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": len(words)}
    tower = CAUSAL | {"model_type": "siglip_vision_model", "num_hidden_layers": 1}
    tower |= {"image_size": 8, "patch_size": 4, "vision_use_head": False}
    chosen = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    image_token_id = words.convert_tokens_to_ids("<image>")
    torch.manual_seed(seed)
    given = {"vision_config": tower, "text_config": text, "image_token_index": image_token_id}
    config = LlavaConfig(**cast(Any, given | chosen))
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    made.save_pretrained(folder)


def save_all(folder: Path) -> None:
    """Write every model that a page names; `from_pretrained` takes a folder before the hub."""
    texts, others = tokenizer("</s>"), tokenizer("<end>", backwards=True)
    masks = tokenizer("</s>")
    masks.mask_token = "<unk>"
    sizes = {"vocab_size": len(texts), "num_labels": 3, "pad_token_id": 0}
    student: Any = DistilBertConfig(dim=16, hidden_dim=32, n_heads=2, n_layers=1, **sizes)
    made = {
        "Qwen/Qwen2.5-0.5B-Instruct": (causal_lm(0, 1), texts),
        "Qwen/Qwen2.5-1.5B-Instruct": (causal_lm(1, 2), texts),
        "HuggingFaceTB/SmolLM2-1.7B-Instruct": (causal_lm(2, 1), others),
        "distilbert-base-uncased": (DistilBertForSequenceClassification(student), masks),
        "textattack/bert-base-uncased-MNLI": (
            BertForSequenceClassification(BertConfig(**BERT, num_hidden_layers=1, **sizes)),
            texts,
        ),
    }
    masked = BertForMaskedLM(BertConfig(**BERT, num_hidden_layers=2, **sizes))
    made["google-bert/bert-base-uncased"] = masked, masks
    for seed, size in enumerate(("0.5b", "7b")):
        save_llava(folder / f"llava-hf/llava-interleave-qwen-{size}-hf", seed)
    for name, (model, words) in made.items():
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
