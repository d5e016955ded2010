"""Several teachers: each row is read by its own, tokens stay in order, state is each one's."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor, nn

from hf_distill import (
    DistillConfig,
    DistillTrainer,
    ModelTeacher,
    RemoteTeacher,
    RoutedTeacher,
    SelfTeacher,
)
from hf_distill.data.sides import Side, student_side, teacher_side
from hf_distill.models.signals import Signal
from hf_distill.teachers import RoutedCollator, Teacher
from metal_ops import SparseTeacher
from tests.hf_distill.teachers.asking import FAR, prepared, step
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

ROWS = models.rows(5)
BATCH = models.Pad()(ROWS)
ROUTE = torch.tensor([1, 0, 1, 2, 0])
NAMES = ("math", "code", "prose")
# a row in another batch: a few roundings of logits of order 10
CLOSE = {"rtol": 0, "atol": 1e-5}


def side(route: Tensor | None = ROUTE) -> Side:
    batch = BATCH if route is None else BATCH | {"teacher_route": route}
    return teacher_side(batch, student_side(batch))


@torch.no_grad()
def by_rows(chosen: list[nn.Module], route: Tensor = ROUTE) -> Tensor:
    """Each row read alone by its model, [N, V]."""
    said = []
    for row, number in zip(ROWS, route.tolist(), strict=True):
        logits = chosen[number](input_ids=torch.tensor([row["input_ids"]])).logits[0]
        scored = [i - 1 for i, label in enumerate(row["labels"]) if label != -100 and i > 0]
        said.append(logits[scored])
    return torch.cat(said)


def of_models(*teachers: Any, names: tuple[str, ...] = NAMES) -> RoutedTeacher:
    return RoutedTeacher(dict(zip(names, teachers, strict=True)), "domain")


@pytest.mark.parametrize("refusal", [None, "the test asks for logits"])
@pytest.mark.parametrize("route", [[1, 0, 1, 2, 0], [2, 2, 2, 2, 2], [0, 0, 1, 1, 1]])
def test_each_row_is_read_by_its_teacher(route: list[int], refusal: str | None) -> None:
    made = [models.llama(seed) for seed in (1, 2, 3)]
    teacher = prepared(of_models(*made), models.llama(), refusal)
    numbers = torch.tensor(route)
    signal = teacher.signal(models.llama(), side(numbers))
    want = by_rows(made, numbers)
    torch.testing.assert_close(signal.dense(), want, **CLOSE)
    other = by_rows(made, (numbers + 1) % 3)
    assert (other - want).abs().amax(-1).min() > FAR
    assert (signal.hidden is not None) == (refusal is None and len(set(route)) == 1)


def test_one_head_stays_one(tmp_path: Path) -> None:
    """Two views of one student: hidden states of both, with the student's own head."""
    student = models.lora(models.llama())
    teacher = prepared(
        RoutedTeacher({"base": SelfTeacher("base"), "live": SelfTeacher("live")}, "domain"),
        student,
    )
    signal = teacher.signal(student, side(ROUTE.clamp(max=1)))
    assert signal.hidden is not None
    assert signal.head.weight is student.get_output_embeddings().weight
    want = by_rows([models.llama(), student], ROUTE.clamp(max=1))
    torch.testing.assert_close(signal.dense(), want, **CLOSE)


def test_a_head_that_is_scaled_otherwise_is_another() -> None:
    """Two teachers with one weight, whose logits differ by a factor."""
    one, other = models.granite(1), models.granite(1)
    other.config.logits_scaling = 3.0
    other.lm_head.weight = one.lm_head.weight
    teacher = prepared(of_models(one, other, names=("a", "b")), models.granite())
    route = ROUTE.clamp(max=1)
    signal = teacher.signal(models.granite(), side(route))
    assert signal.hidden is None
    torch.testing.assert_close(signal.dense(), by_rows([one, other], route), **CLOSE)


