"""Tiny random models, rows of uneven lengths, and a training run that returns the final weights."""

import copy
import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

# PEFT 0.21 reads a property that Transformers 5.23 has renamed
PEFT_WARNING = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"

# The Trainer collects garbage before each run: 0.3 s, nearly all of it over the imported libraries
gc.freeze()

VOCAB = 61
PAD, BOS, EOS = 0, 1, 2
BASE = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SIZES = BASE | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _spread(model: nn.Module) -> nn.Module:
    """Weights large enough that logits spread, as in a trained model; biases that are not zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model.eval()


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return _spread(LlamaForCausalLM(LlamaConfig(**SIZES | changes)))


def tied(seed: int = 0) -> LlamaForCausalLM:
    return llama(seed, tie_word_embeddings=True)


def gemma2(seed: int = 0) -> Gemma2ForCausalLM:
    """Its softcap is low enough to bend the logits."""
    torch.manual_seed(seed)
    config = Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=1.5)
    return _spread(Gemma2ForCausalLM(config))


def granite(seed: int = 0) -> GraniteForCausalLM:
    torch.manual_seed(seed)
    return _spread(GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=1.5)))


def cohere(seed: int = 0) -> CohereForCausalLM:
    torch.manual_seed(seed)
    return _spread(CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.6)))


def phi(seed: int = 0) -> PhiForCausalLM:
    """Its head has a bias."""
    torch.manual_seed(seed)
    sizes = SIZES | {"num_key_value_heads": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return _spread(PhiForCausalLM(PhiConfig(**sizes)))


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Its positions are learnt."""
    torch.manual_seed(seed)
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(**BASE, n_embd=32, n_layer=2, n_head=4, n_positions=64, **no_dropout)
    return _spread(GPT2LMHeadModel(config))


FAMILIES = {f.__name__: f for f in (llama, tied, gemma2, granite, cohere, phi, gpt2)}


def lora(model: nn.Module, seed: int = 0, **changes: Any) -> nn.Module:
    """The model with adapters whose product is not zero: base and student differ from step 0."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options | changes))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return adapted


def rows(
    count: int = 16, seed: int = 0, longest: int = 14, ignored: int = 0
) -> list[dict[str, list[int]]]:
    """Token rows of 4 to `longest` ids whose first `ignored` to 3 labels are ignored."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(4, longest + 1, (), generator=generator))
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        start = int(torch.randint(ignored, 4, (), generator=generator))
        labels = [-100] * start + ids[start:]
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return made


class Pad:
    """A collator that pads on one side, to the longest row or to `width`."""

    def __init__(self, side: str = "right", width: int | None = None) -> None:
        self.side, self.width = side, width

    def __call__(self, batch: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        width = self.width or max(len(row["input_ids"]) for row in batch)
        padded = {}
        for name, value in (("input_ids", PAD), ("attention_mask", 0), ("labels", -100)):
            fill = [[value] * (width - len(row[name])) for row in batch]
            pairs = zip(batch, fill, strict=True)
            if self.side == "right":
                padded[name] = torch.tensor([[*row[name], *gap] for row, gap in pairs])
            else:
                padded[name] = torch.tensor([[*gap, *row[name]] for row, gap in pairs])
        return padded


def options(folder: Path | str, **changes: Any) -> dict[str, Any]:
    """Arguments of a few steps on the CPU; rows in order, constant rate, no reports."""
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        # Adam divides by sqrt(v) + epsilon: with the default 1e-8, gradients that are zero but for
        # rounding (a key bias) would move weights by a tenth of the learning rate. With this one an
        # error of a gradient moves them by at most ten times itself a step: 6e-7 where it is 2^-24,
        # that of gradients below 1, to which their norm is clipped
        "adam_epsilon": 1e-4,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    } | changes


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest absolute difference of two sets of weights."""
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def steps(trainer: Any) -> list[dict[str, float]]:
    """The logs of a run's steps, without what is measured from where it was resumed."""
    since = ("ema_moved", "ema_distance", "teacher_drift", "teacher_moved")
    return [
        {name: value for name, value in log.items() if name not in since}
        for log in trainer.state.log_history
        if "loss" in log
    ]


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


# A word-level tokenizer with a template in the style of ChatML
TEXT = (
    "<pad> <s> <|im_end|> <|im_start|> <unk> system user assistant You are brief . What is "
    "1 2 3 4 5 6 7 8 9 + = ? The answer Hint : think first no yes so then , done add and get Sum of"
)
WORDS = TEXT.split()
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' + m['content'] + ' <|im_end|> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}"
    "{% if think %}{{ 'think ' }}{% endif %}{% endif %}"
)


def tokenizer(pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    """Its ids: <pad> 0, <s> 1, <|im_end|> 2 (end token); one id per word."""
    vocab = {word: i for i, word in enumerate(WORDS)}
    assert len(vocab) == len(WORDS) <= VOCAB
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>" if pad_is_eos else "<pad>",
    )
    made.chat_template = TEMPLATE
    return made


def problems(count: int = 16, chat: bool = False) -> list[dict[str, Any]]:
    """Rows with prompt, hint and completion; their lengths differ."""
    made = []
    for i in range(count):
        a, b = 1 + i % 4, 1 + (i * 3) % 5
        text = f"What is {a} + {b} ?" if i % 3 else f"You are brief . Sum of {a} and {b} ?"
        hint = f"Hint : {a + b}" if i % 2 else f"think first , {a} and {b} get {a + b} , done ."
        prompt = [{"role": "user", "content": text}] if chat else text
        completion = f"The answer is {a + b} ." if i % 4 else f"{a + b}"
        made.append({"prompt": prompt, "hint": hint, "completion": completion})
    return made
