"""`compile_shader` for a machine without Metal: the same text and the same calls."""

import ctypes
import functools
import itertools
import mmap
import re
import subprocess
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from tests.metal_ops.mslsim import compilers, signatures
from tests.metal_ops.mslsim.binding import Bound, Buffer, bind
from tests.metal_ops.mslsim.translate import translate

ORDERS = ("forward", "reverse", "random")
STACKS = 1024 * (128 << 10)  # bytes: a stack for each thread of a group
SUM_ORDERS = ("halves", "in turn", "neighbours")


@functools.cache
def _stacks() -> Any:
    """Shared by all libraries: pages are taken when a thread first uses them."""
    memory = mmap.mmap(-1, STACKS, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return (ctypes.c_char * STACKS).from_buffer(memory)


class GpuError(RuntimeError):
    """What a run found; `reports` has a line for each, with its place in the text."""

    def __init__(self, kernel: str, reports: list[str]):
        super().__init__(f"{kernel}: " + "\n".join(reports))
        self.reports = reports


class Run(NamedTuple):
    """How to run a kernel, where Metal leaves it open."""

    order: str = "forward"  # of threads and groups, of ORDERS
    seed: int = 1  # of the random order, and of noise
    ftz: bool = True  # subnormal numbers are zero
    noise: bool = False  # errors of exp, log ... as large as Metal allows
    sum_order: str = "halves"  # of simd_sum and its like, of SUM_ORDERS
    strict: bool = True  # a simdgroup function needs every lane, which Metal does not ask
    complete: bool = True  # checked builds: every element of what may be written must be

    def check_names(self) -> None:
        for value, names in ((self.order, ORDERS), (self.sum_order, SUM_ORDERS)):
            if value not in names:
                raise ValueError(f"expected one of {', '.join(names)}, got {value!r}")


class Traffic(NamedTuple):
    """Bytes of a buffer that a checked run read and wrote, an element once for each access."""

    read: int
    written: int
    covered: int  # the part of the buffer that was written


class Stats(NamedTuple):
    """Of the last run of a kernel."""

    buffers: dict[str, Traffic]  # by the parameter's name; zeros if the build is not checked
    threadgroup_bytes: int
    switches: int  # times that a thread went on


class _Options(ctypes.Structure):
    """`Options` of shims/cpu/state.h."""

    _fields_ = (
        ("order", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        *(
            (n, ctypes.c_int)
            for n in ("check", "flush", "noise", "sum_order", "strict", "complete")
        ),
    )


class _Entry(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("entry", ctypes.c_void_p))


def _sizes(threads: Any, group_size: Any, limit: int) -> tuple[list[int], list[int]]:
    """Both in three dimensions, by torch's rules."""
    grid = [threads] if isinstance(threads, int) else list(threads)
    if group_size is None:
        group_size = [min(grid[0], limit)] + [1] * (len(grid) - 1)
    group = [group_size] if isinstance(group_size, int) else list(group_size)
    if len(grid) != len(group):
        raise RuntimeError("threads and group_size must have the same number of dimensions")
    if prod(group) > limit:
        raise ValueError(f"Threadgroup size exceeds {limit} limit")
    if any(not 0 < n < 1 << 32 for n in grid + group):
        raise ValueError(f"expected 1 to 2^32 - 1 threads, got {grid} in groups of {group}")
    return [x + [1] * (3 - len(x)) for x in (grid, group)]  # type: ignore[return-value]


class Kernel:
    """A function of a library."""

    thread_execution_width = 32

    def __init__(self, library: "Library", signature: signatures.Kernel, entry: Any):
        self._library, self._signature, self._entry = library, signature, entry
        self.max_threads_per_threadgroup = min(signature.max_threads, library.max_threads)
        self.static_thread_group_memory_length = 0  # known after the first run
        self.stats = Stats({}, 0, 0)

    def __call__(
        self,
        *args: Any,
        threads: int | Sequence[int] | None = None,
        group_size: int | Sequence[int] | None = None,
        arg_casts: str | dict[int, str] | None = None,
        only_groups: Sequence[int] = (),
        **run: Any,
    ) -> None:
        """As torch's; `only_groups` leaves the others out, `run` replaces fields of `Run`."""
        bound = bind(self._signature, args, arg_casts)
        if threads is None:
            threads = next(b.kept.numel() for b in bound)
        grid, group = _sizes(threads, group_size, self.max_threads_per_threadgroup)
        how = self._library.run._replace(**run)
        how.check_names()
        self._dispatch(bound, grid, group, list(only_groups), how)

    def _dispatch(
        self, bound: list[Bound], grid: list[int], group: list[int], only: list[int], how: Run
    ) -> None:
        count = len(bound)
        addresses = (ctypes.c_void_p * count)(*(b.span.start for b in bound))
        buffers = (Buffer * count)(*(b.buffer() for b in bound))
        complete = how.complete and self._library.check and not only
        flags = (self._library.check, how.ftz, how.noise, SUM_ORDERS.index(how.sum_order))
        options = _Options(ORDERS.index(how.order), how.seed, *flags, how.strict, complete)
        text, totals = ctypes.c_char_p(), (ctypes.c_uint64 * 2)()
        traffic = (ctypes.c_uint64 * (3 * count))()
        found = self._library.dispatch(
            ctypes.byref(self._entry),
            addresses,
            buffers,
            count,
            (ctypes.c_uint32 * 3)(*grid),
            (ctypes.c_uint32 * 3)(*group),
            (ctypes.c_uint32 * max(len(only), 1))(*only),
            len(only),
            ctypes.byref(options),
            _stacks(),
            ctypes.byref(text),
            traffic,
            totals,
        )
        each = {b.name: Traffic(*traffic[3 * i : 3 * i + 3]) for i, b in enumerate(bound)}
        self.stats = Stats(each, totals[1], totals[0])
        self.static_thread_group_memory_length = totals[1]
        if found:
            lines = (text.value or b"").decode().splitlines()
            raise GpuError(self._signature.name, self._library.place(lines))


class Library:
    """What `compile_shader` returns: its kernels are attributes."""

    def __init__(
        self, path: Path, kernels: list[signatures.Kernel], check: bool, run: Run, limit: int
    ):
        self.path, self.check, self.run, self.max_threads = path, check, run, limit
        # with the interpreter's lock held: the runtime's state is one for the library
        loaded = ctypes.PyDLL(str(path))
        self.dispatch = loaded.msl_dispatch
        entries = (_Entry * len(kernels)).in_dll(loaded, "msl_kernels")
        self._kernels = {
            k.name: Kernel(self, k, entry) for k, entry in zip(kernels, entries, strict=True)
        }

    def __getattr__(self, name: str) -> Kernel:
        try:
            return self.__dict__["_kernels"][name]
        except KeyError:
            message = f"Failed to create function state object for: {name}"
            raise RuntimeError(message) from None  # torch's, which is not an AttributeError

    def __dir__(self) -> list[str]:
        return list(self._kernels)

    def place(self, lines: list[str]) -> list[str]:
        """Offsets in the library become lines of the text, outermost function last."""
        return [
            re.sub(r"@(0x[0-9a-f]+)", lambda m: self._lines_of(int(m[1], 16)), x) for x in lines
        ]

    def _lines_of(self, offset: int) -> str:
        command = ["addr2line", "-i", "-e", str(self.path), hex(offset - 1)]
        try:
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return f"offset {offset:#x}"
        places = [line.split(" (")[0].rsplit("/", 1)[-1] for line in out.splitlines()]
        places = [p for p in places if not p.startswith(("msl_", "entries"))]
        return "at " + ", from ".join(p for p, _ in itertools.groupby(places))


def compile_shader(
    text: str,
    check: bool = False,
    *,
    name: str = "program_source",
    max_threads: int = 1024,
    fast_math: bool = False,
    flags: Sequence[str] = (),
    compiler: str | None = None,
    **run: Any,
) -> Library:
    """A library of Metal text.

    A checked build raises GpuError for races, accesses outside of a tensor or its rows, reads of
    threadgroup memory that nobody wrote, divergent barriers and simdgroup functions, writes to
    constants, undefined arithmetic and outputs left unwritten. `run` has fields of `Run`.
    """
    if not text.isascii():
        raise SyntaxError("the text is not ASCII, which torch.mps.compile_shader asks for")
    how = Run(**run)
    how.check_names()
    compiler = compiler or compilers.find()
    translated = translate(text, "cpu", name)
    clang = compilers.is_clang(compiler)
    options = ["-cl-single-precision-constant" if clang else "-fsingle-precision-constant"]
    options += ["-fno-strict-aliasing", "-fno-exceptions", "-fno-rtti"]
    options += ["-ffast-math"] if fast_math else ["-ffp-contract=off"]
    if check:
        memory = f"alignment,{'array-bounds' if clang else 'bounds'}"
        undefined = "signed-integer-overflow,shift,integer-divide-by-zero,float-cast-overflow"
        options += ["-O1", "-g1", f"-fsanitize=thread,{memory},{undefined}"]
        options += [] if clang else ["--param", "tsan-instrument-func-entry-exit=0"]
    else:
        options += ["-O2", "-g1", "-march=native"]
    path = compilers.library(translated.text, [*options, *flags], compiler)
    return Library(path, translated.kernels, check, how, max_threads)
