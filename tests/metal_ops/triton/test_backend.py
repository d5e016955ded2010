"""What the Triton backend refuses, how it cuts rows up, and what becomes of a kernel's failure."""

import contextlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metal_ops import DivergenceSpec
from metal_ops.backends import triton
from metal_ops.backends.errors import KernelError
from tests.metal_ops.triton import interpreter

K = triton.KERNELS
X = torch.zeros(2, 8)


def on(device: str, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


def test_takes_what_the_kernels_read():
    x = X.to(interpreter.DEVICE)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert triton.unsupported(x.to(dtype), x) is None
    reason = triton.unsupported(x, x.double())
    assert reason == "needs float32, float16 or bfloat16, got torch.float64"


def test_refuses_the_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.delenv(interpreter.NAME, raising=False)
    assert triton.unsupported(X, X) == "needs tensors on cuda or xpu, got cpu"
    monkeypatch.setenv(interpreter.NAME, "0")
    assert triton.unsupported(X, X) == "needs tensors on cuda or xpu, got cpu"


def test_refuses_other_devices():
    x = X.to("meta")
    assert triton.unsupported(x, x) == "needs tensors on cuda or xpu, got meta"
    assert triton.unsupported(on("mps"), on("mps")) == "needs tensors on cuda or xpu, got mps"


def test_refuses_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reason = "Triton is not installed (pip install triton)"
    for device in ("cuda:0", "xpu:0"):
        assert triton.unsupported(on(device), on(device)) == reason


def test_refuses_old_nvidia_gpus(monkeypatch):
    for capability, reason in {
        (6, 1): "needs compute capability 7.0 or higher, got 6.1",
        (7, 0): None,
        (9, 0): None,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        monkeypatch.setattr(torch.version, "hip", None)
        assert triton.unsupported(on("cuda:0"), on("cuda:0")) == reason
        monkeypatch.setattr(torch.version, "hip", "7.0")  # AMD counts otherwise
        assert triton.unsupported(on("cuda:0"), on("cuda:0")) is None


@pytest.mark.parametrize("method", ["forward", "spread", "mse"])
def test_a_failing_kernel_is_a_kernel_error(method, monkeypatch):
    name = "hidden" if method == "mse" else "rows"
    module = importlib.import_module(f"metal_ops.backends.triton.{name}")

    class Broken:
        def __getitem__(self, grid):
            raise OSError("no ptxas")

    monkeypatch.setattr(module, method, Broken())
    calls = {
        "forward": lambda: K.forward(X, X, torch.ones(2), DivergenceSpec()),
        "spread": lambda: K.spread(X, torch.ones(2), torch.ones(2), 1.0, X),
        "mse": lambda: K.hidden_states(X, X, torch.ones(2), "mse", None),
    }
    with pytest.raises(KernelError, match=f"kernel triton {method}: OSError: no ptxas") as caught:
        calls[method]()
    assert caught.value.kernel == f"triton {method}"
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("device", "hip", "options"),
    [
        ("cuda:0", None, {"maxnreg": triton.REGISTERS}),
        ("cuda:0", "7.0", {}),  # of AMD
        ("xpu:0", None, {}),
        ("cpu", None, {}),
    ],
)
def test_registers_are_limited_where_the_compiler_can(device, hip, options, monkeypatch):
    given: dict[str, Any] = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **options: given.update(options)

    module = importlib.import_module("metal_ops.backends.triton.rows")
    monkeypatch.setattr(module, "spread", Kernel())
    monkeypatch.setattr(torch.version, "hip", hip)
    for kind in (torch.cuda, torch.xpu):
        monkeypatch.setattr(kind, "device", lambda _: contextlib.nullcontext())
    triton._launch("rows", "spread", (1,), (on(device),), warps=4)
    assert given == {"num_warps": 4, **options}


def test_no_rows_launch_nothing(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(name))
    none = torch.zeros(0, 8)
    assert K.forward(none, none, torch.ones(0), DivergenceSpec()).shape == (8, 0)
    assert K.hidden_states(none, none, torch.ones(0), "mse", None).shape == (0,)
    assert K.log_sums(none, torch.zeros(0, 3, dtype=torch.int32), 1.0)[0].shape == (0,)


@pytest.mark.parametrize(
    ("columns", "block", "warps"),
    [
        (1, 8, 1),  # as many as a thread loads of 16 bit at a time
        (8, 8, 1),
        (33, 64, 1),
        (256, 256, 1),
        (1024, 1024, 4),
        (1025, 2048, 8),
        (151_936, 2048, 8),
    ],
)
def test_blocks(columns, block, warps):
    assert triton._block(columns) == (block, warps)


@pytest.mark.parametrize(
    ("rows", "columns", "splits", "each"),
    [
        (264, 151_936, 1, 38 * 4096),  # two rows for each of 132 multiprocessors
        (263, 151_936, 2, 19 * 4096),
        (64, 151_936, 8, 5 * 4096),
        (1, 151_936, 32, 2 * 4096),  # not more than blocks
        (1, 4096, 1, 4096),
        (1, 4097, 2, 4096),
        (0, 4097, 1, 2 * 4096),
    ],
)
def test_splits(rows, columns, splits, each, monkeypatch):
    monkeypatch.setattr(triton, "_units", lambda _: 132)
    assert triton._splits(rows, columns, 4096, torch.device("cpu")) == (splits, each)
    assert splits * each >= columns


def test_scalars_are_float32():
    spec = DivergenceSpec("jsd", beta=1 - 1e-9, temperature=0.7, clip=0.1)
    inv_t, beta, rest, bound = (torch.tensor(x, dtype=torch.float64) for x in triton._scalars(spec))
    for x in (inv_t, beta, rest, bound):
        assert x == x.float().double()
    assert beta == 1
    assert rest == pytest.approx(1e-9, rel=1e-6)  # from beta in float64: beta in float32 is one


@pytest.mark.parametrize("vocab", [31, 32, 33, 64, 100])
def test_bits_are_the_ids(vocab):
    kept = torch.rand(6, vocab) < 0.4
    kept[0], kept[1] = True, False
    kept[2, [0, 30, vocab - 1]] = True
    ids = torch.where(kept, torch.arange(vocab), vocab).int()
    ids = torch.cat([ids, ids[:, ::5]], -1)  # some twice
    ids[3] += vocab * 1000 * (ids[3] == vocab)  # padding beyond the vocabulary too
    bits = triton._bits(ids.sort(-1).values, vocab)
    columns = torch.arange(vocab)
    got = bits[:, columns // 32].bitwise_right_shift(columns % 32) & 1
    assert torch.equal(got.bool(), kept)
