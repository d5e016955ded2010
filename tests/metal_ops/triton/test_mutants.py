"""Mistakes planted in the kernels' text: each is seen by a check that passes without it."""

import importlib.util
import multiprocessing
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from metal_ops import DivergenceSpec
from metal_ops.backends import triton
from metal_ops.backends.errors import KernelError
from metal_ops.selftest.inputs import FAMILIES
from tests.metal_ops.ops import test_hidden as hidden
from tests.metal_ops.ops import test_special_values as special
from tests.metal_ops.ops import test_values as values
from tests.metal_ops.ops.again import use
from tests.metal_ops.triton import test_kernels as kernels
from tests.metal_ops.triton import test_memory as memory
from tests.metal_ops.triton.interpreter import DEVICE, KERNELS
from tests.metal_ops.triton.memory import Watch
from tests.metal_ops.triton.test_suite import narrow

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE != "cpu", reason="plants its mistakes in the interpreter"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
SEEN = (AssertionError, KernelError)
Check = Callable[[pytest.MonkeyPatch], None]


def rule(
    kind: str,
    family: str,
    patch: pytest.MonkeyPatch,
    units: int = 0,
    masked: str = "",
    temperature: float = 2.0,
) -> None:
    """Value and gradient in many blocks, by the rule of `numerics`."""
    narrow(patch, units)
    student, teacher = FAMILIES[family](4, 97)
    if masked:
        (student if masked == "student" else teacher)[:, ::3] = -torch.inf
    values.check(student, teacher, DivergenceSpec(kind, 0.3, temperature=temperature), kind)


def clips(patch: pytest.MonkeyPatch) -> None:
    narrow(patch, 0)
    values.test_clip_is_autograd_of_the_definition("jsd", "vocab_entry", torch.float32)


def ends_of_beta(_: pytest.MonkeyPatch) -> None:
    special.test_jsd_near_the_ends_of_beta(1 - 1e-9, "peaked")
    special.test_a_mixture_far_below_the_least_number()


def statistics(patch: pytest.MonkeyPatch) -> None:
    narrow(patch, 64)
    special.test_stats("peaked", torch.float32)


