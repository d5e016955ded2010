"""Compile the kernels for GPUs that are not here; run as a program, prints a line of JSON each.

`python -m tests.metal_ops.triton.compiling [--all] TARGET...` with targets such as cuda:90 or
hip:gfx942; --all for every kind and dtype, else one of each.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from metal_ops.backends import triton as backend
from metal_ops.backends.triton import hidden as hidden_kernels
from metal_ops.backends.triton import rows as row_kernels
from metal_ops.spec import KINDS

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ROWS = ("student", "teacher", "out", "logits")  # in the dtype of the op
FLOATS = ("inv_t", "beta", "rest", "bound")
SIZES = ("vocab", "columns", "words", "size")
ALIGNED = {"vocab": 151_936, "size": 4096}  # what Triton knows to be a multiple of 16


class Kernel(NamedTuple):
    """A kernel with its compile-time arguments."""

    function: Any
    meta: dict[str, Any]


def kernels(
    dtype: torch.dtype, kinds: tuple[str, ...], clips: tuple[bool, ...]
) -> Iterator[Kernel]:
    """All of them."""
    block, fold = backend._block(151_936)[0], backend._fold(dtype)
    for kind, clip in product(kinds, clips):
        rows = {"KIND": kind, "CLIP": clip, "BLOCK": block}
        for splits, given in ((1, False), (32, False), (1, True), (32, True)):
            meta = {"SPLITS": splits, "GIVEN": given, "FOLD": fold}
            yield Kernel(row_kernels.forward, rows | meta)
        for hard in (False, True):
            yield Kernel(row_kernels.backward, rows | {"HARD": hard})
    yield Kernel(row_kernels.normalise, {"SPLITS": 32, "BLOCK": block})
    for kept, splits in product((False, True), (1, 32)):
        meta = {"KEPT": kept, "SPLITS": splits, "BLOCK": block}
        yield Kernel(row_kernels.log_sums, meta)
    yield Kernel(row_kernels.join_log_sums, {"SPLITS": 32})
    yield Kernel(row_kernels.spread, {"BLOCK": block})
    for name, grad in product(("mse", "cosine"), (False, True)):
        meta = {"GRAD": grad, "BLOCK": backend._block(4096)[0]}
        yield Kernel(getattr(hidden_kernels, name), meta)


def argument(name: str, dtype: torch.dtype) -> str:
    """Its type, as `_launch` passes it."""
    if name in ROWS:
        return f"*{TYPES[dtype]}"
    if name in FLOATS:
        return "fp32"
    if name in SIZES or name.endswith("stride"):
        return "i32"
    return {"bits": "*i32", "labels": "*i64"}.get(name, "*fp32")


def build(kernel: Kernel, dtype: torch.dtype, target: GPUTarget) -> Any:
    """The compiled kernel."""
    names = kernel.function.arg_names
    signature = {n: "constexpr" if n in kernel.meta else argument(n, dtype) for n in names}
    # pointers, and a vocabulary and strides of the usual sizes, are multiples of 16
    known = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in FLOATS}
    known = {k: v for k, v in known.items() if names[k[0]] not in kernel.meta}
    source = ASTSource(kernel.function, signature, constexprs=kernel.meta, attrs=known)
    warps = max(1, kernel.meta.get("BLOCK", 1) // backend.COLUMNS_PER_WARP)
    options = {"num_warps": warps} | backend._limits(target.backend)
    return triton.compile(source, target=target, options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack a thread, as the linker reads them from a CUDA binary."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {k.lower(): int(v) for k, v in re.findall(r"(REG|STACK|SHARED):(\d+)", text)}


def main() -> None:
    """Compile everything for every target named."""
    every, targets = "--all" in sys.argv, [x for x in sys.argv[1:] if x != "--all"]
    kinds, clips = (KINDS, (False, True)) if every else (("jsd",), (True,))
    for text in targets:
        name, arch = text.split(":")
        target = GPUTarget(
            name, int(arch) if name == "cuda" else arch, 32 if name == "cuda" else 64
        )
        for dtype in TYPES if every else (torch.bfloat16,):
            for kernel in kernels(dtype, kinds, clips):
                built = build(kernel, dtype, target)
                assembly = built.asm["ptx" if name == "cuda" else "amdgcn"]
                line = {
                    "target": text,
                    "dtype": TYPES[dtype],
                    "kernel": kernel.function.__name__,
                    **kernel.meta,
                    "double": bool(re.search(r"\.f64|_f64", assembly)),
                    "wide rows": "arith.extsi" in built.asm["ttir"],
                }
                if name == "cuda":
                    line |= resources(built.asm["cubin"])
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
