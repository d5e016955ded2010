"""Sparse teachers at other temperatures, and some of their tokens."""

import math

import pytest
import torch
from torch import Tensor

from metal_ops import DivergenceSpec, SparseTeacher, TailSamples, divergence, sparse_divergence
from tests.metal_ops.ops.tails import all_drawn, sampled, with_powers

N, V, TOP = 24, 20_000, 32
ORDERS = (0.5, 0.75, 2.0)


def zipf(rows: int = N, vocab: int = V) -> Tensor:
    """Logits whose probabilities fall as a power of the rank, with noise; float64."""
    slope = 1.0 + 0.6 * torch.rand(rows, 1, dtype=torch.float64)
    ranks = torch.arange(1, vocab + 1, dtype=torch.float64)
    return torch.randn(rows, vocab, dtype=torch.float64) - slope * ranks.log()


def exact(teacher: Tensor, known: SparseTeacher, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = (teacher / temperature).log_softmax(-1)
    return log_p, log_p.scatter(-1, known.ids, -math.inf).logsumexp(-1)


@pytest.mark.parametrize("write", [1.0, 1.5])
@pytest.mark.parametrize("order", [*ORDERS, 1.0])
def test_at_a_stored_order_it_is_exact(order, write):
    teacher = zipf()
    known = with_powers(teacher, sampled(teacher, TOP, 8, write), ORDERS)
    read = write / order
    moved = known.at(read)
    log_p, log_tail = exact(teacher, known, read)
    torch.testing.assert_close(moved.log_probs, log_p.gather(-1, known.ids))
    torch.testing.assert_close(moved.log_tail, log_tail)
    torch.testing.assert_close(moved.samples.log_probs, log_p.gather(-1, known.samples.ids))
    if order != 1.0:
        assert (moved.temperature, moved.powers) == (read, None)
        assert (log_tail - known.log_tail).abs().min() > 0.01


@pytest.mark.parametrize("temperature", [0.8, 1.2, 1.5, 1.8, 2.5, 3.0])
def test_between_orders_the_tails_mass_is_close(temperature):
    teacher = zipf()
    known = with_powers(teacher, sampled(teacher, TOP, 8, 1.0), ORDERS)
    half = known.powers._replace(log_sums=known.powers.log_sums.half())
    mass = exact(teacher, known, temperature)[1].exp()
    for powers in (known.powers, half):
        off = known._replace(powers=powers).at(temperature).log_tail.exp() - mass
        # measured: 1.7e-3 at 0.8 and at most 3.5e-4 above 1; straight lines are off by 1e-2, 7e-3
        assert off.abs().mean() < (4e-3 if temperature < 1 else 1e-3)


def test_itself_at_its_own_temperature():
    known = sampled(zipf(4, 99), 3, 5, 1.5)
    assert known.at(1.5) is known


def test_a_kink_is_kept_between_chords():
    """One entry above a flat rest: the polynomial through all orders swings around log S."""
    vocab = 200_000
    teacher = torch.full((1, vocab), -30.0, dtype=torch.float64)
    teacher[0, :2] = torch.tensor([0.0, -1.0])
    known = SparseTeacher(torch.tensor([[0]]), torch.tensor([[0.0]]), torch.tensor([0.0]))
    log_p = teacher.log_softmax(-1)
    known = known._replace(log_probs=log_p[:, :1], log_tail=log_p[:, 1:].logsumexp(-1))
    known = with_powers(teacher, known, ORDERS)

    def log_sum(order: float) -> float:
        return float((order * log_p[:, 1:]).logsumexp(-1))

    def line(order: float, low: float, high: float) -> float:
        share = (order - low) / (high - low)
        return (1 - share) * log_sum(low) + share * log_sum(high)

    above = below = 0.0
    for order, low, high, outer in ((0.9, 0.75, 1.0, (0.5, 0.75)), (1.7, 1.0, 2.0, (0.75, 1.0))):
        moved = known.at(1 / order)
        # the sum, from the part of the tail in all
        got = float(moved.log_tail - (moved.log_probs[:, 0] - order * log_p[:, 0]))
        assert line(order, *outer) - 1e-9 <= got <= line(order, low, high) + 1e-9
        shares = [
            math.prod((order - b) / (a - b) for b in (0.0, 1.0, *ORDERS) if b != a) * log_sum(a)
            for a in (0.0, 1.0, *ORDERS)
        ]
        above = max(above, sum(shares) - line(order, low, high))
        below = max(below, line(order, *outer) - sum(shares))
    assert min(above, below) > 0.01  # both bounds are met


def test_many_orders():
    teacher = zipf()
    known = sampled(teacher, TOP, 8, 1.0)
    many = with_powers(teacher, known, tuple(i / 20 for i in range(1, 41) if i != 20))
    many = many._replace(powers=many.powers._replace(log_sums=many.powers.log_sums.half()))
    for order in (0.575, 1.975):  # a polynomial through all of them swings out at the ends
        off = many.at(1 / order).log_tail - exact(teacher, known, 1 / order)[1]
        assert off.abs().max() < 1e-2


def test_tails_of_nothing_and_of_one_entry():
    teacher = torch.randn(4, 6).double()
    for top_k in (5, 6):
        known = with_powers(teacher, sampled(teacher, 3, 2, 1.0)._replace(samples=None), ORDERS)
        log_p = teacher.log_softmax(-1)
        log_probs, ids = log_p.topk(top_k)
        log_tail = log_p.scatter(-1, ids, -math.inf).logsumexp(-1)
        known = with_powers(teacher, SparseTeacher(ids, log_probs, log_tail), ORDERS)
        moved = known.at(1.7)
        want, log_tail = exact(teacher, known, 1.7)
        torch.testing.assert_close(moved.log_probs, want.gather(-1, ids))
        torch.testing.assert_close(moved.log_tail, log_tail)  # one entry: log S is a line


def test_padding_and_missing_draws_stay_such():
    teacher = zipf(4, 99)
    known = with_powers(teacher, sampled(teacher, 3, 5, 1.0), ORDERS)
    pad = torch.nn.functional.pad
    padded = known._replace(
        ids=pad(known.ids, (0, 2), value=-1),
        log_probs=pad(known.log_probs, (0, 2), value=-0.1),
        samples=TailSamples(
            pad(known.samples.ids, (0, 1), value=-1), *(pad(x, (0, 1)) for x in known.samples[1:])
        ),
    )
    got, want = padded.at(2.0), known.at(2.0)
    torch.testing.assert_close(got.log_tail, want.log_tail)
    torch.testing.assert_close(got.log_probs[:, :3], want.log_probs)
    torch.testing.assert_close(got.samples.log_weights[:, :5], want.samples.log_weights)
    assert got.samples.log_weights[:, 5].isneginf().all()
    none = known._replace(samples=known.samples._replace(ids=torch.full((4, 5), -1)))
    assert none.at(2.0).samples.log_weights.isneginf().all()


def test_carried_draws_weigh_the_tails_exact_mass():
    teacher = zipf()
    known = with_powers(teacher, sampled(teacher, TOP, 8, 1.0), ORDERS)
    moved = known.at(2.0)
    weights = moved.samples.log_weights
    mass = (weights + moved.samples.log_probs).logsumexp(-1)
    torch.testing.assert_close(mass, moved.log_tail)
    plain = (known.samples.log_weights + moved.samples.log_probs).logsumexp(-1)
    assert (plain - moved.log_tail).abs().mean() > 0.1
    apart = weights - known.samples.log_weights
    torch.testing.assert_close(apart, apart[:, :1].expand_as(apart))


def test_the_divergence_at_another_temperature():
    """The whole tail with the weight of a sum, written at 1 and read at 2: the dense loss at 2."""
    teacher, student = zipf(6, 200), zipf(6, 200)
    spec = DivergenceSpec("jsd", 0.3, 2.0, "t2")
    known = with_powers(teacher, all_drawn(teacher, 12, 1.0), ORDERS)
    got = sparse_divergence(student, known.at(2.0), spec, max_ratio=None)
    torch.testing.assert_close(got, divergence(student, teacher, spec))


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        (4.5, "serve temperatures from 0.5 to 4, got 4.5"),
        (0.4, "serve temperatures from 0.5 to 4, got 0.4"),
    ],
)
def test_temperatures_out_of_range(temperature, message):
    teacher = zipf(4, 99)
    known = with_powers(teacher, sampled(teacher, 3, 5, 1.0), ORDERS)
    with pytest.raises(ValueError, match=message):
        known.at(temperature)
    with pytest.raises(ValueError, match="cannot be taken at another: without"):
        known._replace(powers=None).at(temperature)


def test_orders_that_do_not_reach():
    teacher = zipf(4, 99)
    known = with_powers(teacher, sampled(teacher, 3, 5, 1.0), (0.5,))
    known.at(2.0)
    with pytest.raises(ValueError, match=r"reach up to order 1, but the temperature asks for 1.25"):
        known.at(0.8)


def test_rows_are_those_tokens():
    teacher = zipf(6, 99)
    known = with_powers(teacher, sampled(teacher, 3, 5, 1.0), ORDERS)
    student = zipf(6, 99)
    spec = DivergenceSpec("forward_kl", 0.5, 1.5)
    want = sparse_divergence(student, known.at(1.5), spec)
    for index in (slice(2, 4), torch.tensor([5, 0, 3])):
        part = known.rows(index)
        assert part.temperature == 1.0
        got = sparse_divergence(student[index], part.at(1.5), spec)
        torch.testing.assert_close(got, want[index])
    assert known._replace(samples=None, powers=None).rows(slice(0, 1)).samples is None
