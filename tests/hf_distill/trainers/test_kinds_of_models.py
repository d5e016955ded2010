"""Models that cannot be a student or a teacher, and the words of their errors."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertLMHeadModel,
    LlamaForTokenClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    T5ForQuestionAnswering,
    T5Model,
)

from hf_distill import DistillConfig, DistillTrainer, OPSDConfig, OPSDTrainer, RoutedTeacher
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)


def of_bert(kind: Any, **changes: Any) -> nn.Module:
    sizes = {k: v for k, v in models.SIZES.items() if k != "num_key_value_heads"}
    return kind(BertConfig(**sizes, **changes))


def encoder_decoder() -> nn.Module:
    config = T5Config(vocab_size=61, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
    return T5ForConditionalGeneration(config)


NO_CAUSAL_LMS: dict[str, tuple[Any, str]] = {
    "of questions": (
        lambda: of_bert(BertForQuestionAnswering),
        "must be a causal LM, a sequence classifier, .* got a BertForQuestionAnswering",
    ),
    "an encoder-decoder of questions": (
        lambda: T5ForQuestionAnswering(encoder_decoder().config),
        "must be a causal LM, .* got a T5ForQuestionAnswering",
    ),
    "an encoder-decoder without a head": (
        lambda: T5Model(encoder_decoder().config),
        r"must give logits, got an encoder-decoder without a head \(T5Model\)",
    ),
    "no head": (
        lambda: LlamaModel(models.llama().config),
        "must give logits of the next token.*SentenceTransformerTrainer",
    ),
    "no decoder": (lambda: of_bert(BertLMHeadModel), "must predict each token from those before"),
}


@pytest.mark.parametrize("whose", ["student", "teacher", "routed"])
@pytest.mark.parametrize("case", NO_CAUSAL_LMS)
def test_models_that_are_no_causal_lms(tmp_path: Path, case: str, whose: str) -> None:
    make, message = NO_CAUSAL_LMS[case]
    student = make() if whose == "student" else models.llama()
    teacher: Any = models.llama(1) if whose == "student" else make()
    if whose == "routed":
        teacher = RoutedTeacher({"good": models.llama(1), "bad": teacher}, "which")
    rows = [row | {"which": "bad"} for row in models.rows()]
    name = "student" if whose == "student" else "teacher"
    args = DistillConfig(**models.options(tmp_path, remove_unused_columns=False))
    with pytest.raises(ValueError, match=f"the {name} {message}"):
        DistillTrainer(student, args, models.Pad(), rows, teacher=teacher).train()


OTHERS = {
    "seq2seq": (encoder_decoder, "a sequence to sequence model"),
    "masked": (lambda: of_bert(BertForMaskedLM), "a masked LM"),
    "places": (lambda: LlamaForTokenClassification(models.llama().config), "a token classifier"),
}


@pytest.mark.parametrize("whose", ["student", "teacher", "routed"])
@pytest.mark.parametrize("case", OTHERS)
def test_both_are_of_one_kind(tmp_path: Path, case: str, whose: str) -> None:
    make, kind = OTHERS[case]
    student = make() if whose == "student" else models.llama()
    teacher: Any = models.llama(1) if whose == "student" else make()
    if whose == "routed":
        teacher = RoutedTeacher({"good": models.llama(1), "bad": teacher}, "which")
    plain = "a causal LM"
    both = (kind, plain) if whose == "student" else (plain, kind)
    args = DistillConfig(**models.options(tmp_path))
    message = f"must be of one kind, got {both[0]} .* as student and {both[1]} .* as teacher"
    with pytest.raises(ValueError, match=message):
        DistillTrainer(student, args, models.Pad(), models.rows(), teacher=teacher)


@pytest.mark.parametrize("on_policy", [False, True])
def test_a_student_that_reads_later_tokens_has_no_hints(tmp_path: Path, on_policy: bool) -> None:
    settings = {"max_completion_length": 8, "on_policy": on_policy}
    args = OPSDConfig(**models.options(tmp_path, **settings))
    student, tokenizer = of_bert(BertLMHeadModel), models.tokenizer()
    trainer = OPSDTrainer(student, args, None, models.problems(), processing_class=tokenizer)
    with pytest.raises(ValueError, match="the student must predict each token from those before"):
        trainer.train()


def test_a_decoder_of_the_same_class_is_taken(tmp_path: Path) -> None:
    args = DistillConfig(**models.options(tmp_path, max_steps=1))
    student, teacher = (of_bert(BertLMHeadModel, is_decoder=True) for _ in range(2))
    DistillTrainer(student, args, models.Pad(), models.rows(), teacher=teacher).train()
