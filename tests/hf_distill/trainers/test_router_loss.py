"""The auxiliary loss of experts is added whole and once; those that both choose are counted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DataCollatorWithPadding,
    MixtralConfig,
    MixtralForSequenceClassification,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
)

from hf_distill import DistillConfig, DistillTrainer, HintCollator, OPSDConfig, OPSDTrainer
from hf_distill.models.routers import Experts, aux_coefficient, expert_agreement
from tests.hf_distill.trainers import classifying, experts, models
from tests.hf_distill.trainers.experts import COEFFICIENT, moe, set_routers
from tests.hf_distill.trainers.reading import ReadsLogits

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

BOTH = pytest.mark.parametrize("reads", [DistillTrainer, ReadsLogits])
ERROR = 5e-6  # relative, of float32 sums over some 40 tokens


def make(
    folder: Path,
    student: Any = None,
    reads: type[DistillTrainer] = DistillTrainer,
    teacher: Any = None,
    **changes: Any,
) -> DistillTrainer:
    extra = {k: changes.pop(k) for k in ("compute_loss_func", "loss") if k in changes}
    config = DistillConfig(**models.options(folder, **{"max_steps": 1} | changes))
    return reads(
        moe() if student is None else student,
        config,
        models.Pad(),
        models.rows(),
        models.rows(6, seed=1),
        teacher=models.llama(1) if teacher is None else teacher,
        **extra,
    )


def aux_of(lm: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the model's own forward says of a batch."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return lm(**inputs, output_router_logits=True).aux_loss


def loss_and_gradients(
    trainer: DistillTrainer, batch: dict[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss.item(), experts.gradients(trainer.model)


@BOTH
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", ["mixtral", "granitemoe"])
def test_it_is_a_term_that_no_alpha_scales(
    tmp_path: Path, kind: str, alpha: float, reads: type[DistillTrainer]
) -> None:
    lm = moe(kind)
    trainer = make(tmp_path, lm, reads, alpha=alpha)
    batch = models.Pad()(models.rows()[:4])
    loss, found = loss_and_gradients(trainer, batch)
    set_routers(lm, False)
    without, plain = loss_and_gradients(trainer, batch)
    lm.zero_grad()
    aux = aux_of(lm, batch)
    (COEFFICIENT * aux).backward()
    assert loss - without == pytest.approx(COEFFICIENT * aux.item(), rel=1e-5)
    for name, want in experts.gradients(lm).items():
        got = found[name] - plain.get(name, 0)
        # differences of float32 gradients of the whole loss
        assert (got - want).norm() <= 1e-5 * (found[name].norm() + want.norm()), name


@pytest.mark.parametrize("kind", experts.CONFIGS)
def test_families(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Their loss is read as the cross-entropy, whatever their routers add to it."""
    trainer = make(tmp_path, moe(kind), alpha=0.4)
    want = aux_of(moe(kind), models.Pad()(models.rows()[:4])).item()
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["aux"] == pytest.approx(want, rel=ERROR)
    mixed = 0.4 * log["soft"] + 0.6 * log["hard"]
    assert log["loss"] == pytest.approx(mixed + COEFFICIENT * want, rel=1e-5)
    assert "hard loss is the model's own" not in caplog.text
    found = trainer.evaluate()
    mixed = 0.4 * found["eval_soft"] + 0.6 * found["eval_hard"]
    assert found["eval_loss"] == pytest.approx(mixed + COEFFICIENT * found["eval_aux"], rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_optimizer_step_has_the_mean_over_its_micro_batches(
    tmp_path: Path, checkpointing: bool
) -> None:
    def moved(say: bool) -> dict[str, Tensor]:
        trainer = make(tmp_path, moe(say=say), gradient_accumulation_steps=3, max_grad_norm=0.0)
        if checkpointing:
            trainer.model.activation_checkpointing_enable()
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
        before = models.weights(trainer.model)
        trainer.train()
        if say:
            assert trainer.state.log_history[0]["aux"] == pytest.approx(sum(each) / 3, rel=ERROR)
        return {n: before[n] - p for n, p in models.weights(trainer.model).items()}

    lm, data = moe(), models.rows()[:12]
    every = [aux_of(lm, models.Pad()(data[i : i + 4])) for i in (0, 4, 8)]
    each = [x.item() for x in every]
    (COEFFICIENT * sum(every) / 3).backward()
    with_it, without = moved(True), moved(False)
    for name, want in experts.gradients(lm).items():
        got = with_it[name] - without[name]
        # two differences of weights of size 1
        assert (got - want).abs().max() <= 4 * 2**-23 + 1e-4 * want.abs().max(), name


def test_routers_that_say_nothing_change_nothing(tmp_path: Path) -> None:
    trainer = make(tmp_path, moe(say=False))
    trainer.train()
    assert not {"aux", "expert_agreement"} & trainer.state.log_history[0].keys()
    assert "forward" not in vars(trainer.model)


def smoothed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    kept = labels[:, 1:].flatten()
    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    loss = torch.nn.functional.cross_entropy(logits, kept, reduction="sum", label_smoothing=0.1)
    return loss / num_items_in_batch


def halved(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
    return smoothed(type("", (), {"logits": logits})(), labels, (labels[:, 1:] != -100).sum()) / 2


@pytest.mark.parametrize("whose", ["user's", "smoothing", "model's", "of one's own"])
def test_with_other_losses(tmp_path: Path, whose: str) -> None:
    def log(say: bool) -> dict[str, float]:
        lm, changes = moe(say=say), {}
        if whose == "model's":
            lm.loss_function = halved
        elif whose == "of one's own":
            changes["loss"] = lambda s, t, _: (s - t).square().mean(-1)
        elif whose == "smoothing":
            changes["label_smoothing_factor"] = 0.1
        else:
            changes["compute_loss_func"] = smoothed
        trainer = make(tmp_path, lm, alpha=0.5, **changes)
        trainer.train()
        return trainer.state.log_history[0]

    found, plain = log(True), log(False)
    assert found["loss"] - plain["loss"] == pytest.approx(COEFFICIENT * found["aux"], rel=1e-4)
    assert found["hard"] == pytest.approx(plain["hard"], rel=1e-5)


def test_with_adapters_and_hidden_layers(tmp_path: Path) -> None:
    student = models.lora(moe(), target_modules=["q_proj", "v_proj"])
    trainer = make(tmp_path, student, hidden_layers="last", hidden_weight=1.0, alpha=1.0)
    trainer.train()
    log = trainer.state.log_history[0]
    want = log["soft"] + log["hidden"] + COEFFICIENT * log["aux"]
    assert log["loss"] == pytest.approx(want, rel=1e-5)


def test_a_classifier_has_none(tmp_path: Path) -> None:
    """Transformers adds none to a classifier's loss."""

    def classifier() -> MixtralForSequenceClassification:
        torch.manual_seed(0)
        config = MixtralConfig(**experts.LOCAL, num_labels=3, output_router_logits=True)
        return MixtralForSequenceClassification(config).eval()

    trainer = classifying.trainer(tmp_path, classifier(), classifier(), max_steps=1)
    assert isinstance(trainer.data_collator, DataCollatorWithPadding)
    trainer.train()
    assert trainer.state.log_history[0]["soft"] < 1e-6
    assert "aux" not in trainer.state.log_history[0]


def by_hand(student: Any, teacher: Any, data: list[dict[str, Any]]) -> float:
    """The mean share over rows, scored tokens and layers."""
    shares = []
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        scored = torch.tensor(row["labels"])[1:] != -100
        one, other = (m(input_ids=ids).router_logits for m in (student, teacher))
        for a, b in zip(one, other, strict=True):
            best = [x[:-1][scored].topk(2).indices.tolist() for x in (a, b)]
            shares += [len(set(x) & set(y)) / 2 for x, y in zip(*best, strict=True)]
    return sum(shares) / len(shares)


@BOTH
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "jetmoe"])
def test_experts_that_both_choose(tmp_path: Path, kind: str, reads: type[DistillTrainer]) -> None:
    trainer = make(tmp_path, moe(kind), reads, moe(kind, 1), learning_rate=0.0)
    trainer.train()
    found = trainer.state.log_history[0]["expert_agreement"]
    with torch.no_grad():
        assert found == pytest.approx(by_hand(moe(kind), moe(kind, 1), models.rows()[:4]))
        want = by_hand(moe(kind), moe(kind, 1), models.rows(6, seed=1))
    assert trainer.evaluate()["eval_expert_agreement"] == pytest.approx(want)
    assert 0 < found < 1
    again = make(tmp_path, moe(kind), reads, moe(kind), max_steps=1)
    again.train()
    assert again.state.log_history[0]["expert_agreement"] == 1