def test_a_head_with_another_bias_is_another() -> None:
    one, other = models.phi(1), models.phi(1)
    other.lm_head.weight = one.lm_head.weight
    torch.nn.init.normal_(other.lm_head.bias)
    teacher = prepared(of_models(one, other, names=("a", "b")), models.phi())
    route = ROUTE.clamp(max=1)
    signal = teacher.signal(models.phi(), side(route))
    assert signal.hidden is None
    torch.testing.assert_close(signal.dense(), by_rows([one, other], route), **CLOSE)


def test_teachers_of_one_memory_share_a_head() -> None:
    one = models.llama(1)
    other = models.llama(2)
    other.lm_head.weight = one.lm_head.weight
    teacher = prepared(of_models(one, other, names=("a", "b")), models.llama())
    route = ROUTE.clamp(max=1)
    signal = teacher.signal(models.llama(), side(route))
    assert signal.head.weight.data_ptr() == one.lm_head.weight.data_ptr()
    torch.testing.assert_close(signal.dense(), by_rows([one, other], route), **CLOSE)


class Counted(Teacher):
    """Says the token ids that it is asked for, as logits or as a sparse signal."""

    def __init__(self, width: int | None = None, temperature: float = 1.0) -> None:
        self.width, self.temperature, self.dense = width, temperature, width is None
        self.rows: list[list[int]] = []
        self.updates = self.prepared = 0

    def prepare(self, *_: Any) -> None:
        self.prepared += 1

    def update(self, student: nn.Module) -> None:
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"updates": torch.tensor(self.updates)}

    def signal(self, student: nn.Module, side: Side) -> Signal:
        assert side.route is None
        self.rows += side.inputs["input_ids"].tolist()
        ids = side.inputs["input_ids"][:, 1:][side.predicts[:, :-1]]
        if self.width is None:
            return Signal(logits=ids[:, None].float())
        spread = ids[:, None].expand(-1, self.width)
        log_probs = -spread / 100.0 - self.width
        sparse = SparseTeacher(spread, log_probs, -ids.float(), self.temperature)
        return Signal(sparse=sparse)


def test_a_teacher_is_asked_for_its_rows_only() -> None:
    made = [Counted() for _ in NAMES]
    teacher = prepared(of_models(*made), models.llama())
    teacher.signal(models.llama(), side(torch.tensor([1, 0, 1, 1, 0])))
    ids = BATCH["input_ids"].tolist()
    assert made[0].rows == [ids[1], ids[4]]
    assert made[1].rows == [ids[0], ids[2], ids[3]]
    assert made[2].rows == []


