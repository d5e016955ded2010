"""What has no meaning for classifiers, and the words of the errors; teachers given by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
)

from hf_distill import (
    CachedTeacher,
    DistillConfig,
    DistillTrainer,
    HintCollator,
    ModelTeacher,
    OPSDConfig,
    OPSDTrainer,
    RemoteTeacher,
    RoutedTeacher,
    SelfTeacher,
    cache_teacher,
)
from tests.hf_distill.trainers import classifying, models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

NAMES = ["negative", "neutral", "positive"]


def named(names: list[str], seed: int = 1) -> nn.Module:
    ids = dict(enumerate(names))
    return classifying.bert(seed, id2label=ids, label2id={v: k for k, v in ids.items()})


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            classifying.bert,
            lambda: classifying.roberta(1, num_labels=4),
            r"same classes, got 3 for the student \(BertForSequenceClassification\) and 4 for the "
            r"teacher \(RobertaForSequenceClassification\)",
        ),
        (
            lambda: named(NAMES),
            lambda: named(["NEGATIVE", "POSITIVE", "NEUTRAL"]),
            r"number their classes alike, got id2label \['negative', 'neutral', 'positive'\] for "
            r"the student and \['NEGATIVE', 'POSITIVE', 'NEUTRAL'\] for the teacher",
        ),
        (
            lambda: named(NAMES),
            lambda: named(["positive", "else", "none"]),
            "number their classes alike",
        ),
        (
            classifying.bert,
            lambda: models.llama(1),
            r"\(BertForSequenceClassification\) as student and .* \(LlamaForCausalLM\) as teacher",
        ),
        (
            models.llama,
            lambda: classifying.llama(1),
            r"\(LlamaForCausalLM\) as student and .* \(LlamaForSequenceClassification\)",
        ),
    ],
)
def test_teachers_of_other_classes(
    tmp_path: Path, student: Any, teacher: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        classifying.trainer(tmp_path, student(), teacher())


@pytest.mark.parametrize(
    ("names", "warned"),
    [
        (["Negative", "NEUTRAL", "positive"], ""),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ""),
        (["bad", "neutral", "good"], "name their classes differently"),
    ],
)
def test_names_that_may_be_right(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: list[str], warned: str
) -> None:
    classifying.trainer(tmp_path, named(NAMES, 0), named(names))
    assert ("name their classes" in caplog.text) == bool(warned)
    assert warned in caplog.text


def test_other_vocabularies_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    classifying.trainer(tmp_path, teacher=classifying.bert(1, vocab_size=70))
    assert "vocabularies of 61 and 70 entries" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"problem_type": "regression"},
            "problem_type must be 'single_label_classification': .* got 'regression'",
        ),
        ({"num_labels": 1}, "got 'regression'"),
        ({"problem_type": "multi_label_classification"}, "got 'multi_label_classification'"),
    ],
)
def test_other_problems(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classifying.trainer(tmp_path, classifying.bert(**changes))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.rand(4), r"numbers of classes, .* got torch.float32 of shape \[4\], which means r"),
        (torch.ones(4, 3), r"of shape \[4, 3\], which means multi_label_classification"),
        (
            torch.ones(4, 9, dtype=torch.long),
            r"labels of a classifier must have shape \[4\], .* got \[4, 9\]",
        ),
    ],
)
def test_labels_of_other_problems(tmp_path: Path, labels: Any, message: str) -> None:
    trainer = classifying.trainer(tmp_path)
    batch = classifying.collator()(classifying.rows(4)) | {"labels": labels}
    with pytest.raises(ValueError, match=message):
        trainer.compute_loss(trainer.model, batch)


def test_a_class_number_in_a_column_of_its_own(tmp_path: Path) -> None:
    """[B, 1] integers are one class a row, as Transformers reads them."""
    trainer, batch = classifying.trainer(tmp_path), classifying.collator()(classifying.rows(4))
    one = trainer.compute_loss(trainer.model, batch)
    column = dict(batch) | {"labels": batch["labels"][:, None]}
    assert torch.equal(one, trainer.compute_loss(trainer.model, column))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_no_labels(tmp_path: Path, alpha: float) -> None:
    data = [{k: v for k, v in row.items() if k != "label"} for row in classifying.rows()]
    message = f"alpha {alpha} < 1 needs labels, got a batch without 'labels'; set alpha=1"
    with pytest.raises(ValueError, match=message):
        classifying.trainer(tmp_path, data=data, alpha=alpha).train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_layers": "last"},
            "hidden_layers are about tokens, of which a clas",
        ),
        ({"divergence": "k3"}, "divergence 'k3' is one of tokens, sampled or"),
        ({"divergence": "policy_gradient"}, "divergence 'policy_gradient' is one of tokens"),
        ({"divergence": "uld"}, "divergence 'uld' is one of tokens"),
        ({"data_collator": HintCollator(models.tokenizer())}, "a HintCollator makes rows of sc"),
        (
            {"label_names": ["start", "end"]},
            r"one key of the labels that are learnt, .* got label_names",
        ),
        (
            {"teacher": RemoteTeacher("http://localhost:1", "m", 5), "temperature": 1.0},
            "a RemoteTeacher knows tokens of a vocabulary",
        ),
        (
            {"teacher": RoutedTeacher({"a": RemoteTeacher("http://localhost:1", "m", 5)}, "c")},
            "a RemoteTeacher knows tokens",
        ),
    ],
)
def test_settings_without_meaning(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classifying.trainer(tmp_path, **changes)


def test_weights_by_class_of_token(tmp_path: Path) -> None:
    config = DistillConfig(**models.options(tmp_path, token_weights={"number": 2.0}))
    kwargs = {"teacher": classifying.bert(1), "processing_class": models.tokenizer()}
    with pytest.raises(ValueError, match="token_weights are about tokens, of which a class"):
        DistillTrainer(classifying.bert(), config, classifying.collator(), **kwargs)


def test_a_cached_teacher(tmp_path: Path) -> None:
    rows = models.rows(4)
    cache_teacher(models.llama(1), rows, tmp_path / "cache", data_collator=models.Pad())
    with pytest.raises(ValueError, match="a CachedTeacher knows tokens of a vocabulary"):
        classifying.trainer(tmp_path, teacher=CachedTeacher(tmp_path / "cache"))


@pytest.mark.parametrize("on_policy", [True, False])
def test_opsd(tmp_path: Path, on_policy: bool) -> None:
    config = OPSDConfig(**models.options(tmp_path, on_policy=on_policy))
    message = "an OPSDTrainer samples completions and needs a causal LM, got a LlamaForSequenceC"
    with pytest.raises(ValueError, match=message):
        OPSDTrainer(
            classifying.llama(),
            config,
            train_dataset=models.problems(),
            processing_class=models.tokenizer(),
        )


@pytest.mark.parametrize("key", ["token_weights", "teacher_input_ids"])
def test_batches_about_tokens(tmp_path: Path, key: str) -> None:
    trainer = classifying.trainer(tmp_path)
    batch = classifying.collator()(classifying.rows(4))
    batch[key] = torch.ones_like(batch["input_ids"])
    with pytest.raises(ValueError, match=f"rows for student and teacher alike, got {key}"):
        trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForTokenClassification])
def test_students_of_other_tasks(tmp_path: Path, kind: type) -> None:
    student = kind(BertConfig(**classifying.SIZES))
    with pytest.raises(ValueError, match=rf"one kind, got a .* \({kind.__name__}\) as student"):
        classifying.trainer(tmp_path, student, models.llama(1))


@pytest.mark.parametrize("kind", ["prompt learning", "encoder and decoder"])
def test_refused_for_causal_lms_and_right_for_classifiers(tmp_path: Path, kind: str) -> None:
    if kind == "prompt learning":
        config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
        student = get_peft_model(classifying.bert(), config)
    else:
        sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_labels": 3}
        sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0}
        sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": models.VOCAB}
        student = BartForSequenceClassification(BartConfig(**sizes))
    data = classifying.rows()
    for row in data:  # BART reads the class at the end token
        row["input_ids"][-1] = 2
    before = models.weights(student)
    trainer = classifying.trainer(tmp_path, student, data=data, max_steps=2)
    trainer.train()
    assert models.difference(before, models.weights(trainer.model)) > 1e-4
    assert trainer.state.log_history[0]["rows"] == 4


@pytest.mark.parametrize("how", ["name", "teacher"])
def test_a_name_is_loaded_as_what_it_is(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "teacher"
    classifying.bert(1).save_pretrained(folder)
    teacher = str(folder) if how == "name" else ModelTeacher(str(folder), dtype="float64")
    by_name = classifying.trained(tmp_path, teacher=teacher)
    other = classifying.bert(1) if how == "name" else classifying.bert(1).double()
    assert models.difference(by_name, classifying.trained(tmp_path, teacher=other)) == 0.0


@pytest.mark.parametrize("folder", ["base model", "other classes"])
def test_a_name_of_a_teacher_that_was_not_trained(tmp_path: Path, folder: str) -> None:
    model = classifying.bert(1)
    if folder == "base model":
        model.bert.save_pretrained(tmp_path / "teacher")
        config = BertConfig.from_pretrained(tmp_path / "teacher")
        config.architectures = ["BertForSequenceClassification"]
        config.save_pretrained(tmp_path / "teacher")
    else:
        model.save_pretrained(tmp_path / "teacher")
    more = {} if folder == "base model" else {"num_labels": 5, "ignore_mismatched_sizes": True}
    with pytest.raises(ValueError, match=r"trained, but '.*teacher' has no weights for .*classif"):
        ModelTeacher(str(tmp_path / "teacher"), **more)


def test_a_name_of_a_causal_lm_is_no_classifier(tmp_path: Path) -> None:
    models.llama(1).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"\(LlamaForCausalLM\) as teacher"):
        classifying.trainer(tmp_path, classifying.llama(), str(tmp_path / "teacher"))


@pytest.mark.parametrize("kind", ["base", "ema", "live"])
def test_self_teachers(tmp_path: Path, kind: str) -> None:
    trainer = classifying.trainer(tmp_path, teacher=SelfTeacher(kind), learning_rate=0.01)
    trainer.train()
    logs = models.steps(trainer)
    assert logs[0]["soft"] == pytest.approx(0.0, abs=1e-6)
    assert (logs[2]["soft"] > 1e-4) == (kind != "live")
