"""Registration with torch, and every error with its text."""

import dataclasses
import logging
import math
import re

import pytest
import torch

import metal_ops
from metal_ops import (
    DivergenceSpec,
    Head,
    available_backends,
    choices,
    divergence,
    hidden_divergence,
    linear_divergence,
)
from metal_ops import _dispatch as dispatch
from metal_ops.backends import chunked
from metal_ops.selftest.inputs import randn
from tests.metal_ops.ops.test_linear import make

SPEC = DivergenceSpec("jsd", beta=0.3, temperature=2.0)


def raises(error: type[Exception], text: str):
    return pytest.raises(error, match=f"^{re.escape(text)}")


@pytest.mark.parametrize("want_stats", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("want_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_divergence(dtype, want_grad, masked, want_stats):
    student, teacher = (x.to(dtype) for x in randn(4, 9))
    mask = torch.tensor([True, False, True, True]) if masked else None
    op = torch.ops.metal_ops.divergence
    args = (student.requires_grad_(), teacher, mask, SPEC.to_text(), want_grad, want_stats, "auto")
    torch.library.opcheck(op, args)


def test_opcheck_divergence_backward():
    student, teacher = randn(4, 9)
    op = torch.ops.metal_ops.divergence_backward
    torch.library.opcheck(op, (torch.randn(4), student, teacher, SPEC.to_text(), "auto"))


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)])
@pytest.mark.parametrize("head", ["all", "shared"])
@pytest.mark.parametrize(
    ("dtype", "want_stats"),
    [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)],
)
def test_opcheck_linear_divergence(dtype, want_stats, head, needs):
    case = make(head, dtype)
    student = [None if x is None else x.detach() for x in case.student]
    teacher = case.teacher if head != "shared" else (case.teacher[0], None, None)
    needs = [need and x is not None for need, x in zip(needs, student, strict=True)]
    for x, need in zip(student, needs, strict=True):
        if need:
            x.requires_grad_()
    post = (0.5, 3.0, 1.5, None)
    args = (
        *student,
        *teacher,
        case.weights,
        case.labels,
        *post,
        0.5,
        SPEC.to_text(),
        *needs,
        want_stats,
        "auto",
        "",  # no group
        True,
    )
    torch.library.opcheck(torch.ops.metal_ops.linear_divergence, args)


def test_the_teacher_receives_no_gradient():
    student, teacher = (x.requires_grad_() for x in randn(4, 9))
    divergence(student, teacher, SPEC).sum().backward()
    assert student.grad.any()
    assert teacher.grad is None
    assert not divergence(student.detach(), teacher, SPEC).requires_grad


def test_a_backend_gets_a_contiguous_upstream(monkeypatch):
    strides, original = [], chunked.backward
    monkeypatch.setattr(
        chunked, "backward", lambda *a: strides.append(a[0].stride()) or original(*a)
    )
    student, teacher = (x.bfloat16() for x in randn(4, 9))
    divergence(student.requires_grad_(), teacher, SPEC).sum().backward()  # one number, expanded
    assert strides == [(1,)]


def test_inputs_are_left_as_they_are():
    student, teacher = randn(4, 9)
    case = make("all", torch.float32)
    mask = torch.tensor([True, False, True, True])
    held = [student, teacher, mask, *case.student, *case.teacher, case.weights, case.labels]
    before = [x.detach().clone() for x in held]
    divergence(student.requires_grad_(), teacher, SPEC, mask=mask).sum().backward()
    case.call(SPEC, 0.5).backward()
    assert all(torch.equal(x, y) for x, y in zip(held, before, strict=True))


def test_a_spec_is_frozen_and_comparable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SPEC.beta = 0.5
    assert DivergenceSpec("jsd", beta=0.3, temperature=2.0) == SPEC
    assert len({SPEC, DivergenceSpec("jsd", beta=0.3, temperature=2.0), DivergenceSpec()}) == 2
    assert DivergenceSpec() == DivergenceSpec("forward_kl", 0.5, 1.0, "none", None, "vocab_entry")