def watched(test: Callable[..., None], *arguments: object) -> Check:
    """A test of memory, with its fixture."""

    def check(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(triton, "MAX_BLOCK", 32)
        test(*arguments, Watch(patch))

    return check


def forward_reads(units: int, patch: pytest.MonkeyPatch) -> None:
    narrow(patch, units)
    memory.test_forward_reads_each_row_twice(units, torch.float32, Watch(patch), patch)


def log_sums(units: int, patch: pytest.MonkeyPatch) -> None:
    kernels.test_log_sums(1025, torch.float32, units, patch)


def labels(patch: pytest.MonkeyPatch) -> None:
    for alpha in (0.0, 0.5):
        kernels.test_the_hard_term_alone_and_mixed(alpha)


def hidden_rows(kind: str, family: str, patch: pytest.MonkeyPatch) -> None:
    hidden.test_value_and_gradient(kind, torch.float32, family)


def far_rows(patch: pytest.MonkeyPatch) -> None:
    """In a process of its own: a wrong offset may end it."""
    child = multiprocessing.get_context("fork").Process(target=kernels.test_rows_beyond_2_to_the_31)
    child.start()
    child.join()
    assert child.exitcode == 0


TERMS, ROWS, HIDDEN = KERNELS


class Mutant(NamedTuple):
    """`old`, which the module's text has, becomes `new`; `check` sees it."""

    module: str
    old: str
    new: str
    check: Check


def near(kind: str) -> Check:
    spec = DivergenceSpec(kind, 0.3)
    return lambda _: special.test_nearly_equal_rows_are_not_negative(spec, 1e-5)


def far(kind: str, **options: object) -> Check:
    return lambda patch: rule(kind, "peaked", patch, **options)  # pyright: ignore[reportArgumentType]


ID = "tl.program_id(0).to(tl.int64), tl.program_id(1)"
MUTANTS = {
    "mixture: no room below": Mutant(TERMS, "2.0**64", "1.0", ends_of_beta),
    "0 * inf": Mutant(
        TERMS,
        "tl.where(weight == 0, 0.0, weight * value)",
        "weight * value",
        far("reverse_kl", masked="student"),
    ),
    "expm1: a coefficient": Mutant(TERMS, "(1 / 24 +", "(1 / 20 +", far("forward_kl")),
    "log1p: a coefficient": Mutant(TERMS, "(1 / 3 +", "(1 / 2 +", far("jsd")),
    "difference: the sign": Mutant(TERMS, "> 0, less, -less", "> 0, -less, less", far("tvd")),
    "mixture: beta swapped": Mutant(TERMS, "beta * a + rest", "rest * a + beta", far("jsd")),
    "kl: zero left out": Mutant(
        TERMS, "ratio), difference,", "ratio), 0 * difference,", near("forward_kl")
    ),
    "jsd: h without its share": Mutant(TERMS, "h = rest * q *", "h = q *", far("jsd")),
    "skew kl: h": Mutant(TERMS, "-rest * rest * q", "-rest * beta * q", far("skew_kl")),
    "skew reverse kl: zero": Mutant(
        TERMS, "rest * (p - q)", "rest * (q - p)", near("skew_reverse_kl")
    ),
    "alpha: near everywhere": Mutant(
        TERMS, "far > -1", "far > -1000", far("alpha", temperature=0.5)
    ),
    "tvd: the slope below": Mutant(TERMS, "-0.5 * q, d", "0.5 * q, d", far("tvd")),
    "running sum not rescaled": Mutant(ROWS, "total * e + 1", "total + 1", far("jsd")),
    "lanes put together as they are": Mutant(
        ROWS, "total * tl.exp((top - largest) * inv_t), 0)", "total, 0)", far("jsd")
    ),
    "a column too many": Mutant(ROWS, "cols < last\n", "cols <= last\n", partial(forward_reads, 0)),
    "a split's end overrun": Mutant(
        ROWS, "tl.minimum(first + columns, vocab)", "vocab", far("jsd", units=64)
    ),
    "the last column left out": Mutant(
        ROWS,
        "(student, cols, cols < last), _load",
        "(student, cols, cols < last - 1), _load",
        far("reverse_kl"),
    ),
    "row offset of 32 bits": Mutant(
        ROWS,
        f"row, split = {ID}\n    slot",
        "row, split = tl.program_id(0), tl.program_id(1)\n    slot",
        far_rows,
    ),
    "gradient's row offset of 32 bits": Mutant(
        ROWS, "row, cols = tl.program_id(0).to(tl.int64)", "row, cols = tl.program_id(0)", far_rows
    ),
    "a row that does not count is read": Mutant(
        ROWS,
        "    if tl.load(weights + row) != 0:\n        student +=",
        "    if row >= 0:\n        student +=",
        partial(forward_reads, 0),
    ),
    "backwards past the start": Mutant(
        ROWS, "tl.cdiv(last - first, BLOCK) * BLOCK", "(last - first)", partial(forward_reads, 0)
    ),
    "temperature left out": Mutant(
        ROWS, "(y_less - x_less) * inv_t - apart", "(y_less - x_less) - apart", far("reverse_kl")
    ),
    "the sums' ratio upside down": Mutant(
        ROWS, "inv_t - apart", "inv_t + apart", far("reverse_kl")
    ),
    "f + zero": Mutant(ROWS, "f += zero", "f += 0.0", near("forward_kl")),
    "clipped entries keep their slope": Mutant(ROWS, "tl.where(over, 0.0, h)", "h", clips),
    "clipped entries keep their slope in the gradient": Mutant(
        ROWS, "h = tl.where(f > bound, 0.0, h)", "h = h", clips
    ),
    "agreement of any": Mutant(ROWS, "(x == x_top) & (y", "(x == x_top) | (y", statistics),
    "entropy of both": Mutant(ROWS, "0.0, q * log_q", "0.0, p * log_q", statistics),
    "splits: log-sums counted each": Mutant(
        ROWS, "tl.where(split == 0, q_log_sum, 0.0)", "q_log_sum", far("jsd", units=64)
    ),
    "splits: the student's sums for both": Mutant(
        ROWS, "tl.load(part + 2 * plane)", "tl.load(part)", far("jsd", units=64)
    ),
    "softmax term left out": Mutant(ROWS, "(h - q * h_sum)", "h", far("reverse_kl")),
    "the student read for nothing": Mutant(
        ROWS,
        "inside & needed",
        "inside",
        watched(memory.test_backward_reads_and_writes_once, "jsd", False),
    ),
    "the teacher read for the labels": Mutant(
        ROWS,
        "cols, inside & soft",
        "cols, inside",
        watched(memory.test_the_hard_term_reads_the_student_alone),
    ),
    "the first row's label": Mutant(ROWS, "tl.load(labels + row)", "tl.load(labels)", labels),
    "labels without their share": Mutant(ROWS, "share * (tl.exp", "(tl.exp", labels),
    "bits: half a word": Mutant(ROWS, "cols & 31", "cols & 15", partial(log_sums, 0)),
    "kept entries forgotten": Mutant(
        ROWS, "tl.where(kept, new_total, kept_total)", "kept_total", partial(log_sums, 0)
    ),
    "splits of log-sums: the rest twice": Mutant(
        ROWS, "_merge(tl.load(slot + 2 * plane)", "_merge(tl.load(slot)", partial(log_sums, 64)
    ),
    "spread without its factor": Mutant(
        ROWS,
        "e = scale * tl.exp",
        "e = tl.exp",
        lambda _: kernels.test_spread_in_place(torch.float32),
    ),
    "mse: half a slope": Mutant(
        HIDDEN, "weight * 2", "weight", partial(hidden_rows, "mse", "randn")
    ),
    "cosine: one length for both": Mutant(
        HIDDEN,
        "tl.where(near, apart, a)",
        "tl.where(near, 0.0, a)",
        partial(hidden_rows, "cosine", "randn"),
    ),
    "cosine: short rows": Mutant(
        HIDDEN, "(1 - ratio) * (1 + ratio)", "0 * ratio", partial(hidden_rows, "cosine", "lengths")
    ),
    "cosine: slope of a short row": Mutant(
        HIDDEN,
        "constant = s_norm < NORM_MIN",
        "constant = s_norm < 0",
        partial(hidden_rows, "cosine", "lengths"),
    ),
}


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the Triton backend, whose failures raise."""
    monkeypatch.setenv("METAL_OPS_STRICT", "1")
    use(triton, monkeypatch)


def plant(mutant: Mutant, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Load the kernels anew, from files that differ in the mutant's text."""
    for name in KERNELS:
        original = importlib.util.find_spec(f"metal_ops.backends.triton.{name}")
        assert original is not None
        assert original.origin is not None
        text = Path(original.origin).read_text()
        if name == mutant.module:
            assert mutant.old in text, "the kernels no longer say this"
            text = text.replace(mutant.old, mutant.new, 1)
        path = folder / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(original.name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, original.name, module)
        spec.loader.exec_module(module)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_seen(name, tmp_path, monkeypatch):
    mutant = MUTANTS[name]
    with monkeypatch.context() as patch:
        mutant.check(patch)
    plant(mutant, tmp_path, monkeypatch)
    with pytest.raises(SEEN):
        mutant.check(monkeypatch)