@pytest.mark.parametrize(
    "teacher", [lambda: moe(say=False), lambda: moe(num_local_experts=8), models.llama]
)
def test_others_have_no_experts_to_compare(tmp_path: Path, teacher: Any) -> None:
    trainer = make(tmp_path, teacher=teacher())
    trainer.train()
    assert "expert_agreement" not in trainer.state.log_history[0]
    assert "aux" in trainer.state.log_history[0]


def test_a_self_teacher_with_hints(tmp_path: Path) -> None:
    """The same tokens stand elsewhere in its rows; a live teacher without a hint is the student."""
    changes = {"on_policy": False, "teacher": "live", "max_steps": 1, "learning_rate": 0.0}
    found = []
    for hint_dropout in (0.0, 1.0):
        config = OPSDConfig(**models.options(tmp_path, **changes))
        trainer = OPSDTrainer(
            moe(),
            config,
            HintCollator(models.tokenizer(), hint_dropout=hint_dropout),
            models.problems(),
            processing_class=models.tokenizer(),
        )
        trainer.train()
        found.append(trainer.state.log_history[0]["expert_agreement"])
    assert 0 < found[0] < 1
    assert found[1] == 1


def test_agreement_of_other_numbers() -> None:
    one = Experts(torch.tensor([[[0, 1], [2, 3]]]), 4)
    assert expert_agreement(one, Experts(torch.tensor([[[1], [1]]]), 4)).tolist() == pytest.approx(
        [2 / 3, 0]
    )
    assert expert_agreement(one, one._replace(num_experts=5)) is None
    assert expert_agreement(one, Experts(one.chosen[:, :1], 4)) is None