def test_a_spec_resolves_the_ends_of_beta_only():
    assert DivergenceSpec("jsd", beta=0.0).resolved().kind == "forward_kl"
    assert DivergenceSpec("jsd", beta=1.0, clip=2.0).resolved().kind == "reverse_kl"
    assert DivergenceSpec("jsd", beta=1.0, clip=2.0).resolved().clip == 2.0
    assert DivergenceSpec("forward_kl", beta=1.0).resolved().kind == "forward_kl"
    assert SPEC.resolved() is SPEC


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"kind": "kl"},
            "kind must be one of ('forward_kl', 'reverse_kl', 'jsd', 'soft_ce', 'tvd', 'skew_kl', "
            "'skew_reverse_kl', 'mixed_kl', 'alpha'), got 'kl'",
        ),
        (
            {"temperature_scaling": "t"},
            "temperature_scaling must be one of ('none', 't2'), got 't'",
        ),
        (
            {"clip_level": "row"},
            "clip_level must be one of ('vocab_entry', 'token', 'token_rescale'), got 'row'",
        ),
        ({"beta": -0.1}, "beta must be in [0, 1], got -0.1"),
        ({"beta": 1.1}, "beta must be in [0, 1], got 1.1"),
        ({"beta": math.nan}, "beta must be in [0, 1], got nan"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": -1.0}, "temperature must be positive and finite, got -1.0"),
        ({"temperature": math.inf}, "temperature must be positive and finite, got inf"),
        ({"temperature": math.nan}, "temperature must be positive and finite, got nan"),
        ({"clip": 0.0}, "clip must be positive and finite, or None, got 0.0"),
        ({"clip": -1.0}, "clip must be positive and finite, or None, got -1.0"),
        ({"clip": math.nan}, "clip must be positive and finite, or None, got nan"),
    ],
)
def test_spec_errors(fields, text):
    with raises(ValueError, text):
        DivergenceSpec(**fields)


@pytest.mark.parametrize(
    ("student", "teacher"), [((4, 9), (4, 8)), ((4, 9), (9,)), ((), ()), ((4, 0), (4, 0))]
)
def test_logits_of_wrong_shape(student, teacher):
    text = (
        "student_logits and teacher_logits must both be [..., vocab] with vocab > 0, got "
        f"{student} and {teacher}"
    )
    with raises(ValueError, text):
        divergence(torch.zeros(student), torch.zeros(teacher), SPEC)


def test_logits_on_two_devices():
    text = "student_logits and teacher_logits must be on one device, got cpu and meta"
    with raises(ValueError, text):
        divergence(torch.zeros(4, 9), torch.zeros(4, 9, device="meta"), SPEC)


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.ones(4), "torch.float32 (4,)"),
        (torch.ones(3, dtype=torch.bool), "torch.bool (3,)"),
        (torch.ones(4, 1, dtype=torch.bool), "torch.bool (4, 1)"),
    ],
)
def test_wrong_mask(mask, got):
    student, teacher = randn(4, 9)
    with raises(ValueError, f"mask must be bool of shape (4,), got {got}"):
        divergence(student, teacher, SPEC, mask=mask)


def test_unknown_backend():
    student, teacher = randn(4, 9)
    text = f"backend must be one of {('auto', *dispatch.BACKENDS)}, got 'metla'"
    with raises(ValueError, text):
        divergence(student, teacher, SPEC, backend="metla")
    with raises(ValueError, text):
        make("plain", torch.float32).call(SPEC, 1.0, backend="metla")


@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_no_backend_gives_every_reason(backend):
    ints = torch.zeros(4, 9, dtype=torch.int64)
    asked = dispatch.BACKENDS if backend == "auto" else (backend,)
    given = {n: dispatch.load(n).unsupported(ints, ints) for n in asked}
    if backend == "auto":
        given["compiled"] = dispatch._not_unasked("compiled")
    reasons = "; ".join(f"{n}: {reason}" for n, reason in given.items())
    assert reasons.endswith("chunked: needs float16, bfloat16, float32 or float64, got torch.int64")
    with raises(NotImplementedError, f"no backend for (4, 9) torch.int64 on cpu: {reasons}"):
        divergence(ints, ints, SPEC, backend=backend)
    with pytest.raises(NotImplementedError, match=r"float16.*got torch.float8_e4m3fn"):
        divergence(torch.zeros(4, 9), torch.zeros(4, 9).to(torch.float8_e4m3fn), SPEC)


