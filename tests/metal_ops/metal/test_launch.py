"""What the launcher refuses, how it splits the work, and what it makes of a failing compiler."""

import re
from types import SimpleNamespace

import pytest
import torch

from metal_ops import DivergenceSpec, _dispatch, divergence
from metal_ops.backends import metal
from metal_ops.backends.errors import KernelError
from metal_ops.backends.metal import launch as launching
from metal_ops.backends.metal.launch import Source, launch_kernel
from tests.metal_ops.metal.harness import FAST
from tests.metal_ops.mslsim.translate import translate

SPREAD = Source("logits", torch.float32)
NAMES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}


def arguments() -> dict[str, torch.Tensor]:
    return {
        "logits": torch.randn(3, 8),
        "log_sum": torch.ones(3),
        "factor": torch.ones(3),
        "out": torch.zeros(3, 8),
    }


class Reporting(SimpleNamespace):
    """A kernel that reports as Metal's do."""

    def __init__(self, run, limit: int = 1024, width: int = 32):
        super().__init__(run=run, max_threads_per_threadgroup=limit, thread_execution_width=width)

    def __call__(self, *args, **sizes):
        self.run(*args, **sizes)


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("logits", torch.zeros(3, 8).half(), TypeError, "logits must be torch.float32, got"),
        ("factor", torch.ones(3).double(), TypeError, "factor must be torch.float32, got"),
        ("factor", torch.ones(6)[::2], ValueError, "factor must be contiguous, got strides (2,)"),
        ("factor", torch.ones(0), ValueError, "factor must not be empty, got (0,)"),
        ("log_sum", torch.ones(3, device="meta"), ValueError, "log_sum must be on cpu, got meta"),
        ("out", torch.zeros(3, 9), ValueError, "out must be (3, 8), got (3, 9)"),
        ("out", torch.zeros(8, 3).T, ValueError, "out must have contiguous rows, got"),
        ("logits", torch.zeros(8, 3).T, ValueError, "logits must have contiguous rows, got"),
        (
            "out",
            torch.zeros(12).as_strided((3, 8), (2, 1)),
            ValueError,
            "rows of out must not overlap, got strides (2, 1)",
        ),
    ],
)
def test_refusals(name, value, error, text, fast):
    given = arguments()
    launch_kernel(SPREAD, "spread", *given.values(), floats=(1.0,))
    with pytest.raises(error, match=re.escape(text)):
        launch_kernel(SPREAD, "spread", *(given | {name: value}).values(), floats=(1.0,))


def test_a_written_buffer_overlaps_no_other(fast):
    given = arguments()
    room = torch.zeros(4, 8)
    text = "out is written and must not overlap logits"
    for first in (0, 1):
        given |= {"logits": room[:3], "out": room[first : first + 3]}
        with pytest.raises(ValueError, match=text):
            launch_kernel(SPREAD, "spread", *given.values(), floats=(1.0,))
    given |= {"logits": torch.zeros(6, 8)[:3], "out": torch.zeros(6, 8)[3:]}
    launch_kernel(SPREAD, "spread", *given.values(), floats=(1.0,))
    halves = torch.zeros(6, 8)
    given |= {"logits": halves[:3], "out": halves[3:]}
    launch_kernel(SPREAD, "spread", *given.values(), floats=(1.0,))


def test_arguments_are_counted(fast):
    tensors = tuple(arguments().values())
    with pytest.raises(TypeError, match="got 3 tensors"):
        launch_kernel(SPREAD, "spread", *tensors[:3], floats=(1.0,))
    with pytest.raises(TypeError, match=r"got 4 tensors, \['long'\] lists"):
        launch_kernel(SPREAD, "spread", *tensors)


def test_an_expanded_teacher_is_read_as_it_is(fast):
    student, teacher = torch.randn(4, 9), torch.randn(9).expand(4, 9)
    spec = DivergenceSpec("jsd")
    got, want = (
        divergence(student, x, spec, backend="metal") for x in (teacher, teacher.contiguous())
    )
    assert torch.equal(got, want)


def test_dispatches_are_short(monkeypatch):
    """The rows in several dispatches, whose results do not tell."""
    student, teacher = torch.randn(2, 7, 100)
    student.requires_grad_()
    results, counted = [], []

    def counting(text: str) -> SimpleNamespace:
        library = FAST(text)

        def watched(kernel):
            def run(*args, threads, group_size):
                counted.append(threads)
                kernel(*args, threads=threads, group_size=group_size)

            return Reporting(run)

        return SimpleNamespace(**{k: watched(getattr(library, k)) for k in dir(library)})

    with metal.simulated(counting):
        for most in (2**31, 250, 1):
            monkeypatch.setattr(launching, "MAX_ENTRIES", most)
            loss = divergence(student, teacher, DivergenceSpec("jsd"), backend="metal")
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), student)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    # the gradient comes with the loss, as two kernels
    assert counted == [7 * 32] * 2 + [64, 64, 64, 32] * 2 + [32] * 14


