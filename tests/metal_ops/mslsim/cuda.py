"""Metal texts on an NVIDIA GPU: a second executor, with real warps and compute-sanitizer.

    python -m tests.metal_ops.mslsim.cuda
    compute-sanitizer --tool racecheck python -m tests.metal_ops.mslsim.cuda

compiles with nvcc, runs through libcuda and compares with exact results. Compiling is tested;
nothing here has been run on a GPU yet. It says nothing of Apple's compiler.
"""

import ctypes
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metal_ops.backends import metal
from metal_ops.spec import KINDS
from tests.metal_ops.metal import harness
from tests.metal_ops.mslsim import compilers, powers, signatures
from tests.metal_ops.mslsim.binding import Bound, bind
from tests.metal_ops.mslsim.translate import LAUNCH_LIMIT, translate

SHIMS = Path(__file__).parent / "shims" / "cuda"
COMPUTE_MAJOR, COMPUTE_MINOR = 75, 76  # of CUdevice_attribute


def compile_cubin(text: str, architecture: str) -> tuple[bytes, list[signatures.Kernel]]:
    """Machine code, by nvcc; flushes subnormal numbers as torch's Metal kernels do."""
    translated = translate(text, "cuda")
    flags = ["-std=c++17", "-ftz=true", "-lineinfo", f"-arch={architecture}"]
    # a double in a kernel would be a mistake: Metal has none
    flags += ["-Xptxas", "-warn-double-usage,-Werror", "-cubin"]

    def make(path: Path) -> None:
        source = path.with_suffix(".cu")
        source.write_text(translated.text)
        compilers.run(["nvcc", *flags, f"-I{SHIMS}", str(source), "-o", str(path)])

    shims = (SHIMS / "msl_cuda.h").read_text()
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    key = f"{version.stdout} {flags} {shims} {translated.text}"
    return compilers.cached(key, ".cubin", make).read_bytes(), translated.kernels


class Driver:
    """libcuda: a context on the first GPU."""

    def __init__(self) -> None:
        try:
            self.cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise RuntimeError("needs the driver of an NVIDIA GPU") from error
        self.device, context = ctypes.c_int(), ctypes.c_void_p()
        self("cuInit", 0)
        self("cuDeviceGet", ctypes.byref(self.device), 0)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), self.device)
        self("cuCtxSetCurrent", context)

    def __call__(self, function: str, *args: Any) -> None:
        status = getattr(self.cuda, function)(*args)
        if status:
            raise RuntimeError(f"{function} returned {status}")

    def architecture(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self("cuDeviceGetAttribute", ctypes.byref(major), COMPUTE_MAJOR, self.device)
        self("cuDeviceGetAttribute", ctypes.byref(minor), COMPUTE_MINOR, self.device)
        return f"sm_{major.value}{minor.value}"

    def upload(self, bound: Bound) -> ctypes.c_uint64:
        """A copy of all between a buffer's first and last element, its gaps too."""
        address = ctypes.c_uint64()
        size = ctypes.c_size_t(len(bound.span))
        self("cuMemAlloc_v2", ctypes.byref(address), size)
        self("cuMemcpyHtoD_v2", address, ctypes.c_void_p(bound.span.start), size)
        return address

    def download(self, address: ctypes.c_uint64, bound: Bound) -> None:
        """Back into a buffer that may be written; the copy is freed."""
        if bound.writable:
            size = ctypes.c_size_t(len(bound.span))
            self("cuMemcpyDtoH_v2", ctypes.c_void_p(bound.span.start), address, size)
        self("cuMemFree_v2", address)


class Kernel:
    max_threads_per_threadgroup = LAUNCH_LIMIT
    thread_execution_width = 32

    def __init__(self, driver: Driver, signature: signatures.Kernel, function: ctypes.c_void_p):
        self._driver, self._signature, self._function = driver, signature, function

    def __call__(self, *args: Any, threads: int, group_size: int) -> None:
        """As torch's, on tensors of the CPU, which are copied there and back."""
        if threads % group_size:
            raise ValueError(f"CUDA runs whole groups, got {threads} threads by {group_size}")
        bound = bind(self._signature, args, None)
        copies = [self._driver.upload(b) for b in bound]
        pointers = (ctypes.c_void_p * len(copies))(*(ctypes.addressof(c) for c in copies))
        grid = (threads // group_size, 1, 1, group_size, 1, 1)
        self._driver("cuLaunchKernel", self._function, *grid, 0, None, pointers, None)
        self._driver("cuCtxSynchronize")
        for address, b in zip(copies, bound, strict=True):
            self._driver.download(address, b)


class Library:
    def __init__(self, driver: Driver, cubin: bytes, kernels: Sequence[signatures.Kernel]):
        module = ctypes.c_void_p()
        driver("cuModuleLoadData", ctypes.byref(module), cubin)
        self._kernels = {}
        for k in kernels:
            function = ctypes.c_void_p()
            driver("cuModuleGetFunction", ctypes.byref(function), module, k.name.encode())
            self._kernels[k.name] = Kernel(driver, k, function)

    def __getattr__(self, name: str) -> Kernel:
        try:
            return self.__dict__["_kernels"][name]
        except KeyError:
            raise RuntimeError(f"Failed to create function state object for: {name}") from None


def compiler(driver: Driver) -> Any:
    """A `compile_shader` for the GPU."""
    return lambda text: Library(driver, *compile_cubin(text, driver.architecture()))


def _powers(library: Library) -> list[str]:
    """What is not exact of the simulator's own kernel."""
    wrong = []
    for dtype in powers.TYPES:
        for group_size, v in ((32, 1), (128, 1003), (256, 1001), (1024, 4097), (1024, 32000)):
            x, weights = powers.rows(3, v, dtype, gap=3), Tensor([1, 0, 2])
            found = powers.run(library, x, weights, group_size, gap=5)
            wrong += [f"{n} {dtype} {v}" for n in powers.differences(found, x, weights)]
    return wrong


def project(
    compile_shader: Callable[[str], Any], kinds: Sequence[str], vocabs: Sequence[int]
) -> list[str]:
    """What the project's kernels get wrong, by the numerics rule."""
    wrong = []
    with metal.simulated(compile_shader):
        for dtype, vocab in product(harness.DTYPES, vocabs):
            rows = harness.Rows.make(vocab, dtype, strided=True)
            checks = [(kind, partial(harness.divergence, rows, kind)) for kind in kinds]
            checks += [(kind, partial(harness.hidden, rows, kind)) for kind in ("mse", "cosine")]
            checks += [("one side", partial(harness.one_side, rows, min(vocab, 8)))]
            for name, check in checks:
                try:
                    check()
                except AssertionError as error:
                    wrong.append(f"{name} {dtype} {vocab}: {str(error).splitlines()[0]}")
    return wrong


def main() -> int:
    torch.manual_seed(0)
    driver = Driver()
    wrong = _powers(compiler(driver)(powers.TEXT))
    print(f"powers on {driver.architecture()}: {wrong or 'exact'}")
    wrong += project(compiler(driver), KINDS, (1, 7, 1003, 32000))
    print("\n".join(wrong) or "every kernel of metal_ops keeps the numerics rule")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