def test_choices_say_what_did_the_work(monkeypatch):
    monkeypatch.setattr(dispatch, "_choices", {})
    student, teacher = randn(4, 9)
    divergence(student, teacher, SPEC)
    divergence(student, teacher.bfloat16(), DivergenceSpec("tvd", clip=1.0, clip_level="token"))
    hidden_divergence(student, teacher, "mse")
    assert choices() == {
        f"forward {SPEC.kind} cpu torch.float32 torch.float32": "chunked",
        "forward tvd clip token cpu torch.float32 torch.bfloat16": "chunked",
        "hidden_states mse cpu torch.float32 torch.float32": "chunked",
    }


def test_named_backend_is_auto_here():
    student, teacher = randn(4, 9)
    auto, named = (divergence(student, teacher, SPEC, backend=b) for b in ("auto", "chunked"))
    assert torch.equal(auto, named)


def test_available_backends():
    for device in ("cpu", "meta"):
        found = available_backends(device)
        assert tuple(found) == dispatch.BACKENDS
        assert found["metal"] == f"needs tensors on mps, got {device}"
        assert found["chunked"] is None


def test_the_choice_is_logged_once(caplog):
    dispatch._log_choice.cache_clear()
    student, teacher = randn(4, 9)
    with caplog.at_level(logging.INFO, logger="metal_ops"):
        for _ in range(2):
            divergence(student, teacher, SPEC)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "backend chunked: cpu tensors, torch.float32; not metal: needs tensors on mps, got cpu"
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"student_hidden": torch.zeros(5, 4)},
            "student_hidden must be [tokens, hidden] and student_head.weight [vocab, hidden], got "
            "(5, 4) and (9, 3)",
        ),
        (
            {"student_hidden": torch.zeros(1, 5, 3)},
            "student_hidden must be [tokens, hidden] and student_head.weight [vocab, hidden], got "
            "(1, 5, 3) and (9, 3)",
        ),
        (
            {"teacher_head": Head(torch.zeros(9))},
            "teacher_hidden must be [tokens, hidden] and teacher_head.weight [vocab, hidden], got "
            "(5, 2) and (9,)",
        ),
        (
            {"teacher_hidden": torch.zeros(6, 2)},
            "student_hidden and teacher_hidden must have the same number of tokens, got 5 and 6",
        ),
        (
            {"teacher_head": Head(torch.zeros(10, 2))},
            "student and teacher must have one vocabulary, got heads of 9 and 10 entries",
        ),
        ({"weights": torch.zeros(5, 1)}, "weights must be [tokens] = [5], got (5, 1)"),
        ({"weights": torch.zeros(4)}, "weights must be [tokens] = [5], got (4,)"),
        ({"alpha": 0.5, "labels": None}, "alpha 0.5 < 1 needs labels [tokens]; got None"),
        (
            {"labels": torch.zeros(4, dtype=torch.int64)},
            "labels must be int64 [tokens] = [5], got torch.int64 (4,)",
        ),
        (
            {"labels": torch.zeros(5)},
            "labels must be int64 [tokens] = [5], got torch.float32 (5,)",
        ),
        ({"alpha": -0.1}, "alpha must be in [0, 1], got -0.1"),
        ({"alpha": 1.5}, "alpha must be in [0, 1], got 1.5"),
        ({"alpha": math.nan}, "alpha must be in [0, 1], got nan"),
    ],
)
def test_linear_errors(change, text):
    arguments = {
        "student_hidden": torch.zeros(5, 3),
        "student_head": Head(torch.zeros(9, 3)),
        "teacher_hidden": torch.zeros(5, 2),
        "teacher_head": Head(torch.zeros(9, 2)),
        "spec": SPEC,
        "weights": torch.zeros(5),
        "labels": torch.zeros(5, dtype=torch.int64),
    }
    assert linear_divergence(**arguments).loss.item() == 0
    with raises(ValueError, text):
        linear_divergence(**(arguments | change))


def test_public_names():
    assert sorted(metal_ops.__all__) == [
        "DivergenceSpec",
        "DivergenceStats",
        "Head",
        "LinearTerms",
        "PowerSums",
        "SparseTeacher",
        "TailSamples",
        "WeightedTerms",
        "available_backends",
        "choices",
        "divergence",
        "divergence_with_stats",
        "hidden_divergence",
        "linear_divergence",
        "linear_scratch_bytes",
        "preset",
        "sparse_divergence",
        "weighted_divergence",
    ]
    assert all(hasattr(metal_ops, name) for name in metal_ops.__all__)
