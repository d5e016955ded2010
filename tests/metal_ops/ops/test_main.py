"""`python -m metal_ops`: what it says, that the self-test finds what is wrong, and its errors."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metal_ops import __main__ as command
from metal_ops import _dispatch as dispatch
from metal_ops import bench
from metal_ops.backends import chunked
from metal_ops.selftest import cases, machine, runner
from metal_ops.selftest.cases import Job, Where
from metal_ops.selftest.numerics import C
from tests.metal_ops.ops import torch_kernels
from tests.metal_ops.ops.test_dispatch import Backend, broken, fresh, install

__all__ = ["fresh", "install"]  # fixtures

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]


def few(jobs: list[Job]) -> list[Job]:
    """A job of each op and dtype."""
    found: dict[tuple, Job] = {}
    for job in jobs:
        if job.kind in ("forward_kl", "cosine") and job.family in ("planted", "along"):
            found.setdefault((job.op, job.dtype), job)
    return list(found.values())


def report(backend: str = "auto") -> runner.Report:
    return runner.run(Where(CPU, backend), True, few)


def test_every_op_and_dtype_is_tested():
    jobs = cases.jobs(runner.DTYPES, False)
    assert {(j.op, j.dtype) for j in jobs} == {(o, d) for o in cases.OPS for d in runner.DTYPES}
    kinds = {j.op: {k.kind for k in jobs if k.op == j.op} for j in jobs}
    assert kinds.pop("hidden") == set(cases.HIDDEN_KINDS)
    assert all(found == set(cases.KINDS) for found in kinds.values())
    assert {s for j in jobs for s in j.shapes} == {*cases.SHAPES, cases.REAL_SHAPE}
    quick = cases.jobs(runner.DTYPES, True)
    assert {(j.op, j.dtype) for j in quick} == {(j.op, j.dtype) for j in jobs}
    assert sum(len(j.shapes) for j in quick) < 0.1 * sum(len(j.shapes) for j in jobs)


def test_each_way_to_treat_a_support_has_its_turn():
    jobs = [j for j in cases.jobs(runner.DTYPES, False) if j.kind == "jsd" and j.op != "linear"]
    specs: dict[str, set[tuple]] = {}
    for job in jobs:
        choices = cases.choices(job)
        first = cases.first_choice(job)
        turns = {choices[(first + i) % len(choices)] for i in range(len(job.shapes))}
        specs.setdefault(job.op, set()).update((s.support, s.missing) for s in turns)
    supports = {
        (s, m)
        for s in ("teacher_topk", "student_topk", "union")
        for m in cases.missing_rules("jsd")
    }
    for op in ("divergence", "weighted"):
        assert specs[op] == supports | {("full", "tail")}
    assert specs["sparse"] == {("full", m) for m in cases.missing_rules("jsd")}


def test_the_ops_pass():
    found = report()
    assert not found.failures
    assert set(found.tallies) == {(o, str(d)[6:]) for o in cases.OPS for d in runner.DTYPES}
    for tally in found.tallies.values():
        assert tally.comparisons >= 6
        assert tally.largest_c <= C
    assert max(x.largest_c for x in found.tallies.values()) > 0


def test_kernels_pass(install):
    fake = install(of=torch_kernels.MODULE, unsupported=torch_kernels.unsupported)
    found = report("fake")
    assert not found.failures
    assert {d for _, d in found.tallies} == {"float32", "float16", "bfloat16"}
    assert set(fake.calls) == {"forward", "backward", "sparse", "linear", "hidden_states"}


def last_column(x: Tensor) -> None:
    x[..., -1] = 0.0


MISTAKES: dict[str, Callable[[Tensor], Any]] = {
    "a gradient times 1.02": lambda x: x.mul_(1.02),
    "a column dropped": last_column,
    "a nan": lambda x: x.view(-1)[:1].fill_(float("nan")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("function", ["forward", "backward", "sparse", "linear", "hidden_states"])
def test_a_wrong_kernel_fails(function, mistake, install, capsys, monkeypatch, tmp_path):
    def spoilt(*args: Any) -> Any:
        out = getattr(chunked, function)(*args)
        grad = out if isinstance(out, Tensor) else out[4] if function == "linear" else out[-1]
        if grad is not None and grad.numel():
            MISTAKES[mistake](grad)
        return out

    install(**{function: spoilt})
    original, dtypes = cases.jobs, (torch.float32, torch.bfloat16)
    monkeypatch.setattr(cases, "jobs", lambda *a: few(original(dtypes, True)))
    file = tmp_path / "report.json"
    assert command.main(["selftest", "--quick", "--backend", "fake", "--json", str(file)]) == 1
    out = capsys.readouterr().out
    line = next(x for x in out.splitlines() if x.startswith("{"))
    assert file.read_text() == line + "\n"
    found = json.loads(line)
    assert not found["pass"]
    (device,) = found["devices"]
    assert device["failed"] > 0
    ops = {"forward": {"weighted", "divergence"}, "backward": {"divergence"}}
    ops["hidden_states"] = {"hidden"}
    failed = {x.split()[0] for x in device["failures"]}
    assert failed == ops.get(function, {function})
    assert "FAILED" in out


def test_a_kernel_that_does_not_compile_fails(install):
    install(**broken("jsd_float", "no such type"))
    found = report()
    assert len(found.failures) == len(cases.OPS) * len(runner.DTYPES)
    assert all("KernelError: kernel jsd_float: no such type" in x for x in found.failures)
    assert "METAL_OPS_STRICT" not in os.environ
    line = json.loads(runner.as_json([found], True))
    assert line["devices"][0]["largest_c"]["hidden"]["float32"] is None
    assert not line["pass"]


def test_nothing_compared_is_no_pass():
    nothing = runner.Report(Where(CPU, "auto"), {}, [], 0.0)
    assert not runner.passed(nothing)
    assert not json.loads(runner.as_json([], True))["pass"]


def test_the_strict_switch_is_put_back(monkeypatch):
    monkeypatch.setenv("METAL_OPS_STRICT", "0")
    runner.run(Where(CPU, "auto"), True, lambda jobs: jobs[:1])
    assert os.environ["METAL_OPS_STRICT"] == "0"


def test_the_line_to_paste(capsys, monkeypatch):
    original = cases.jobs
    monkeypatch.setattr(cases, "jobs", lambda *a: few(original(*a)))
    assert command.main(["selftest", "--quick"]) == 0
    out = capsys.readouterr().out
    found = json.loads(next(x for x in out.splitlines() if x.startswith("{")))
    assert found["pass"]
    assert found["torch"] == torch.__version__
    assert {"python", "system", "chip", "accelerators", "triton"} <= set(found)
    (device,) = found["devices"]
    assert (device["device"], device["backend"], device["failures"]) == ("cpu", "auto", [])
    assert set(device["largest_c"]) == set(cases.OPS)
    assert out.splitlines()[-1] == "passed"
    assert len([x for x in out.splitlines() if x.startswith("hidden ")]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("options", [["-O"], []])
def test_in_a_process_of_its_own(options):
    """Also where assertions are not run."""
    line = [sys.executable, *options, "-m", "metal_ops", "selftest", "--quick"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("{")))
    assert found["pass"]
    assert found["devices"][0]["compared"] > 1000
    assert not done.stderr  # no progress bar without a terminal


@pytest.mark.slow
def test_everything():
    assert not runner.run(Where(CPU, "auto"), False).failures


def test_what_the_machine_has(capsys):
    assert command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(x.split() == ["torch", torch.__version__] for x in lines)
    for op in cases.OPS:
        assert f"{op:12}" + f"{'chunked':>10}" * 4 in lines


def test_what_the_machine_has_and_why_not_more(capsys, install):
    fails = broken("jsd_float", "no such type")
    install("metal", hidden_states=fails["hidden_states"], backward=fails["backward"])
    install("triton", unsupported=lambda x, _: None if x.dtype == torch.float16 else "wide")
    machine.show()
    lines = capsys.readouterr().out.splitlines()
    for op, names in (
        ("hidden", ("chunked", "triton", "chunked", "chunked")),
        ("divergence", ("metal", "triton", "chunked", "metal")),  # a backward of 16 bits
        ("sparse", ("metal", "triton", "metal", "metal")),
    ):
        assert f"{op:12}" + "".join(f"{x:>10}" for x in names) in lines
    reasons = [x for x in lines if x.startswith("not ")]
    assert reasons == [
        "not triton for float32, bfloat16, float64: wide",
        "not metal for float32 (hidden), bfloat16 (divergence, hidden), float64 (hidden): "
        "kernel jsd_float: no such type",
    ]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("bench --shapes 12", "a shape is TOKENSxVOCAB, as 512x151936; got '12'"),
        ("bench --shapes 0x4", "a shape is TOKENSxVOCAB"),
        ("bench --shapes 4x-1", "a shape is TOKENSxVOCAB"),
        ("bench --dtypes int8", "invalid choice: 'int8'"),
        ("bench --kinds kl", "invalid choice: 'kl'"),
        ("bench --repeats 0", "--repeats must be at least 1, got 0"),
        ("bench --device nowhere", "no device 'nowhere' here"),
        ("bench --backend metal-sim", "invalid choice: 'metal-sim'"),
        ("selftest --backend metla", "invalid choice: 'metla'"),
        ("selftest --json no/such/folder.json", "no folder 'no/such'"),
        ("selftest --device nowhere", "no device 'nowhere' here"),
        ("selftest --fast", "unrecognized arguments: --fast"),
        ("check", "invalid choice: 'check'"),
    ],
)
def test_bad_arguments(line, text, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(line.split())
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


def test_a_backend_that_takes_nothing_here(install, capsys):
    install("fake", unsupported=lambda *_: "needs tensors on mps, got cpu")
    for line in ("selftest --backend fake", "bench --backend fake"):
        with pytest.raises(SystemExit) as caught:
            command.main(line.split())
        assert caught.value.code == 2
        assert "needs tensors on mps, got cpu" in capsys.readouterr().err


def test_no_simulator_without_a_checkout(monkeypatch, capsys):
    for name in ("tests.metal_ops.mslsim", "tests.metal_ops", "tests"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(SystemExit) as caught:
            command.main(["selftest", "--backend", "metal-sim"])
        assert caught.value.code == 2
        assert "needs the simulator" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["", "selftest ", "bench "])
def test_help(line, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(f"{line}--help".split())
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in {"": ["selftest", "bench"], "selftest ": ["--quick"], "bench ": ["GB/s"]}[line]:
        assert word in text


# --- bench


def same(function: Callable, **_: Any) -> Callable:
    return function


def test_bench(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", same)
    line = "bench --shapes 4x33 2x7 --dtypes bfloat16 --kinds tvd --repeats 2 --backend chunked"
    assert command.main(line.split()) == 0
    out = capsys.readouterr().out
    assert "tvd 4x33 bfloat16" in out
    assert "tvd 2x7 bfloat16" in out
    names = ("weighted_divergence", "divergence", "eager", "torch.compile(eager)", "copy")
    for name in names:
        rows = [x for x in out.splitlines() if x.startswith(f"{name} ")]
        assert len(rows) == 2
        assert all(float(x) > 0 for x in rows[0].split()[1:2])


def test_bench_without_a_compiler(monkeypatch, capsys):
    def fails(*_: Any, **__: Any) -> Any:
        def call(*_: Any) -> None:
            raise RuntimeError("no C++ compiler\nat all")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    seconds = bench.measure(bench.Case(4, 33, torch.float32, "jsd"), bench.Options(CPU, "auto", 1))
    assert list(seconds) == ["weighted_divergence", "divergence", "eager", "copy"]
    text = "no row of torch.compile(eager): RuntimeError: no C++ compiler\n"
    assert capsys.readouterr().out == text


def test_bench_numbers(capsys):
    # 4 MB a tensor: three in a millisecond are 12 GB/s
    seconds = {"weighted_divergence": 1e-3, "eager": 4e-3, "copy": 2e-3}
    bench.show(bench.Case(1000, 1000, torch.float32, "jsd"), seconds)
    rows = [x.split() for x in capsys.readouterr().out.splitlines()[2:]]
    assert rows[1] == ["weighted_divergence", "1.00", "12.0", "1.00"]
    assert rows[2] == ["eager", "4.00", "3.0", "4.00"]
    assert rows[3] == ["copy", "2.00", "4.0", "2.00"]


def test_steps_take_turns(monkeypatch):
    calls: list[str] = []
    clock = iter([0.0, 1.0, 0.0, 5.0, 0.0, 3.0, 0.0, 6.0, 0.0, 2.0, 0.0, 7.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    assert bench.medians(steps, CPU, 3) == {"a": 2.0, "b": 6.0}
    assert calls == list("ababab")


def test_bench_compares_the_same_loss(monkeypatch):
    monkeypatch.setattr(torch, "compile", same)
    case = bench.Case(4, 33, torch.float64, "jsd")
    weights = torch.rand(4, dtype=torch.float64)
    student, teacher = torch.randn(2, 4, 33, dtype=torch.float64)
    losses = bench.losses(case, "auto", weights)
    want = losses.pop("eager")(student, teacher)
    for loss in losses.values():
        torch.testing.assert_close(loss(student, teacher), want, rtol=1e-12, atol=0)


def test_the_machine_in_words():
    assert dispatch.describe(CPU).startswith(f"torch {torch.__version__}, ")
    assert machine.devices()[-1] == CPU
    assert isinstance(Backend("x"), type(sys))
