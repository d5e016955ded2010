"""Routed teachers of which a few entries are known: draws, power sums and the tail's rule."""

import pytest
import torch
from torch import Tensor, nn

from hf_distill import RoutedTeacher
from hf_distill.data.sides import Side, student_side, teacher_side
from hf_distill.models.signals import Signal, TailRule
from hf_distill.teachers import Teacher
from metal_ops import DivergenceSpec, PowerSums, sparse_divergence
from tests.hf_distill.teachers.asking import prepared
from tests.hf_distill.trainers import models
from tests.metal_ops.ops.tails import sampled, with_powers

V = 19
BATCH = models.Pad()(models.rows(5))
ROUTE = torch.tensor([1, 0, 1, 1, 0])
RULE = TailRule("auto", None)
LOGITS = torch.randn(64, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def logits(side: Side, seed: int) -> Tensor:
    """Of each scored token, by its id."""
    ids = side.inputs["input_ids"][:, 1:][side.predicts[:, :-1]]
    return 2 * LOGITS[(ids + 7 * seed) % len(LOGITS)]


class Known(Teacher):
    """Knows `top_k` entries and `draws` draws; asked again, it says the same."""

    dense = False

    def __init__(
        self,
        seed: int,
        top_k: int,
        draws: int,
        orders: tuple[float, ...] = (0.5, 2.0),
        served: tuple[float, float] = (0.5, 4.0),
        rule: TailRule = RULE,
    ) -> None:
        self.seed, self.top_k, self.draws = seed, top_k, draws
        self.orders, self.served, self.rule = orders, served, rule

    def prepare(self, *_: object) -> None:
        """Nothing to do."""

    def signal(self, student: nn.Module, side: Side) -> Signal:
        torch.manual_seed(self.seed)
        given = logits(side, self.seed)
        known = sampled(given, self.top_k, max(self.draws, 1), 1.0)
        if self.orders:
            known = with_powers(given, known, self.orders)
            assert known.powers is not None
            known = known._replace(powers=known.powers._replace(temperature_range=self.served))
        if not self.draws:
            known = known._replace(samples=None)
        return Signal(sparse=known, tail=self.rule)


def side(route: Tensor) -> Side:
    batch = BATCH | {"teacher_route": route}
    return teacher_side(batch, student_side(batch))


def ask(*teachers: Known) -> Signal:
    made = {str(i): teacher for i, teacher in enumerate(teachers)}
    return prepared(RoutedTeacher(made, "domain"), models.llama()).signal(
        models.llama(), side(ROUTE)
    )


def losses(signal: Signal, at: Tensor, spec: DivergenceSpec) -> Tensor:
    assert signal.sparse is not None
    torch.manual_seed(9)
    student = torch.randn(len(LOGITS), V, dtype=torch.float64)[: len(at)]
    rule = signal.tail
    return sparse_divergence(
        student, signal.sparse.at(spec.temperature), spec, tail=rule.tail, max_ratio=rule.max_ratio
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.6])
@pytest.mark.parametrize("draws", [(5, 3), (4, 0), (0, 0)])
def test_each_token_has_its_teachers_loss(draws: tuple[int, int], temperature: float) -> None:
    first, second = Known(1, 2, draws[0]), Known(2, 4, draws[1])
    signal = ask(first, second)
    assert signal.tail == RULE
    token_route = ROUTE[side(ROUTE).predicts.nonzero()[:, 0]]
    spec = DivergenceSpec("jsd", 0.3, temperature)
    got = losses(signal, token_route, spec)
    for number, teacher in enumerate((first, second)):
        mine = token_route == number
        rows = side(ROUTE).predicts & (number == ROUTE)[:, None]
        alone = teacher.signal(models.llama(), side(ROUTE)._replace(predicts=rows)).sparse
        assert alone is not None
        torch.manual_seed(9)
        student = torch.randn(len(LOGITS), V, dtype=torch.float64)[: len(mine)][mine]
        want = sparse_divergence(student, alone.at(temperature), spec, max_ratio=None)
        torch.testing.assert_close(got[mine], want)


def powers_of(*teachers: Known) -> PowerSums | None:
    sparse = ask(*teachers).sparse
    assert sparse is not None
    return sparse.powers


def test_power_sums_that_join_serve_what_both_serve() -> None:
    powers = powers_of(Known(1, 2, 5, served=(0.8, 3.0)), Known(2, 4, 3, served=(1.0, 4.0)))
    assert powers is not None
    assert powers.temperature_range == (1.0, 3.0)
    for other in (
        Known(2, 4, 3, orders=(0.5,)),
        Known(2, 4, 3, orders=()),
        Known(2, 4, 3, served=(3.5, 4.0)),
    ):
        assert powers_of(Known(1, 2, 5, served=(0.8, 3.0)), other) is None


def test_rules_that_do_not_join() -> None:
    with pytest.raises(ValueError, match=r"must have one rule for the tail, got .*bucket"):
        ask(Known(1, 2, 5), Known(2, 4, 3, rule=TailRule("bucket")))
    rule = TailRule("sampled")
    with pytest.raises(ValueError, match="'sampled' needs samples of every routed teacher's tail"):
        ask(Known(1, 2, 5, rule=rule), Known(2, 4, 0, rule=rule))
