"""Tiny random classifiers, rows of uneven lengths with a class each, and runs over them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_distill import DistillConfig, DistillTrainer
from tests.hf_distill.trainers import models

CLASSES = 3
SUM_ERROR = 1e-5  # relative, of a float32 mean over rows; measured: 6e-7
SIZES = {
    "vocab_size": models.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": models.PAD,
    "num_labels": CLASSES,
}
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _seeded(make: Callable[[], nn.Module], seed: int) -> Any:
    """Weights so large that rows differ, and are not near to uniform over the classes."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                is_last = name in ("classifier.weight", "classifier.out_proj.weight")
                parameter.mul_(40 if is_last else 5)
    return model.eval()


def bert(seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    config = BertConfig(**SIZES | CALM | changes)
    return _seeded(lambda: BertForSequenceClassification(config), seed)


def roberta(seed: int = 0, **changes: Any) -> RobertaForSequenceClassification:
    config = RobertaConfig(**SIZES | CALM | changes)
    return _seeded(lambda: RobertaForSequenceClassification(config), seed)


def llama(seed: int = 0, **changes: Any) -> LlamaForSequenceClassification:
    config = LlamaConfig(**SIZES | changes)
    return _seeded(lambda: LlamaForSequenceClassification(config), seed)


def distilbert(seed: int = 0, **changes: Any) -> DistilBertForSequenceClassification:
    """It does not take token_type_ids."""
    none = dict.fromkeys(("dropout", "attention_dropout", "seq_classif_dropout"), 0.0)
    sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "num_labels": CLASSES}
    sizes |= {"vocab_size": models.VOCAB, "max_position_embeddings": 64} | none
    config = DistilBertConfig(**sizes | changes)
    return _seeded(lambda: DistilBertForSequenceClassification(config), seed)


FAMILIES = {f.__name__: f for f in (bert, distilbert, roberta, llama)}


def rows(count: int = 16, seed: int = 0, unlabelled: int = 0) -> list[dict[str, Any]]:
    """Token rows of 4 to 14 ids; of the first `unlabelled` of every four the label is -100."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        length = int(torch.randint(4, 15, (), generator=generator))
        ids = torch.randint(3, models.VOCAB, (length,), generator=generator).tolist()
        label = int(torch.randint(0, CLASSES, (), generator=generator))
        second = [0] * (length // 2) + [1] * (length - length // 2)
        made.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * length,
                "token_type_ids": second,
                "label": -100 if i % 4 < unlabelled else label,
            }
        )
    return made


def collator() -> DataCollatorWithPadding:
    tokenizer = models.tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask", "token_type_ids"]
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    return DataCollatorWithPadding(tokenizer)


def trainer(
    folder: Path,
    model: nn.Module | None = None,
    teacher: Any = None,
    data: Any = None,
    **changes: Any,
) -> DistillTrainer:
    names = ("callbacks", "compute_metrics", "compute_loss_func", "data_collator")
    extra = {name: changes.pop(name) for name in names if name in changes}
    return DistillTrainer(
        bert() if model is None else model,
        DistillConfig(**models.options(folder, **changes)),
        extra.pop("data_collator", None) or collator(),
        rows() if data is None else data,
        rows(6, seed=1),
        teacher=bert(1) if teacher is None else teacher,
        **extra,
    )


def trained(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The student's final weights."""
    made = trainer(*args, **kwargs)
    made.train()
    return models.weights(made.model)


def said(model: nn.Module, row: dict[str, Any]) -> Tensor:
    """[C] logits in float64 of one row, without padding."""
    names = ["input_ids", "attention_mask"]
    names += ["token_type_ids"] if type(model).__name__.startswith(("Bert", "Roberta")) else []
    with torch.no_grad():
        return model.double()(**{name: torch.tensor([row[name]]) for name in names}).logits[0]


def by_hand(
    student: nn.Module, teacher: nn.Module, data: list[dict[str, Any]], temperature: float
) -> dict[str, float]:
    """soft over all rows, hard over the labelled ones, agreement; in probability space."""
    soft, hard, same = [], [], []
    for row in data:
        z, w = said(student, row), said(teacher, row)
        q, p = (z / temperature).softmax(-1), (w / temperature).softmax(-1)
        soft.append(temperature**2 * float((p * (p / q).log()).sum()))
        same.append(float(z.argmax() == w.argmax()))
        if row.get("label", -100) != -100:
            hard.append(-float(z.softmax(-1)[row["label"]].log()))
    found = {"soft": np.mean(soft), "top1_agreement": np.mean(same), "rows": len(data)}
    return found | ({"hard": np.mean(hard)} if hard else {})


def close(logs: dict[str, Any], want: dict[str, float]) -> None:
    assert {name: logs[name] for name in want} == pytest.approx(want, rel=SUM_ERROR)