@pytest.mark.parametrize(
    ("width", "limit", "group"),
    [
        (1, 1024, 32),
        (128, 1024, 32),
        (129, 1024, 64),
        (1000, 1024, 256),
        (4096, 1024, 1024),
        (151_936, 1024, 1024),
        (151_936, 448, 448),
        (100, 32, 32),
    ],
)
def test_group_size(width, limit, group):
    assert launching.group_size(width, limit) == group


def broken(error: Exception | None = None, **attributes: int):
    """A host whose compiler raises, or whose kernels report something."""

    def compile_shader(text: str):
        if error is not None:
            raise error
        return SimpleNamespace(divergence_forward=Reporting(None, **attributes))

    return compile_shader


@pytest.mark.parametrize(
    ("host", "text"),
    [
        (broken(SyntaxError("program_source:3: no")), "program_source:3: no"),
        (broken(RuntimeError("Failed to create pipeline")), "Failed to create pipeline"),
        (broken(limit=16), "needs groups of 32, limit is 16"),
        (broken(width=16), "needs simdgroups of 32, got 16"),
    ],
)
def test_a_kernel_that_the_device_refuses(host, text, monkeypatch):
    for memory in ("_refusals", "_warned"):  # of this process
        monkeypatch.setattr(_dispatch, memory, type(getattr(_dispatch, memory))())
    student, teacher = torch.randn(2, 3, 33).half()
    spec = DivergenceSpec("jsd", clip=0.5)
    with metal.simulated(host):
        with pytest.raises(KernelError) as caught:
            divergence(student, teacher, spec, backend="metal")
        assert caught.value.kernel == "divergence_forward jsd entries half"
        assert caught.value.text == text
        with pytest.warns(RuntimeWarning, match="the metal backend .* failed"):
            auto = divergence(student, teacher, spec)
    assert torch.equal(auto, divergence(student, teacher, spec, backend="chunked"))


def test_a_kernel_that_is_not_there():
    with (
        metal.simulated(lambda text: FAST(launching.text(SPREAD))),
        pytest.raises(KernelError, match="Failed to create function state object for: mse"),
    ):
        metal.KERNELS.hidden_states(torch.ones(1, 4), torch.ones(1, 4), torch.ones(1), "mse", None)


def test_a_limit_is_rounded_to_simdgroups(fast):
    sizes = []
    run = lambda *_, group_size, threads: sizes.append((group_size, threads))
    host = lambda text: SimpleNamespace(spread=Reporting(run, limit=100))
    with metal.simulated(host):
        given = arguments() | {"logits": torch.zeros(3, 999), "out": torch.zeros(3, 999)}
        launch_kernel(SPREAD, "spread", *given.values(), floats=(1.0,))
    assert sizes == [(96, 288)]


def test_a_text_is_compiled_once_for_all_its_kernels():
    texts = []

    def host(text: str):
        texts.append(text)
        return FAST(text)

    student = torch.randn(3, 9, requires_grad=True)
    with metal.simulated(host):
        for beta in (0.1, 0.2):
            for _ in range(2):
                spec = DivergenceSpec("jsd", beta)
                loss = divergence(student, torch.randn(3, 9), spec, backend="metal")
                torch.autograd.grad(loss.sum(), student)
        divergence(student, torch.randn(3, 9), DivergenceSpec("tvd"), backend="metal")
    assert texts == [
        launching.text(Source("divergence", torch.float32, kind)) for kind in ("jsd", "tvd")
    ]


def test_unsupported(monkeypatch):
    x, narrow = torch.ones(2, 3), torch.ones(2, 3).half()
    assert metal.unsupported(x, x) == "needs tensors on mps, got cpu"
    with metal.simulated(FAST):
        assert metal.unsupported(x, narrow) is None
        want = "needs float32, float16 or bfloat16, got torch.float64"
        assert metal.unsupported(x, x.double()) == want
        assert metal.unsupported(x, x.to("meta")) == "needs tensors on cpu, got meta"
        long = torch.empty(1, 1).expand(1, 2**31)
        want = "needs rows of at most 2147483647 entries, got 2147483648"
        assert metal.unsupported(long, long) == want
    assert metal.unsupported(x, x) == "needs tensors on mps, got cpu"
    monkeypatch.setattr(launching, "_host", launching.Host(None, "cpu"))
    want = f"torch {torch.__version__} has no torch.mps.compile_shader"
    assert metal.unsupported(x, x) == want


def test_the_texts():
    """What the launcher reads of a text is what a compiler reads."""
    every = list(launching.sources())
    assert len(every) == 3 * (9 * 2 + 2)
    for source in every:
        if source.dtype != torch.bfloat16 and source.kind not in ("", "jsd"):
            continue
        text = launching.text(source)
        assert text.isascii()
        kernels = translate(text, "cpu", "text").kernels
        assert [k.name for k in kernels] == [n for n, _ in launching.KERNEL.findall(text)]
        for kernel in kernels:
            found = launching.parameters(source, kernel.name)
            for p, want in zip(found, kernel.buffers, strict=True):
                assert p.name == want.name
                assert (NAMES[source.dtype] if p.type == "T" else p.type) == want.base
                assert (p.list, p.written) == (want.space == "constant", not want.constant)
