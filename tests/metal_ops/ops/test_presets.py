"""Every preset against its library where that is installed, else against its formula in float64."""

import dataclasses
import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from metal_ops import DivergenceSpec, Head, SparseTeacher, divergence, linear_divergence, preset
from metal_ops import sparse_divergence as sparse
from metal_ops.presets import NAMES

V, K = 33, 5
BETAS = (0.0, 0.3, 0.5, 1.0)
RTOL = 1e-9  # measured: 2e-13, both sides in float64
EXPERIMENTAL = pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")


def pair(tokens: int = 6) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher, of some peak: each kept top 5 leaves a tail worth a test."""
    return 2 * torch.randn(tokens, V).double(), 2 * torch.randn(tokens, V).double()


def value_and_grad(function, student: Tensor, weights: Tensor | float = 1.0):
    leaf = student.detach().clone().requires_grad_()
    loss = function(leaf)
    return loss.detach(), torch.autograd.grad((weights * loss).sum(), leaf)[0]


def check(spec: DivergenceSpec, peer, student: Tensor, teacher: Tensor, rtol: float = RTOL) -> None:
    """Losses per token and their gradients, of a weighted sum; peer takes both sides' logits."""
    weights = torch.rand(len(student)).double()
    got = value_and_grad(lambda x: divergence(x, teacher, spec), student, weights)
    want = value_and_grad(lambda x: peer(x, teacher), student, weights)
    assert want[0].shape == student.shape[:1]
    assert want[0].abs().min() > 1e-3  # something to compare
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=rtol, atol=rtol * 1e-2)


# --- formulas, of probabilities


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    weight = (logits / temperature).exp()
    return weight / weight.sum(-1, keepdim=True)


def kl(x: Tensor, y: Tensor) -> Tensor:
    return (x * (x / y).log()).sum(-1)