def test_no_coefficient_is_an_error() -> None:
    lm: Any = torch.nn.Linear(2, 2)
    lm.config = PreTrainedConfig(output_router_logits=True)
    with pytest.raises(ValueError, match="neither the model nor its config has router_aux_loss"):
        aux_coefficient(lm)
    lm.config.router_aux_loss_coef = 0.5
    assert aux_coefficient(lm) == 0.5


@pytest.mark.parametrize("reentrant", [False, True])
def test_reentrant_checkpointing_is_named(
    tmp_path: Path, reentrant: bool, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path, max_steps=2)
    trainer.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    trainer.model.enable_input_require_grads()
    trainer.train()
    named = [x for x in caplog.messages if "auxiliary loss" in x and "use_reentrant" in x]
    assert len(named) == reentrant


def test_what_docs_say_of_a_trainer(tmp_path: Path) -> None:
    """It counts the auxiliary loss of each micro-batch whole."""

    def moved(say: bool) -> dict[str, Tensor]:
        settings = models.options(tmp_path, max_steps=1, gradient_accumulation_steps=3)
        args = TrainingArguments(**settings | {"max_grad_norm": 0.0})
        trainer = Trainer(moe(say=say), args, models.Pad(), models.rows())
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
        before = models.weights(trainer.model)
        trainer.train()
        return {n: before[n] - p for n, p in models.weights(trainer.model).items()}

    lm, data = moe(), models.rows()[:12]
    sum(COEFFICIENT * aux_of(lm, models.Pad()(data[i : i + 4])) for i in (0, 4, 8)).backward()
    with_it, without = moved(True), moved(False)
    for name, want in experts.gradients(lm).items():
        got = with_it[name] - without[name]
        assert (got - want).abs().max() <= 4 * 2**-23 + 1e-4 * want.abs().max(), name
