"""Likelihoods of spans: plain formulas, means by enumeration, the KL of one tokenizer, GOLD."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill.data.spans import common_spans, cut_text
from hf_distill.data.token_bytes import TokenBytes, common_ids
from hf_distill.losses import DivergenceLoss, SpanLoss, Terms, Tokens, chunks, not_finite
from hf_distill.models.signals import Head, Signal
from hf_distill.models.spans import CommonIds, Spans
from metal_ops import DivergenceSpec, SparseTeacher, reference
from tests.hf_distill.data.families import TEXTS, byte_level

GOLD = pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
N, M, V, W, H = 8, 9, 7, 9, 5
COMMON = {0: 3, 1: 1, 2: 8, 5: 0}
# of the student's tokens: two, one (single), none, one (the teacher's one is another), two, one
MINE = torch.tensor([0, 0, 1, -1, 2, 3, 3, 4])
TARGETS = torch.tensor([3, 4, 1, 2, 6, 0, 2, 5])
THEIRS = torch.tensor([0, 0, 0, 1, 2, 3, 3, 4, 4])
THEIR_TARGETS = torch.tensor([4, 5, 6, 1, 7, 2, 4, 0, 5])
SINGLE = torch.tensor([0, 0, 1, 0, 0, 0, 0, 0]).bool()
# roundings of 2.2e-16 in sums of some ten terms of order 1 to 30
CLOSE: dict[str, Any] = {"rtol": 1e-13, "atol": 1e-13}


def draw(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"hidden": (N, H), "weight": (V, H), "bias": (V,)}
    shapes |= {"teacher_hidden": (M, 6), "teacher_weight": (W, 6)}
    given = {name: torch.randn(*shape, dtype=dtype) for name, shape in shapes.items()}
    return given | {"weights": torch.rand(N, dtype=dtype), "hard": torch.rand(N, dtype=dtype)}


def spans_of(common: dict[int, int] = COMMON, vocab: int = V, other: int = W) -> Spans:
    found = CommonIds.of(common, vocab, other)
    return Spans.of(MINE, THEIRS, THEIR_TARGETS, 6, found)


def run(loss: SpanLoss, given: dict[str, Tensor], path: str) -> tuple[Terms, list[Tensor]]:
    leaves = [given[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    student = Signal(hidden=leaves[0], head=Head(*leaves[1:], 0.7, 3.0))
    teacher = Signal(
        hidden=given["teacher_hidden"],
        head=Head(given["teacher_weight"], None, 0.8),
        spans=spans_of(),
        paired=MINE >= 0,
    )
    if path == "logits":
        student = Signal(logits=reference.head(*leaves, 0.7, 3.0))
        teacher = Signal(logits=teacher.dense(), spans=spans_of(), paired=MINE >= 0)
    terms = loss(student, teacher, Tokens(TARGETS, given["hard"], corrected=given["weights"]))
    return terms, list(torch.autograd.grad(terms.loss, leaves))


def plain(log_q: list, log_p: list, clip: float | None) -> tuple[list[float], list[list[float]]]:
    """Each token's loss before its weight, and d loss / d log q of each entry, without weights.

    In plain floats, span by span; the second is for weights of 1.
    """
    values, slopes = [0.0] * N, [[0.0] * V for _ in range(N)]
    for number in range(5):
        mine = [i for i in range(N) if MINE[i] == number]
        theirs = [j for j in range(M) if THEIRS[j] == number]
        if len(mine) == len(theirs) == 1 and COMMON.get(int(TARGETS[mine[0]])) == int(
            THEIR_TARGETS[theirs[0]]
        ):
            q, p = log_q[mine[0]], log_p[theirs[0]]
            mass = sum(math.exp(q[y]) for y in COMMON)
            for y, z in COMMON.items():
                share = math.exp(q[y]) / mass
                values[mine[0]] += share * (q[y] - p[z])
                slopes[mine[0]][y] = share * (q[y] - p[z])
            continue
        gap = sum(log_q[i][TARGETS[i]] for i in mine)
        gap -= sum(log_p[j][THEIR_TARGETS[j]] for j in theirs)
        gap = gap if clip is None else max(-clip, min(clip, gap))
        for i in mine:
            values[i] = gap / len(mine)
            slopes[i][int(TARGETS[i])] = gap
    return values, slopes


def span_weights(weights: Tensor) -> Tensor:
    """[N] the mean weight of each token's span."""
    return torch.stack([weights[n == MINE].mean() if n >= 0 else weights[0] * 0 for n in MINE])