def jsd_terms(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """Eq. (1) of arXiv:2306.13649 and the ends GKD gives it, p the teacher: not yet summed."""
    if beta == 0.0:
        return p * (p / q).log()
    if beta == 1.0:
        return q * (q / p).log()
    m = beta * p + (1 - beta) * q
    return beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()


def on_teachers_best(student: Tensor, teacher: Tensor, temperature: float, k: int | None):
    """(p, q) [N, k or V], renormalised over the teacher's k best entries."""
    if k is not None:
        best = teacher.argsort(-1, descending=True)[:, :k]
        student, teacher = student.gather(-1, best), teacher.gather(-1, best)
    return probabilities(teacher, temperature), probabilities(student, temperature)


# --- TRL


def rows(function):
    """A loss of a whole batch as one of each token."""
    return lambda x, y: torch.stack([function(x[i : i + 1], y[i : i + 1]) for i in range(len(x))])


@EXPERIMENTAL
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_trl_gkd(beta, temperature):
    from trl.experimental.gkd import GKDTrainer  # noqa: PLC0415

    loss = rows(
        lambda x, y: GKDTrainer.generalized_jsd_loss(x, y, beta=beta, temperature=temperature)
    )
    check(preset("trl_gkd", beta=beta, temperature=temperature), loss, *pair())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_trl_distillation(beta, temperature):
    """TRL projects and sums in float32: a row of 33 terms is good to some 1e-6 of its largest."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: PLC0415

    inputs = [torch.randn(n, h) / h**0.25 for n, h in ((6, 8), (V, 8), (6, 12), (V, 12))]
    weights = torch.rand(6)
    leaves = [x.clone().requires_grad_() for x in inputs[:2]]
    apply: Any = ChunkedDivergenceFunction.apply
    per_token, _ = apply(leaves[0], leaves[1], None, inputs[2], inputs[3], None, beta, temperature)
    want = (weights * per_token).sum()
    spec = preset("trl_distillation", beta=beta, temperature=temperature)
    wide = [x.double().requires_grad_() for x in inputs]
    heads = Head(wide[1]), Head(wide[3])
    out = linear_divergence(wide[0], heads[0], wide[2], heads[1], spec, weights=weights.double())
    got = out.loss
    torch.testing.assert_close(want.double(), got, rtol=1e-5, atol=0.0)
    for theirs, ours in zip(
        torch.autograd.grad(want, leaves), torch.autograd.grad(got, wide[:2]), strict=True
    ):
        assert (theirs - ours).abs().max() < 1e-5 * ours.abs().max()


@EXPERIMENTAL
@pytest.mark.parametrize(
    ("topk", "add_tail"), [(None, False), (1, True), (K, False), (K, True), (V - 1, True)]
)
@pytest.mark.parametrize("alpha", BETAS)
@pytest.mark.parametrize("name", ["sdft", "sdpo"])
def test_trl_self_distillation(name, alpha, topk, add_tail):
    """TRL's tail is one less the kept mass: of a tail of 1e-4 it knows 12 digits."""
    if name == "sdft":
        from trl.experimental.sdft import loss_utils  # noqa: PLC0415
    else:
        from trl.experimental.sdpo import loss_utils  # noqa: PLC0415

    def peer(x: Tensor, y: Tensor) -> Tensor:
        if topk is None:
            return loss_utils.compute_full_logit_self_distillation_loss(
                x / 2, y / 2, distillation_alpha=alpha
            )
        return loss_utils.compute_topk_self_distillation_loss(
            x / 2,  # as the trainer does
            y / 2,
            distillation_topk=topk,
            distillation_alpha=alpha,
            distillation_add_tail=add_tail,
        )

    spec = preset(
        name,
        distillation_alpha=alpha,
        distillation_topk=topk,
        distillation_add_tail=add_tail,
        temperature=2.0,
    )
    check(spec, peer, *pair())


@EXPERIMENTAL
def test_defaults_of_trl():
    from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: PLC0415
    from trl.experimental.sdft import SDFTConfig  # noqa: PLC0415
    from trl.experimental.sdpo import SDPOConfig  # noqa: PLC0415
    from trl.trainer.distillation_config import DistillationConfig  # noqa: PLC0415

    def of(config, *names: str) -> dict:
        fields = {f.name: f.default for f in dataclasses.fields(config)}
        return {name: fields[name] for name in names}

    loss = inspect.signature(GKDTrainer.generalized_jsd_loss).parameters
    temperature = {"temperature": loss["temperature"].default}
    distillation = [f"distillation_{x}" for x in ("alpha", "topk", "add_tail")]
    assert of(SDFTConfig, "distillation_mode") == {"distillation_mode": "topk_logits"}
    for name, defaults in {
        "trl_gkd": of(GKDConfig, "beta") | temperature,
        "trl_distillation": of(DistillationConfig, "beta", "temperature"),
        "sdft": of(SDFTConfig, *distillation, "temperature"),
        "sdpo": of(SDPOConfig, *distillation, "temperature"),
    }.items():
        assert preset(name) == preset(name, **defaults)


# --- Liger


@pytest.fixture
def liger():
    reason = "liger-kernel is not installed (pip install --no-deps liger-kernel==0.8.5)"
    return pytest.importorskip("liger_kernel.chunked_loss.jsd_loss", reason=reason)


@pytest.mark.parametrize("beta", BETAS)
def test_liger_jsd(liger, beta):
    """Logits come to the function divided by the temperature."""
    function = liger.LigerFusedLinearJSDFunction.distillation_loss_fn
    spec = preset("liger_jsd", beta=beta, temperature=2.0)
    check(spec, rows(lambda x, y: function(x / 2, y / 2, beta=beta)), *pair())


@pytest.mark.parametrize("beta", BETAS)
def test_liger_jsd_of_hidden_states(liger, beta):
    """Without labels' share; Liger adds up the loss in float32 but not the gradients."""
    hidden, teacher_hidden = torch.randn(6, 8).double(), torch.randn(6, 12).double()
    weight, teacher_weight = torch.randn(V, 8).double(), torch.randn(V, 12).double()
    labels = torch.tensor([3, -100, 0, 5, -100, 1])
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    theirs = liger.LigerFusedLinearJSDLoss(
        0.0, 1.0, beta, temperature=2.0, compiled=False, chunk_size=4
    )(hidden, weight, teacher_hidden, teacher_weight, labels)
    want = torch.autograd.grad(theirs, leaves)
    ours = linear_divergence(
        hidden,
        Head(weight),
        teacher_hidden,
        Head(teacher_weight),
        preset("liger_jsd", beta=beta, temperature=2.0),
        weights=(labels != -100) / 4,
    ).loss
    torch.testing.assert_close(theirs.double(), ours, rtol=1e-6, atol=0.0)
    for g, w in zip(torch.autograd.grad(ours, leaves), want, strict=True):
        torch.testing.assert_close(g, w, rtol=RTOL, atol=RTOL * 1e-2)


def test_defaults_of_liger(liger):
    arguments = inspect.signature(liger.LigerFusedLinearJSDLoss.__init__).parameters
    defaults = {name: arguments[name].default for name in ("beta", "temperature")}
    assert preset("liger_jsd") == preset("liger_jsd", **defaults)


# --- libraries that are not here


@pytest.mark.parametrize("top_k", [None, K])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", ["opsd", "opsd_clip", "ms_swift_gkd"])
def test_opsd_and_ms_swift(name, beta, temperature, top_k):
    clip = 0.02 if name == "opsd_clip" else math.inf
    clipped = 0

    def peer(x: Tensor, y: Tensor) -> Tensor:
        nonlocal clipped
        terms = jsd_terms(*on_teachers_best(x, y, temperature, top_k), beta)
        clipped = int((terms > clip).sum())
        return torch.where(terms > clip, clip, terms).sum(-1)

    arguments = {"gkd_logits_topk" if name == "ms_swift_gkd" else "top_k": top_k}
    arguments |= {"token_clip": clip} if name == "opsd_clip" else {}
    spec = preset(name, beta=beta, temperature=temperature, **arguments)
    check(spec, peer, *pair())
    assert bool(clipped) == (name == "opsd_clip")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.7])
