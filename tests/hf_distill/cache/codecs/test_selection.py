import math

import numpy as np
import pytest
import torch

from hf_distill.cache.codecs import HeadSamples
from hf_distill.cache.codecs.selection import draw_systematic, select, uniforms
from tests.hf_distill.cache.codecs.teachers import exact, tail_of, zipf_logits


@pytest.mark.parametrize("vocab", [5, 511, 512, 513, 3000])  # within, at and over blocks of 512
def test_an_entry_is_drawn_as_often_as_its_weight_says(vocab: int) -> None:
    """Each count is n g rounded down or up, and n g on average over the points."""
    generator = torch.Generator().manual_seed(vocab)
    weights = torch.rand(1, vocab, generator=generator) ** 8
    weights[:, ::3] = 0
    num_draws, num_points = 16, 400
    points = (torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points
    ids = draw_systematic(weights.expand(num_points, -1), points, num_draws)
    counts = torch.stack([torch.bincount(row, minlength=vocab) for row in ids]).double()
    expected = num_draws * weights[0].double() / weights[0].double().sum()
    slack = 1e-5
    assert bool((counts >= (expected - slack).floor()).all())
    assert bool((counts <= (expected + slack).ceil()).all())
    assert float((counts.mean(0) - expected).abs().max()) <= 1.01 / num_points
    assert bool((ids.diff(dim=-1) >= 0).all())


def test_no_entry_without_weight_is_drawn_at_the_ends_of_the_points() -> None:
    weights = torch.zeros(2, 2000)
    weights[:, 700] = 1.0
    points = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert draw_systematic(weights, points, 7).tolist() == [[700] * 7] * 2


def test_points_are_those_of_the_key_and_the_place() -> None:
    both = uniforms([(3, 0), (3, 1)], [4, 2])
    assert np.array_equal(both[4:], uniforms([(3, 1)], [5])[:2])
    assert not np.array_equal(uniforms([(3, 0)], [4]), uniforms([(4, 0)], [4]))
    # the first numbers of PCG64 seeded with (3, 0), by numpy 2; they must never change
    literal = [0.08564916714362, 0.23681050659610, 0.80127446520640, 0.58216203606437]
    assert both[:4] == pytest.approx(literal, abs=1e-12)


def test_what_is_selected() -> None:
    logits = zipf_logits(11, 2000)
    plan = HeadSamples(top_k=7, num_samples=5).plan
    kept = select(logits, uniforms([(0, 0)], [11]), plan)
    log_p = exact(logits)
    values, ids = log_p.topk(7)
    assert kept.head_ids.tolist() == ids.tolist()
    torch.testing.assert_close(
        torch.tensor(kept.head_log_probs).double(), values, atol=5e-6, rtol=0
    )
    tail = tail_of(log_p, ids)
    torch.testing.assert_close(
        torch.tensor(kept.log_tail).double(), tail.logsumexp(-1), atol=5e-6, rtol=0
    )
    sums = torch.stack([(order * tail).logsumexp(-1) for order in plan.orders], -1)
    torch.testing.assert_close(torch.tensor(kept.log_sums).double(), sums, atol=5e-6, rtol=0)
    drawn = tail.gather(-1, torch.tensor(kept.draw_ids))
    torch.testing.assert_close(torch.tensor(kept.draw_log_probs).double(), drawn, atol=5e-6, rtol=0)
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(torch.tensor(kept.entropy).double(), entropy, atol=2e-5, rtol=0)
    assert kept.num_entries.tolist() == [2000] * 11


def test_draws_follow_the_tail_at_the_hottest_temperature() -> None:
    """Chi-square of draws over many points, against p ** 0.5 of the tail in ten parts."""
    logits = zipf_logits(1, 4000).expand(512, -1)
    kept = select(logits, uniforms([(0, 0)], [512]), HeadSamples().plan)
    tail = tail_of(exact(logits[:1]), torch.tensor(kept.head_ids[:1]))
    share = (0.5 * tail[0]).softmax(-1)
    part = torch.arange(4000) * 10 // 4000
    expected = torch.zeros(10, dtype=torch.float64).index_add_(0, part, share) * kept.draw_ids.size
    drawn = torch.bincount(part[torch.tensor(kept.draw_ids).flatten()], minlength=10)
    # systematic draws scatter less than independent ones, whose 99.9 % point is 27.9
    assert float(((drawn - expected) ** 2 / expected).sum()) < 27.9
    cold = tail[0].softmax(-1)
    other = torch.zeros(10, dtype=torch.float64).index_add_(0, part, cold) * kept.draw_ids.size
    assert float(((drawn - other) ** 2 / other).sum()) > 100


def test_the_nucleus_ends_with_the_entry_that_reaches_its_mass() -> None:
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.06, 0.04], [0.96, 0.01, 0.01, 0.01, 0.01]])
    plan = HeadSamples(top_k=4, top_p=0.85, num_samples=1).plan
    kept = select(probs.log(), np.zeros(2), plan)
    assert kept.head_sizes.tolist() == [3, 1]
    assert kept.log_tail.tolist() == pytest.approx([math.log(0.1), math.log(0.04)], abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_distribution_are_refused(bad: float) -> None:
    logits = zipf_logits(20, 100)
    logits[13, 50] = bad
    with pytest.raises(ValueError, match="in 1 tokens, the first at 13"):
        select(logits, np.zeros(20), HeadSamples().plan)
    logits[13] = -torch.inf
    with pytest.raises(ValueError, match="in 1 tokens, the first at 13"):
        select(logits, np.zeros(20), HeadSamples().plan)