@pytest.mark.parametrize("path", ["hidden", "logits"])
@pytest.mark.parametrize(
    ("alpha", "temperature", "scaling", "clip"),
    [(1.0, 1.0, "none", None), (0.6, 2.0, "t2", None), (1.0, 1.0, "none", 0.5)],
)
def test_value_and_gradient_are_the_formulas(
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    alpha: float,
    temperature: float,
    scaling: str,
    clip: float | None,
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", 3 * W)  # spans lie in two chunks of tokens
    monkeypatch.setattr(chunks, "MOST_TOKENS", 3)
    monkeypatch.setattr(chunks, "COPIES_ON_CPU", 1)
    given = draw()
    leaves = [given[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    z = reference.head(*leaves, 0.7, 3.0)
    w = 0.8 * given["teacher_hidden"] @ given["teacher_weight"].T
    log_q, log_p = (z / temperature).log_softmax(-1), (w / temperature).log_softmax(-1)
    values, slopes = plain(log_q.tolist(), log_p.tolist(), clip)
    scale = temperature**2 if scaling == "t2" else 1.0
    soft = scale * torch.tensor(values, dtype=torch.float64)
    hard = -z.log_softmax(-1)[torch.arange(N), TARGETS]
    want = alpha * (given["weights"] * soft).sum() + (1 - alpha) * (given["hard"] * hard).sum()
    pulls = (
        scale * span_weights(given["weights"])[:, None] * torch.tensor(slopes, dtype=torch.float64)
    )
    upstream = alpha * (pulls * log_q).sum() + (1 - alpha) * (given["hard"] * hard).sum()
    grads = torch.autograd.grad(upstream, leaves)
    terms, found = run(SpanLoss(alpha, temperature, scaling, clip), given, path)
    torch.testing.assert_close(terms.loss, want, **CLOSE)
    torch.testing.assert_close(terms.metrics["soft"], soft, **CLOSE)
    for mine, theirs in zip(found, grads, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    assert terms.metrics["one_to_one"].bool().tolist() == SINGLE.tolist()
    assert terms.metrics["paired"].bool().tolist() == (MINE >= 0).tolist()
    gaps = terms.metrics["span_gap"]
    assert gaps.isnan().tolist() == (SINGLE | (MINE < 0)).tolist()
    if clip is not None:
        assert 0 < terms.metrics["clipped"].sum() < N
        assert (terms.metrics["clipped"].bool() == (gaps.nan_to_num() > clip)).all()


@pytest.mark.parametrize("path", ["hidden", "logits"])
def test_one_tokenizer_is_the_reverse_kl(path: str) -> None:
    given = draw()
    given["teacher_hidden"], given["teacher_weight"] = (
        torch.randn(N, 6).double(),
        torch.randn(V, 6).double(),
    )
    one = torch.arange(N)
    common = CommonIds.of({i: i for i in range(V)}, V, V)
    assert common.all
    found = []
    for loss in (SpanLoss(0.6, 2.0, "t2"), DivergenceLoss(DivergenceSpec(
        "reverse_kl", temperature=2.0, temperature_scaling="t2"), 0.6)):  # fmt: skip
        leaves = [given[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
        student = Signal(hidden=leaves[0], head=Head(*leaves[1:], 0.7, 3.0))
        if path == "logits":
            student = Signal(logits=reference.head(*leaves, 0.7, 3.0))
        spans = Spans.of(one, one, TARGETS, N, common) if isinstance(loss, SpanLoss) else None
        teacher = Signal(
            hidden=given["teacher_hidden"], head=Head(given["teacher_weight"]), spans=spans
        )
        tokens = Tokens(TARGETS, given["hard"], corrected=given["weights"])
        terms = loss(student, teacher, tokens)
        found.append((terms.loss, *torch.autograd.grad(terms.loss, leaves), terms.metrics["soft"]))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


def mean_over(
    logits: list[Tensor], texts: list[tuple[list[int], float]], said: dict[tuple[int, ...], Any]
) -> tuple[Tensor, list[Tensor]]:
    """The means of value and gradient over texts: (tokens, log-probability of the sampling)."""
    mean, grads = torch.zeros((), dtype=torch.float64), [torch.zeros_like(x) for x in logits]
    for ids, log_prob in texts:
        rows, teacher, common = said[tuple(ids)]
        leaves = [x.clone().requires_grad_() for x in logits]
        student = Signal(logits=torch.stack([leaves[row] for row in rows]))
        count = torch.zeros(len(ids), dtype=torch.long)
        spans = Spans.of(count, count.new_zeros(len(teacher[1])), teacher[1], 1, common)
        signal = Signal(logits=teacher[0], spans=spans)
        terms = SpanLoss()(
            student, signal, Tokens(torch.tensor(ids), torch.ones(len(ids)).double())
        )
        mean = mean + math.exp(log_prob) * terms.loss.detach()
        for total, grad in zip(
            grads, torch.autograd.grad(terms.loss, leaves, allow_unused=True), strict=True
        ):
            if grad is not None:
                total += math.exp(log_prob) * grad
    return mean, grads


def test_means_over_the_students_own_spans_are_the_kl_and_its_gradient() -> None:
    """The student writes two tokens, the teacher one: KL(q || p) over the nine texts."""
    torch.manual_seed(0)
    logits = [torch.randn(3).double() for _ in range(4)]  # the first token, and behind each
    teacher, common = torch.randn(9).double(), CommonIds.of({}, 3, 9)
    pairs = list(itertools.product(range(3), repeat=2))
    leaves = [x.clone().requires_grad_() for x in logits]
    first = leaves[0].log_softmax(-1)
    log_q = torch.stack([first[a] + leaves[1 + a].log_softmax(-1)[b] for a, b in pairs])
    kl = (log_q.exp() * (log_q - teacher.log_softmax(-1))).sum()
    said = {(a, b): ([0, 1 + a], (teacher[None], torch.tensor([3 * a + b])), common)
            for a, b in pairs}  # fmt: skip
    texts = [(list(x), float(y)) for x, y in zip(pairs, log_q.detach(), strict=True)]
    value, grads = mean_over(logits, texts, said)
    torch.testing.assert_close(value, kl.detach(), **CLOSE)
    for mine, theirs in zip(grads, torch.autograd.grad(kl, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


def test_means_where_some_tokens_are_common_are_the_kl_and_its_gradient() -> None:
    """Five tokens, of which three are the teacher's too; it writes the others in two tokens."""
    torch.manual_seed(1)
    logits, teacher = torch.randn(5).double(), torch.randn(3, 6).double()
    common = CommonIds.of({0: 4, 1: 2, 2: 0}, 5, 6)
    own = teacher.log_softmax(-1)
    log_p = torch.stack([own[0, 4], own[0, 2], own[0, 0], own[0, 1] + own[1, 3],
                         own[0, 5] + own[2, 3]])  # fmt: skip
    leaf = logits.clone().requires_grad_()
    log_q = leaf.log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum()
    said: dict[tuple[int, ...], Any] = {
        (y,): ([0], (teacher[:1], torch.tensor([z])), common) for y, z in ((0, 4), (1, 2), (2, 0))
    }
    said |= {(3,): ([0], (teacher[:2], torch.tensor([1, 3])), common),
             (4,): ([0], (teacher[[0, 2]], torch.tensor([5, 3])), common)}  # fmt: skip
    texts = [([y], float(log_q.detach()[y])) for y in range(5)]
    value, grads = mean_over([logits], texts, said)
    torch.testing.assert_close(value, kl.detach(), **CLOSE)
    torch.testing.assert_close(grads[0], torch.autograd.grad(kl, leaf)[0], **CLOSE)


def test_tokens_without_weight_may_be_infinite() -> None:
    given, weights = draw(), torch.tensor([1, 1, 0, 1, 0, 0, 0, 1]).double()
    for odd in (math.nan, math.inf):
        logits = given["hidden"] @ given["weight"].T
        logits[[2, 5], 1] = odd
        teacher = Signal(logits=torch.ones(M, W).double(), spans=spans_of())
        leaf = logits.requires_grad_()
        terms = SpanLoss()(Signal(logits=leaf), teacher, Tokens(TARGETS, weights))
        (grad,) = torch.autograd.grad(terms.loss, leaf)
        assert terms.loss.isfinite()
        assert not grad[[2, 3, 4, 5, 6]].any()  # no weight, or in no span
        assert grad[[0, 1, 7]].all()


def test_what_is_not_finite_is_named() -> None:
    for side in ("student", "teacher"):
        given = draw()
        given["hidden" if side == "student" else "teacher_hidden"][3] = math.nan
        terms, _ = run(SpanLoss(0.5), given, "logits")
        assert not terms.loss.isfinite()
        assert side in str(not_finite(terms, Signal(logits=torch.zeros(1, 1))))


def test_a_teacher_of_no_token_leaves_the_hard_loss() -> None:
    given, none = draw(), torch.full((N,), -1)
    nothing = torch.zeros(0, dtype=torch.long)
    spans = Spans.of(none, nothing, nothing, 6, CommonIds.of(COMMON, V, W))
    logits = given["hidden"] @ given["weight"].T
    terms = SpanLoss(0.5)(
        Signal(logits=logits.requires_grad_()),
        Signal(logits=torch.zeros(0, W).double(), spans=spans),
        Tokens(TARGETS, given["weights"]),
    )
    assert not terms.metrics["soft"].any()
    assert not terms.metrics["paired"].any()
    hard = 0.5 * (given["weights"] * terms.metrics["hard"]).sum()
    torch.testing.assert_close(terms.loss.detach(), hard, **CLOSE)


def test_teachers_that_say_too_little() -> None:
    student, tokens = Signal(logits=torch.zeros(N, V)), Tokens(TARGETS, torch.ones(N))
    with pytest.raises(ValueError, match="'spans' needs batches of a SpanCollator"):
        SpanLoss()(student, Signal(logits=torch.zeros(N, V)), tokens)
    few = SparseTeacher(torch.zeros(N, 1).long(), torch.zeros(N, 1), torch.zeros(N))
    with pytest.raises(ValueError, match="a sparse signal has no logits"):
        SpanLoss()(student, Signal(sparse=few, spans=spans_of()), tokens)
    with pytest.raises(ValueError, match="temperature"):
        SpanLoss(temperature=0.0)


def gold_pairs() -> tuple[list[Any], dict[int, int], list[tuple[Any, Any]]]:
    """Two byte-level tokenizers, their common ids, and texts as (ids, spans)."""
    made = [byte_level(), byte_level(10)]
    known = [TokenBytes(x) for x in made]
    found = []
    for text in TEXTS[:5]:
        ids, cuts = zip(*(cut_text(x, text) for x in known), strict=True)
        found.append((text, ids, common_spans(*cuts)))
    return made, common_ids(*known, []), found


@GOLD
def test_trl_gold_cuts_the_same_groups() -> None:
    """And has the same tokens in common: those of one name."""
    from trl.experimental.gold.gold_trainer import ULDLoss  # noqa: PLC0415
    from trl.experimental.utils import encode_with_byte_offsets  # noqa: PLC0415

    made, common, texts = gold_pairs()
    names = [x.get_vocab() for x in made]
    assert common == {i: names[1][x] for x, i in names[0].items() if x in names[1]}
    for text, ids, spans in texts:
        theirs = [encode_with_byte_offsets(x.backend_tokenizer, [text])[0] for x in made]
        assert [x[0] for x in theirs] == list(ids)
        groups = ULDLoss._align_by_byte_offsets(*(x[1] for x in theirs))
        assert [list(map(list, x)) for x in zip(*spans, strict=True)] == list(groups)


@GOLD
def test_trl_gold_has_the_same_likelihoods() -> None:
    """Value by value where TRL's GOLD has a rule, with its "bayesian" merging.

    The same: the groups of tokens; for a group of several tokens the entry of the observed tokens,
    which is the span's likelihood; and for matched tokens, at beta 1, the sum of q (log q - log p).
    Different: GOLD does not divide by the student's mass on the matched tokens; it compares the
    other entries of a merged distribution by rank (L1), where a span here has its one likelihood;
    it weighs both parts by the share of matched ids in the vocabulary; a group counts 1 whatever
    its length, and the mean is over groups and then rows, where here a sum over spans is divided
    by tokens; end tokens are left out unless asked for; and it reads byte-level tokenizers only.
    """
    from trl.experimental.gold.gold_trainer import ULDLoss  # noqa: PLC0415

    made, common, texts = gold_pairs()
    _, ids, spans = texts[-1]
    groups = [[list(span[side]) for span in spans] for side in (0, 1)]
    sizes = [len(x) for x in made]
    torch.manual_seed(0)
    logits = [torch.randn(len(x), n).double() for x, n in zip(ids, sizes, strict=True)]
    strategy: Any = SimpleNamespace(token_merge_strategy="bayesian", beta=1.0)
    probs = [x.softmax(-1) for x in logits]
    merged = [
        ULDLoss._merge_probabilities_with_alignment_groups(strategy, *x)
        for x in zip(probs, groups, ids, strict=True)
    ]
    number = [torch.empty(len(x), dtype=torch.long) for x in ids]
    for n, span in enumerate(spans):
        for side in (0, 1):
            number[side][list(span[side])] = n
    found = CommonIds.of(common, *sizes)
    one = Spans.of(*number, torch.tensor(ids[1]), len(spans), found)
    tokens = Tokens(torch.tensor(ids[0]), torch.ones(len(ids[0])).double())
    terms = SpanLoss()(Signal(logits=logits[0]), Signal(logits=logits[1], spans=one), tokens)
    is_single = terms.metrics["one_to_one"].bool()
    assert 5 < is_single.sum() < len(ids[0]) - 5
    ends = [[ids[side][span[side][-1]] for span in spans] for side in (0, 1)]
    for n, span in enumerate(spans):
        first = span.student[0]
        if not is_single[first]:
            likelihoods = [merged[side][n, ends[side][n]].log() for side in (0, 1)]
            gap = abs(float(likelihoods[0] - likelihoods[1]))
            assert float(terms.metrics["span_gap"][first]) == pytest.approx(gap, rel=1e-12)
            continue
        row = [merged[0][n, found.student][None], merged[1][n, found.teacher][None]]
        gold = ULDLoss._compute_jsd_loss_for_matched_tokens(strategy, *row)
        value = terms.metrics["soft"][first] * row[0].sum()
        assert float(value) == pytest.approx(float(gold), rel=1e-12)