def test_kdflow_jsd(beta, temperature):
    def peer(x: Tensor, y: Tensor) -> Tensor:
        q, p = probabilities(x, temperature), probabilities(y, temperature)
        m = beta * q + (1 - beta) * p
        return beta * kl(q, m) + (1 - beta) * kl(p, m)

    spec = preset("kdflow_jsd", beta=beta, temperature=temperature)
    check(spec, peer, *pair())


@pytest.mark.parametrize("k", [None, K])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weight", BETAS)
def test_nemo_mixed(weight, temperature, k):
    def peer(x: Tensor, y: Tensor) -> Tensor:
        p, q = on_teachers_best(x, y, temperature, k)
        return weight * kl(p, q) + (1 - weight) * kl(q, p)

    spec = preset("nemo_mixed", mixed_kl_weight=weight, topk_logits_k=k, temperature=temperature)
    check(spec, peer, *pair())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillkit_of_all_entries(temperature):
    def peer(x: Tensor, y: Tensor) -> Tensor:
        return temperature**2 * kl(probabilities(y, temperature), probabilities(x, temperature))

    for missing in ("zero", "symmetric_uniform"):
        spec = preset("distillkit_kl", temperature=temperature, missing=missing)
        check(spec, peer, *pair())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("missing", ["zero", "symmetric_uniform"])
def test_distillkit_of_a_few_entries(missing, temperature):
    """The teacher's K best probabilities are known, at temperature 1."""
    student, teacher = pair()
    known, ids = probabilities(teacher, 1.0).topk(K)
    p, r = known ** (1 / temperature), torch.zeros(len(known)).double()
    if missing == "symmetric_uniform":
        r = (1 - known.sum(-1)) ** (1 / temperature)
    p, r = p / (p.sum(-1) + r)[:, None], r / (p.sum(-1) + r)

    def peer(x: Tensor) -> Tensor:
        q = probabilities(x, temperature).gather(-1, ids)
        loss = kl(p, q)
        if missing == "symmetric_uniform":
            loss = loss + r * (r / (1 - q.sum(-1))).log()
        return temperature**2 * loss

    cached = SparseTeacher(ids, p.log(), r.log(), temperature)
    spec = preset("distillkit_kl", temperature=temperature, missing=missing)
    got = value_and_grad(lambda x: sparse(x, cached, spec), student)
    for g, w in zip(got, value_and_grad(peer, student), strict=True):
        torch.testing.assert_close(g, w, rtol=RTOL, atol=RTOL * 1e-2)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_hinton(temperature):
    def peer(x: Tensor, y: Tensor) -> Tensor:
        p, q = probabilities(y, temperature), probabilities(x, temperature)
        return -(temperature**2) * (p * q.log()).sum(-1)

    spec = preset("hinton", temperature=temperature)
    check(spec, peer, *pair())


# --- the door


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("opsd", {"beta": 0.5, "temperature": 1.0, "top_k": None}),
        ("opsd_clip", {"beta": 0.5, "temperature": 1.0, "top_k": None, "token_clip": 0.05}),
        ("ms_swift_gkd", {"beta": 0.5, "temperature": 0.9, "gkd_logits_topk": None}),
        ("kdflow_jsd", {"beta": 0.5, "temperature": 1.0}),
        ("nemo_mixed", {"mixed_kl_weight": 0.5, "topk_logits_k": 64, "temperature": 1.0}),
        ("distillkit_kl", {"temperature": 1.0, "missing": "zero"}),
    ],
)
def test_defaults_of_the_others(name, arguments):
    """As read in the sources that the docstrings name."""
    assert preset(name) == preset(name, **arguments)


@pytest.mark.parametrize("name", NAMES)
def test_presets_exist_and_travel_as_text(name):
    spec = preset(name)
    assert DivergenceSpec.from_text(spec.to_text()) == spec


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("trl", {}, r"preset must be one of .* got 'trl'"),
        ("kdflow_jsd", {"beta": 1}, r"beta of kdflow_jsd must be in \(0, 1\), got 1"),
        ("kdflow_jsd", {"beta": 0}, r"beta of kdflow_jsd must be in \(0, 1\), got 0"),
        (
            "distillkit_kl",
            {"missing": "tail"},
            r"missing of distillkit_kl must be one of \('zero', 'symmetric_uniform'\), got 'tail'",
        ),
    ],
)
def test_errors(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        preset(name, **arguments)
