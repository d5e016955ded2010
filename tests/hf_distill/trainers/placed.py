"""Tiny masked LMs, token classifiers and sequence to sequence models, rows for them, runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    LlamaConfig,
    LlamaForTokenClassification,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForTokenClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_distill import DistillConfig, DistillTrainer
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.classifying import CALM, SIZES

CLASSES, MELS, FRAMES = 3, 4, 12
PLAIN = {k: v for k, v in SIZES.items() if k != "num_labels"}
SMALL = {"vocab_size": models.VOCAB, "pad_token_id": models.PAD, "bos_token_id": models.BOS}
SMALL |= {"eos_token_id": models.EOS, "decoder_start_token_id": models.PAD}
LAYERS = {"encoder_layers": 2, "decoder_layers": 2}
LAYERS |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
LAYERS |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
LAYERS |= dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)


def made(kind: Any, config: Any, factor: float = 5.0) -> Callable[..., nn.Module]:
    """A function of a seed, and of other sizes; weights so large that rows differ."""
    cls, sizes = config

    def make(seed: int = 0, **changes: Any) -> nn.Module:
        torch.manual_seed(seed)
        model = kind(cls(**sizes | changes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor if parameter.ndim > 1 else 1.0)
        return model.eval()

    return make


BERT, ROBERTA = (BertConfig, PLAIN | CALM), (RobertaConfig, PLAIN | CALM)
DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": models.VOCAB}
DISTIL |= {"max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
MODERN = (ModernBertConfig, PLAIN | {"eos_token_id": 2, "bos_token_id": 1, "cls_token_id": 1})
MODERN[1].update(sep_token_id=2, global_attn_every_n_layers=1)
MASKED = {
    "bert": made(BertForMaskedLM, BERT),
    "roberta": made(RobertaForMaskedLM, ROBERTA),
    "distilbert": made(DistilBertForMaskedLM, (DistilBertConfig, DISTIL)),
    "modernbert": made(ModernBertForMaskedLM, MODERN, 2.0),
}
LABELS = {"num_labels": CLASSES}
PLACES = {
    "bert": made(BertForTokenClassification, (BertConfig, BERT[1] | LABELS)),
    "modernbert": made(ModernBertForTokenClassification, (MODERN[0], MODERN[1] | LABELS), 2.0),
    "llama": made(LlamaForTokenClassification, (LlamaConfig, SIZES | {"classifier_dropout": 0.0})),
}
SEQ2SEQ = {
    "t5": made(T5ForConditionalGeneration, (T5Config, SMALL | T5), 1.0),
    "t5 untied": made(
        T5ForConditionalGeneration, (T5Config, SMALL | T5 | {"tie_word_embeddings": False}), 1.0
    ),
    "bart": made(BartForConditionalGeneration, (BartConfig, SMALL | LAYERS | {"d_model": 32})),
    "mbart": made(MBartForConditionalGeneration, (MBartConfig, SMALL | LAYERS | {"d_model": 32})),
    "marian": made(MarianMTModel, (MarianConfig, SMALL | LAYERS | {"d_model": 32})),
}
AUDIO = {"num_mel_bins": MELS, "max_source_positions": FRAMES // 2, "max_target_positions": 64}
whisper = made(
    WhisperForConditionalGeneration, (WhisperConfig, SMALL | LAYERS | AUDIO | {"d_model": 32})
)


def masked_rows(count: int = 16, seed: int = 0, classes: int = 0) -> list[dict[str, Any]]:
    """Rows of 4 to 14 ids, of which some have labels: tokens, or classes."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for row in models.rows(count, seed):
        length = len(row["input_ids"])
        values = torch.randint(3, models.VOCAB, (length,), generator=generator)
        values = values % classes if classes else values
        few = torch.rand(length, generator=generator) < 0.4
        few[0] = True  # the first token is labelled too: nothing is shifted
        rows.append(row | {"labels": values.masked_fill(~few, -100).tolist()})
    return rows


def pairs(count: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of inputs, and of labels of another length."""
    rows = [row | {"labels": row["input_ids"][2:]} for row in models.rows(count, seed)]
    others = models.rows(count, seed + 1, longest=9)
    return [
        row | {"labels": [*other["input_ids"], models.EOS]}
        for row, other in zip(rows, others, strict=True)
    ]


class Pad:
    """Pads inputs and labels, each to its own longest row; audio is as it is."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        found = {}
        fills = {"input_ids": models.PAD, "attention_mask": 0, "labels": -100}
        for name in (x for x in fills if x in rows[0]):
            width = max(len(row[name]) for row in rows)
            padded = [row[name] + [fills[name]] * (width - len(row[name])) for row in rows]
            found[name] = torch.tensor(padded)
        if "input_features" in rows[0]:
            found["input_features"] = torch.tensor([row["input_features"] for row in rows])
        return found


def heard(count: int = 16) -> list[dict[str, Any]]:
    """Rows of audio features and text."""
    generator = torch.Generator().manual_seed(5)
    return [
        {
            "labels": row["labels"],
            "input_features": torch.randn(MELS, FRAMES, generator=generator).tolist(),
        }
        for row in pairs(count)
    ]


def trainer(
    folder: Path, student: nn.Module, teacher: Any, data: Any, **changes: Any
) -> DistillTrainer:
    names = ("compute_metrics", "compute_loss_func", "data_collator", "eval_dataset")
    extra = {name: changes.pop(name) for name in names if name in changes}
    args = DistillConfig(**models.options(folder, divergence="forward_kl", **changes))
    collator = extra.pop("data_collator", None) or Pad()
    return DistillTrainer(student, args, collator, data, teacher=teacher, **extra)


def said(model: nn.Module, row: dict[str, Any]) -> Tensor:
    """[labelled, V] logits of a row alone, by the model's own forward, given its labels."""
    names = [x for x in ("input_ids", "attention_mask", "input_features") if x in row]
    given = {name: torch.tensor([row[name]]) for name in (*names, "labels")}
    return model(**given).logits[0][given["labels"][0] != -100]


def by_hand(
    student: nn.Module, teacher: nn.Module, data: Any, temperature: float, alpha: float
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Means over all labelled positions, in probability space, and the gradient of their mix."""
    student.zero_grad()
    soft, hard = [], []
    for row in data:
        z = said(student, row)
        with torch.no_grad():
            w = said(teacher, row)
        q, p = (z / temperature).softmax(-1), (w / temperature).softmax(-1)
        labels = torch.tensor([x for x in row["labels"] if x != -100])
        soft.append(temperature**2 * (p * (p / q).log()).sum(-1))
        hard.append(-z.log_softmax(-1).gather(-1, labels[:, None])[:, 0])
    both = torch.cat(soft), torch.cat(hard)
    (alpha * both[0].mean() + (1 - alpha) * both[1].mean()).backward()
    grads = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    found = {"soft": float(both[0].detach().mean()), "hard": float(both[1].detach().mean())}
    return found | {"tokens": float(len(both[0]))}, grads


Case = tuple[Any, list[dict[str, Any]]]
CASES: dict[str, Case] = {f"masked {x}": (make, masked_rows()) for x, make in MASKED.items()}
CASES |= {f"places {x}": (make, masked_rows(classes=CLASSES)) for x, make in PLACES.items()}
CASES |= {x: (make, pairs()) for x, make in SEQ2SEQ.items()}
CASES |= {"whisper": (whisper, heard())}
ONE_OF_A_KIND = ("masked bert", "places bert", "t5")
