"""A teacher that sends hidden states: every loss is that of the local model."""

import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_distill import (
    DistillConfig,
    DistillTrainer,
    ModelTeacher,
    RemoteTeacherError,
    SpanCollator,
)
from hf_distill.cache import HeadSamples, HiddenStates, cache_teacher
from hf_distill.data.packed_rows import row_numbers
from hf_distill.data.sides import Side, predicts_from_labels, teacher_side
from hf_distill.losses import CrossTokenizerLoss, DivergenceLoss, TaidLoss, Tokens
from hf_distill.models.forward import Reader
from hf_distill.models.signals import Signal
from hf_distill.serving import HiddenStateServer
from hf_distill.serving.hidden_model import ModelQueue
from hf_distill.teachers.hidden_protocol import Row
from hf_distill.teachers.hidden_state_teacher import rows_of
from metal_ops import DivergenceSpec
from tests.hf_distill.cache import caches
from tests.hf_distill.serving.conftest import Ask, serving
from tests.hf_distill.teachers.asking import prepared
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.letters import reader
from tests.hf_distill.trainers.test_cross_tokenizer import LETTERS, WORDS, distil

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

FAST = ("gemma2", "phi")  # softcap, bias
FAMILIES = [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in models.FAMILIES]


def a_side(padding: str = "right") -> tuple[Side, Tensor]:
    """Rows of other lengths, one without a scored token; and the targets."""
    rows = models.rows(6, ignored=1)
    rows[2]["labels"] = [-100] * len(rows[2]["labels"])
    batch = models.Pad(padding)(rows)
    predicts = predicts_from_labels(batch["labels"])
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    return Side(inputs, predicts), batch["labels"][:, 1:][predicts[:, :-1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_the_model_says(asking: Ask, family: str) -> None:
    """To the rounding of two forwards with other padding; scales, softcaps and biases included."""
    model, student = models.FAMILIES[family](1), models.llama()
    with serving(model) as server:
        teacher = prepared(asking(server), student)
        for padding in ("left", "right"):
            side, _ = a_side(padding)
            said = teacher.signal(student, side)
            own = prepared(ModelTeacher(model), student).signal(student, side)
            assert said.logits is None
            torch.testing.assert_close(said.dense(), own.dense(), rtol=0, atol=2e-5)
    other = prepared(ModelTeacher(models.FAMILIES[family](2)), student).signal(student, side)
    assert float((said.dense() - other.dense()).abs().max()) > 0.1


LOSSES: dict[str, Any] = {
    "kl": DivergenceLoss(DivergenceSpec("forward_kl", temperature=2.0)),
    "reverse kl": DivergenceLoss(DivergenceSpec("reverse_kl", temperature=0.7)),
    "jsd": DivergenceLoss(DivergenceSpec("jsd", beta=0.3), 0.5),
    "uld": CrossTokenizerLoss(),
    "taid": TaidLoss(DivergenceSpec("forward_kl"), t=0.4),
    "student_topk": DivergenceLoss(DivergenceSpec("reverse_kl", support="student_topk", top_k=5)),
    "union": DivergenceLoss(DivergenceSpec("reverse_kl", support="union", top_k=3)),
}


def loss_and_gradient(loss: Any, student: nn.Module, teacher: Signal) -> tuple[Tensor, Tensor]:
    side, targets = a_side()
    weights = torch.linspace(0.5, 1.5, len(targets))
    student.zero_grad()
    terms = Reader("student").run(
        student, side, lambda said: loss(said, teacher, Tokens(targets, weights))
    )
    terms.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    return terms.loss.detach(), gradient


def test_every_loss_is_that_of_the_local_teacher(server: HiddenStateServer, asking: Ask) -> None:
    """From hidden states on both sides: value and gradient, to rounding."""
    student, (side, _) = models.llama(), a_side()
    far = prepared(asking(server), student).signal(student, side)
    near = prepared(ModelTeacher(models.llama(1)), student).signal(student, side)
    other = prepared(ModelTeacher(models.llama(2)), student).signal(student, side)
    for name, loss in LOSSES.items():
        found, wanted, differs = (loss_and_gradient(loss, student, x) for x in (far, near, other))
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=0, msg=name)
        error = (found[1] - wanted[1]).norm() / wanted[1].norm()
        assert error < 2e-5 < 0.02 < (differs[1] - wanted[1]).norm() / wanted[1].norm(), name


def trained(folder: Path, taught_by: Any, **changes: Any) -> DistillTrainer:
    config = DistillConfig(**models.options(folder, **changes))
    return DistillTrainer(models.llama(), config, models.Pad(), models.rows(), teacher=taught_by)


def losses(trainer: DistillTrainer) -> list[float]:
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_a_training_asks_one_batch_ahead(
    tmp_path: Path, server: HiddenStateServer, asking: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request of the next batch is there before the step of this one is done."""
    teacher, seen = asking(server), []
    trainer = trained(tmp_path, teacher, divergence="jsd")
    submit, step = ModelQueue.submit, trainer.training_step
    arrived = threading.Semaphore(0)

    def noted(self: Any, rows: Any) -> Any:
        arrived.release()
        return submit(self, rows)

    def stepped(*given: Any, **named: Any) -> Any:
        number = len(seen)
        for _ in range(2 if number == 0 else number < 2):  # its own request, and the next one's
            assert arrived.acquire(timeout=20), f"step {number} has no request ahead"
        seen.append(number)
        return step(*given, **named)

    monkeypatch.setattr(ModelQueue, "submit", noted)
    monkeypatch.setattr(trainer, "training_step", stepped)
    found = losses(trainer)
    assert seen == [0, 1, 2]
    monkeypatch.undo()
    assert found == pytest.approx(losses(trained(tmp_path, models.llama(1), divergence="jsd")))


def test_what_is_asked_ahead_is_asked_once(server: HiddenStateServer, asking: Ask) -> None:
    teacher, (side, _) = prepared(asking(server), models.llama()), a_side()
    rows = rows_of(side)
    assert len(rows) == 5  # what scores nothing is not sent
    own = teacher.ask(rows)
    teacher.ask_ahead(rows)
    asked = teacher._client.hidden
    teacher._client.hidden = None  # nobody is asked from here on
    assert torch.equal(teacher.ask(rows), own)
    teacher._client.hidden = asked
    batch = models.rows()[:2]
    collator = teacher.collator(models.Pad())
    collator(batch)
    assert len(teacher._asked) == 1
    pickle.loads(pickle.dumps(collator))(batch)  # a worker's asks nobody
    assert len(teacher._asked) == 1
    for number in range(100):  # of steps that were never taken
        teacher.ask_ahead([Row([3 + number // 50, 3 + number % 50], [0])])
    assert len(teacher._asked) == 64
    own = teacher.ask([Row([4, 51], [0])])
    assert len(teacher._asked) == 1  # those before it are of no step that will come
    assert torch.equal(own, teacher.ask([Row([4, 51], [0])]))


def test_rows_beyond_a_request_are_several(asking: Ask) -> None:
    rows, _ = a_side()
    with serving() as one, serving(max_rows=2, max_tokens=15, batch_tokens=9) as other:
        whole, cut = (prepared(asking(x), models.llama()).ask(rows_of(rows)) for x in (one, other))
        torch.testing.assert_close(whole, cut, rtol=0, atol=1e-5)
        with pytest.raises(RemoteTeacherError, match="a row must have at most 15 tokens"):
            asking(other).ask([Row([3] * 16, [0])])


@pytest.mark.parametrize(
    "codec",
    [
        HiddenStates("int8"),
        pytest.param(HiddenStates(rank=9), marks=pytest.mark.slow),
        HeadSamples(top_k=4),
    ],
)
def test_a_cache_from_the_server_is_that_of_the_model(
    tmp_path: Path, server: HiddenStateServer, asking: Ask, codec: Any
) -> None:
    """The same bytes, and each goes on with what the other has begun."""
    given = {"data_collator": models.Pad(), "batch_size": 3, "shard_rows": 4, "codec": codec}
    cache_teacher(models.llama(1), models.rows(), tmp_path / "own", **given)
    cache_teacher(asking(server), models.rows(), tmp_path / "far", **given)
    assert caches.contents(tmp_path / "own") == caches.contents(tmp_path / "far")
    names = ["config.json", "row_hashes.bin"]
    names += ["head.safetensors"] if codec.of_hidden else []
    for name in names:
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "far" / name).read_bytes()
    for name in ("manifest.json", "shards/shard-00002.json"):
        (tmp_path / "own" / name).unlink()
    cache_teacher(asking(server), models.rows(), tmp_path / "own", **given)
    assert caches.contents(tmp_path / "own") == caches.contents(tmp_path / "far")


def test_another_tokenizer_is_refused(tmp_path: Path, asking: Ask) -> None:
    with serving(tokenizer=models.tokenizer()) as server:
        teacher = asking(server)
        teacher.check_tokenizer(models.tokenizer())
        words = models.tokenizer()
        words.add_tokens(["more"])
        with pytest.raises(ValueError, match="the tokenizer must have the ids of the server's"):
            teacher.check_tokenizer(words)
        config = DistillConfig(**models.options(tmp_path))
        with pytest.raises(ValueError, match="the tokenizer must have the ids of the server's"):
            DistillTrainer(
                models.llama(vocab_size=80),
                config,
                models.Pad(),
                models.rows(),
                processing_class=words,
                teacher=teacher,
            )


def test_a_teacher_of_another_tokenizer(tmp_path: Path, asking: Ask) -> None:
    """Its own rows are sent; ULD over both vocabularies is that of the local model."""
    with serving(reader(), tokenizer=LETTERS) as server:
        found = losses(distil(tmp_path, taught_by=asking(server)))
        assert found == pytest.approx(losses(distil(tmp_path)), rel=1e-5)
        spans = {"divergence": "spans", "collator": SpanCollator(WORDS, LETTERS, [])}
        found = losses(distil(tmp_path, taught_by=asking(server), **spans))
        assert found == pytest.approx(losses(distil(tmp_path, **spans)), rel=1e-5)
        with pytest.raises(ValueError, match="the tokenizer must have the ids of the server's"):
            distil(tmp_path, taught_by=asking(server), collator=models.Pad())
    with (
        serving(reader()) as server,
        pytest.raises(ValueError, match="no tokenizer of the server to compare"),
    ):
        distil(tmp_path, taught_by=asking(server), collator=models.Pad())


def test_another_teacher_behind_the_address_is_an_error(asking: Ask) -> None:
    side, _ = a_side()
    with serving() as first:
        teacher, port = prepared(asking(first, max_wait=20.0), models.llama()), first.server_port
        own = teacher.signal(models.llama(), side).hidden
    with serving(port=port):  # the same one, again
        assert torch.equal(teacher.signal(models.llama(), side).hidden, own)
    with (
        serving(models.llama(2), port=port),
        pytest.raises(RemoteTeacherError, match="the server has another teacher than before"),
    ):
        teacher.signal(models.llama(), side)


def test_a_server_that_comes_back_is_waited_for(
    asking: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    side, _ = a_side()
    with serving() as first:
        teacher, port = prepared(asking(first, max_wait=30.0), models.llama()), first.server_port
        own = teacher.signal(models.llama(), side).hidden
    found: list[Tensor] = []
    waiting = threading.Thread(
        target=lambda: found.append(teacher.signal(models.llama(), side).hidden)
    )
    with caplog.at_level("WARNING", "hf_distill"):
        waiting.start()
        while "trying again" not in caplog.text:
            assert waiting.is_alive()
            waiting.join(0.01)
        with serving(port=port):
            waiting.join(30)
    assert torch.equal(found[0], own)
    impatient = asking(first, max_wait=0.05)
    with pytest.raises(RemoteTeacherError, match=r"no connection: .* in 0 s"):
        _ = impatient.about


def test_packed_rows_are_asked_one_by_one() -> None:
    ids, predicts = torch.arange(3, 10)[None], torch.tensor([[0, 1, 0, 0, 0, 1, 0]]).bool()
    inputs = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}
    found = rows_of(teacher_side({}, Side(inputs, predicts, rows=row_numbers(inputs))))
    assert [(list(x.ids), list(x.outputs)) for x in found] == [([3, 4], [1]), ([6, 7, 8], [2])]


def test_arguments_out_of_range(monkeypatch: pytest.MonkeyPatch, server: HiddenStateServer) -> None:
    from hf_distill import HiddenStateTeacher  # noqa: PLC0415

    for given in ({"timeout": 0.0}, {"max_wait": -1.0}, {"backoff": -1.0}):
        with pytest.raises(ValueError, match="timeout must be positive"):
            HiddenStateTeacher(server.url, **given)
    with pytest.raises(ValueError, match="must begin with http:// or https://, got 'localhost:1'"):
        HiddenStateTeacher("localhost:1")
    monkeypatch.delenv("NO_TOKEN", raising=False)
    with pytest.raises(ValueError, match="NO_TOKEN must hold the server's token"):
        HiddenStateTeacher(server.url, api_key_env="NO_TOKEN")
    batch = {
        "input_ids": torch.ones(1, 4, dtype=torch.long),
        "token_type_ids": torch.arange(4)[None],
    }
    with pytest.raises(ValueError, match="the batch has 'token_type_ids' too"):
        rows_of(Side(batch, torch.ones(1, 4, dtype=torch.bool)))
    assert json.dumps(server.about.to_json())