def test_sparse_signals_are_joined() -> None:
    teacher = prepared(of_models(Counted(2), Counted(3), Counted(1)), models.llama())
    sparse = teacher.signal(models.llama(), side()).sparse
    ids = BATCH["labels"][:, 1:][BATCH["labels"][:, 1:] != -100]
    route = ROUTE[side().predicts.nonzero()[:, 0]]
    width = torch.tensor([2, 3, 1])[route]
    places = torch.arange(3)[None]
    want = torch.where(places < width[:, None], ids[:, None], -1)
    assert torch.equal(sparse.ids, want)
    log_probs = -ids / 100.0 - width
    assert torch.equal(sparse.log_probs[:, 0], log_probs)
    assert torch.equal(sparse.log_probs == -torch.inf, want == -1)
    assert torch.equal(sparse.log_tail, -ids.float())


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ((Counted(2), Counted(), Counted(2)), "a few entries, or none of them; got 2 of 3"),
        ((Counted(2), Counted(2, 2.0), Counted(2)), r"must have one temperature, got \[1.0, 2.0\]"),
    ],
)
def test_signals_that_do_not_join(made: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(of_models(*made), models.llama()).signal(models.llama(), side())


def test_a_batch_without_scored_tokens() -> None:
    teacher = prepared(of_models(*(models.llama(i) for i in (1, 2, 3))), models.llama())
    empty = side()._replace(predicts=torch.zeros_like(side().predicts))
    assert teacher.signal(models.llama(), empty).dense().shape == (0, models.VOCAB)


def test_a_teacher_with_two_names_is_one() -> None:
    shared, other = Counted(), Counted()
    teacher = prepared(of_models(shared, other, shared), models.llama())
    teacher.signal(models.llama(), side())
    teacher.update(models.llama())
    assert (shared.prepared, shared.updates) == (1, 1)
    assert shared.rows == BATCH["input_ids"][[1, 3, 4]].tolist()
    assert teacher.state_dict().keys() == {"math:updates", "code:updates"}


def test_state_is_each_teachers_own() -> None:
    student = models.lora(models.llama())

    def make() -> RoutedTeacher:
        parts = {
            "slow.v1": SelfTeacher("ema", 0.9),
            "fast": SelfTeacher("ema", 0.1),
            "scaled": SelfTeacher("lora_scale", lora_scale="linear:0->1@4"),
            "other": ModelTeacher(models.llama(1)),
        }
        return prepared(RoutedTeacher(parts, "domain"), student)

    teacher, fresh = make(), make()
    step(student)
    for _ in range(2):
        teacher.update(student)
    saved = {name: value.clone() for name, value in teacher.state_dict().items()}
    assert saved["scaled:step"].item() == 2
    one, two = ({k: v for k, v in saved.items() if k.startswith(n)} for n in ("slow.v1:", "fast:"))
    assert len(one) == len(two) == (len(saved) - 1) // 2
    assert not any(torch.equal(x, y) for x, y in zip(one.values(), two.values(), strict=True))
    fresh.load_state_dict(saved)
    restored = fresh.state_dict()
    assert restored.keys() == saved.keys()
    assert all(torch.equal(restored[name], saved[name]) for name in saved)
    with pytest.raises(ValueError, match=r"must be 'slow.v1', .* got the key 'gone:step'"):
        fresh.load_state_dict({"gone:step": torch.tensor(1)})
    with pytest.raises(ValueError, match="1 differ, the first is 'step'"):
        fresh.load_state_dict({k: v for k, v in saved.items() if k != "scaled:step"})


def test_rows_name_their_teacher() -> None:
    teacher = of_models(*(Counted() for _ in NAMES))
    assert [teacher.route({"domain": name}) for name in NAMES] == [0, 1, 2]
    known = r"\('math', 'code', 'prose'\)"
    with pytest.raises(ValueError, match=f"column 'domain' must name a teacher {known}, got 'law'"):
        teacher.route({"domain": "law"})
    with pytest.raises(ValueError, match=f"'domain' with its teacher's name {known}.*'text', 'a'"):
        teacher.route({"text": 1, "a": 2})


@pytest.mark.parametrize(
    ("route", "message"),
    [
        (None, r"needs 'teacher_route' in the batch: .*the data collator, teacher.collator\("),
        (torch.tensor([0, 1]), r"teacher_route must be \[5\].* got \[2\]"),
        (torch.tensor([0, 1, 3, 0, 0]), r"teacher_route must be in \[0, 3\), got 3"),
        (torch.tensor([0, -1, 2, 0, 0]), r"teacher_route must be in \[0, 3\), got -1"),
    ],
)
def test_routes_that_lead_nowhere(route: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of_models(*(Counted() for _ in NAMES)).signal(models.llama(), side(route))


@pytest.mark.parametrize(
    ("teachers", "message"),
    [({}, "at least one teacher"), ({"a:b": Counted()}, "without ':', got 'a:b'")],
)
def test_names(teachers: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutedTeacher(teachers, "domain")


def test_a_sharded_student_is_read_by_all_at_once() -> None:
    kind = DistributedType

    def engine(distributed_type: DistributedType, zero_stage: int | None = None) -> Any:
        plugin = None if zero_stage is None else SimpleNamespace(zero_stage=zero_stage)
        return SimpleNamespace(distributed_type=distributed_type, deepspeed_plugin=plugin)

    teacher = RoutedTeacher({"a": Counted(), "own": SelfTeacher("live")}, "domain")
    for accelerator in (engine(kind.FSDP), engine(kind.DEEPSPEED, 3)):
        name = accelerator.distributed_type.value
        with pytest.raises(ValueError, match=f"got {name} and the self-teacher 'own'"):
            teacher.prepare(accelerator, models.llama(), None)
        RoutedTeacher({"a": Counted()}, "domain").prepare(accelerator, models.llama(), None)
    for accelerator in (engine(kind.DEEPSPEED, 2), engine(kind.MULTI_GPU)):  # whole parameters
        teacher.prepare(accelerator, models.llama(), None)


def test_the_route_reaches_the_teachers_side_only() -> None:
    batch = BATCH | {"teacher_route": ROUTE}
    student = student_side(batch)
    assert student.inputs.keys() == {"input_ids", "attention_mask"}
    assert student.route is None
    assert torch.equal(teacher_side(batch, student).route, ROUTE)
    own = {
        "teacher_input_ids": batch["input_ids"],
        "teacher_attention_mask": batch["attention_mask"],
        "teacher_completion_index": torch.ones(5, 1, dtype=torch.int64),
    }
    assert torch.equal(teacher_side(batch | own, student).route, ROUTE)
    assert teacher_side(BATCH | own, student).route is None


@pytest.mark.parametrize("keep", [False, True])
def test_a_collator_sees_the_column_if_asked(keep: bool) -> None:
    seen: list[Any] = []

    def collate(rows: list[dict]) -> dict[str, Tensor]:
        seen.extend(rows)
        return models.Pad()(rows)

    teacher = of_models(*(Counted() for _ in NAMES))
    rows = [row | {"domain": NAMES[i]} for row, i in zip(ROWS, ROUTE.tolist(), strict=True)]
    made = RoutedCollator(collate, teacher, keep_column=keep)
    assert teacher.collator(made) is made
    batch = made(rows)
    assert torch.equal(batch.pop("teacher_route"), ROUTE)
    assert all(torch.equal(batch[name], BATCH[name]) for name in BATCH)
    assert seen == (rows if keep else ROWS)


def train(folder: Path, teacher: Any, collator: Any, data: Any, **changes: Any) -> dict:
    args = DistillConfig(**models.options(folder, **changes))
    trainer = DistillTrainer(models.llama(), args, collator, data, data, teacher=teacher)
    trainer.train()
    return models.weights(trainer.model) | {"eval": torch.tensor(trainer.evaluate()["eval_loss"])}


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("kind", [Dataset.from_list, list], ids=["datasets", "list"])
def test_training_with_routes(tmp_path: Path, kind: Any, remove: bool) -> None:
    """All rows to one teacher is that teacher; rows to two teachers are neither."""
    ends = {}
    for names in ("a", "b", "ab"):
        rows = [row | {"domain": names[i % len(names)]} for i, row in enumerate(models.rows())]
        teacher = RoutedTeacher({"a": models.llama(1), "b": models.llama(2)}, "domain")
        # the trainer wraps a collator that does not add the route
        collator = models.Pad() if names == "a" else teacher.collator(models.Pad())
        ends[names] = train(tmp_path, teacher, collator, kind(rows), remove_unused_columns=remove)
    alone = train(tmp_path, models.llama(1), models.Pad(), models.rows())
    assert models.difference(ends["a"], alone) == 0.0  # the whole batch is one teacher's
    for one, other in (("a", "b"), ("a", "ab"), ("b", "ab")):
        assert models.difference(ends[one], ends[other]) > 1e-4


def test_it_is_dense_if_all_its_teachers_are() -> None:
    remote = RemoteTeacher("http://localhost:1/v1", "tiny", 5)
    for teachers, dense in (
        ({"a": models.llama()}, True),
        ({"a": models.llama(), "b": remote}, False),
    ):
        assert RoutedTeacher(teachers, "domain").dense is dense
    remote.close()
