"""Tiny random models by name, tokenizers, rows and a collator, for `tests.tiny_runs`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

VOCAB, CLASSES = 61, 3
PAD, BOS, EOS = 0, 1, 2
SIZES = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
TEXT = (
    "<pad> <s> <|im_end|> <|im_start|> <unk> system user assistant You are brief . What is "
    "1 2 3 4 5 6 7 8 9 + = ? The answer Hint : think first no yes so then , done add and get Sum of"
)
WORD_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' + m['content'] + ' <|im_end|> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)
LETTER_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)


def _spread(model: nn.Module, factor: float = 10.0) -> Any:
    """Weights so large that logits spread, as in a trained model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    return model.eval()


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A causal LM."""
    torch.manual_seed(seed)
    tokens = {"bos_token_id": BOS, "eos_token_id": EOS}
    return _spread(LlamaForCausalLM(LlamaConfig(**SIZES | tokens | changes)))


def talkative(seed: int = 0) -> LlamaForCausalLM:
    """A causal LM whose completions often end before their budget."""
    model = llama(seed)
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 1.6
    return model


def lora(**changes: Any) -> nn.Module:
    """A causal LM with adapters whose product is not zero."""
    model = llama()
    targets = ["q_proj", "v_proj", "up_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets, **changes)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return adapted


def gemma2(seed: int = 0) -> Gemma2ForCausalLM:
    """A causal LM whose softcap is low enough to bend its logits."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        **SIZES, head_dim=8, bos_token_id=BOS, eos_token_id=EOS, final_logit_softcapping=1.5
    )
    return _spread(Gemma2ForCausalLM(config))


def bert(seed: int = 0) -> BertForSequenceClassification:
    """A classifier that reads both ways."""
    torch.manual_seed(seed)
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**SIZES, num_labels=CLASSES, **calm)
    return _spread(BertForSequenceClassification(config))


def llama_classifier(seed: int = 0) -> LlamaForSequenceClassification:
    """A classifier that reads a row's last token."""
    torch.manual_seed(seed)
    return _spread(LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=CLASSES)))


def letter_reader() -> LlamaForCausalLM:
    """A causal LM of the letters' ids."""
    return llama(1, vocab_size=len(letters()), pad_token_id=1, eos_token_id=0, bos_token_id=None)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama-dropout": lambda: llama(attention_dropout=0.1),
    "llama-eager": lambda: llama(attn_implementation="eager"),
    "llama-bf16": lambda: llama().bfloat16(),
    "talkative": talkative,
    "lora": lora,
    "lora-dropout": lambda: lora(lora_dropout=0.1),
    "gemma2": gemma2,
    "bert": bert,
    "llama-classifier": llama_classifier,
    "other": lambda: llama(1),
    "other-eager": lambda: llama(1, num_hidden_layers=3, attn_implementation="eager"),
    "other-bf16": lambda: llama(1).bfloat16(),
    "other-deep": lambda: llama(1, num_hidden_layers=3),
    "other-wide": lambda: llama(1, hidden_size=48, num_hidden_layers=3),
    "other-padded": lambda: llama(1, vocab_size=VOCAB + 3),
    "other-letters": letter_reader,
    "other-gemma2": lambda: gemma2(1),
    "other-bert": lambda: bert(1),
    "other-llama-classifier": lambda: llama_classifier(1),
}


def _tokenizer(vocab: list[str], split: Any, template: str, **tokens: str) -> Any:
    made = Tokenizer(WordLevel({x: i for i, x in enumerate(vocab)}, unk_token="<unk>"))
    made.pre_tokenizer = split
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **tokens)
    fast.chat_template = template
    return fast


def words() -> PreTrainedTokenizerFast:
    """One id a word; <pad> 0, <|im_end|> 2 (the end token)."""
    split = pre_tokenizers.WhitespaceSplit()
    return _tokenizer(TEXT.split(), split, WORD_TEMPLATE, eos_token="<|im_end|>", pad_token="<pad>")


def letters() -> PreTrainedTokenizerFast:
    """One id a character; <end> 0, <fill> 1."""
    vocab = ["<end>", "<fill>", "<unk>", *sorted(set(TEXT) | {"\n"})]
    split = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return _tokenizer(vocab, split, LETTER_TEMPLATE, eos_token="<end>", pad_token="<fill>")


def id_rows(count: int, seed: int, weighted: bool = False) -> list[dict[str, Any]]:
    """Rows of 4 to 14 random ids, up to three of which have no label; of two domains."""
    generator = torch.Generator().manual_seed(seed)
    made: list[dict[str, Any]] = []
    for i in range(count):
        length = int(torch.randint(4, 15, (), generator=generator))
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        start = int(torch.randint(0, 4, (), generator=generator))
        row = {"input_ids": ids, "attention_mask": [1] * length}
        row["labels"] = [-100] * start + ids[start:]
        row["domain"] = "even" if i % 2 == 0 else "odd"
        if weighted:
            row["token_weights"] = [0.25 * ((i + k) % 6) for k in range(length)]
        made.append(row)
    return made


def class_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of random ids with a class each, but for every fourth."""
    made = id_rows(count, seed)
    for i, row in enumerate(made):
        half = len(row["input_ids"]) // 2
        row["token_type_ids"] = [0] * half + [1] * (len(row["input_ids"]) - half)
        row["labels"] = -100 if i % 4 == 0 else row["input_ids"][0] % CLASSES
    return made


def problems(count: int, seed: int, chat: bool = False) -> list[dict[str, Any]]:
    """Rows with prompt, hint and completion, whose lengths differ."""
    made = []
    for i in range(seed, seed + count):
        a, b = 1 + i % 4, 1 + (i * 3) % 5
        text = f"What is {a} + {b} ?" if i % 3 else f"You are brief . Sum of {a} and {b} ?"
        hint = f"Hint : {a + b}" if i % 2 else f"think first , {a} and {b} get {a + b} , done ."
        prompt = [{"role": "user", "content": text}] if chat else text
        completion = f"The answer is {a + b} ." if i % 4 else f"{a + b}"
        made.append({"prompt": prompt, "hint": hint, "completion": completion})
    return made


class Pad:
    """A collator that pads on the right."""

    fills: ClassVar = {"input_ids": PAD, "labels": -100, "token_weights": 1.0}

    def __call__(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in batch)
        padded = {}
        for name in (x for x in batch[0] if x != "domain"):
            values, fill = [row[name] for row in batch], [self.fills.get(name, 0)]
            if isinstance(values[0], list):
                values = [value + fill * (width - len(value)) for value in values]
            padded[name] = torch.tensor(values)
        return padded
