"""Metal text to C++ that runs on fibers, to C++ that clang can check, or to CUDA.

Three things of Metal are not C++: attributes, which go; threadgroup variables, which become
references; and the address spaces, which the headers of each target define.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from tests.metal_ops.mslsim import signatures
from tests.metal_ops.mslsim.signatures import SCALARS, Kernel, Parameter
from tests.metal_ops.mslsim.tokens import (
    MslError,
    Token,
    attribute,
    embed,
    preprocess,
    tokenise,
)

Target = Literal["cpu", "clang", "cuda"]
CUDA_KEYWORDS = {
    "device": "",  # not by a macro: it would break __attribute__((device))
    "thread": "",
    "threadgroup": "",
    "constant": "const",
    "kernel": "__device__",
}
# CUDA has these names too, in the global scope
CUDA_FUNCTIONS = re.compile(
    r"(?<![\w:.])(fmax|fmin|min|max|exp2?|log2?|r?sqrt|fabs|floor|pow|tanh|fma|copysign|abs|clamp)"
    r"(?=\s*\()"
)
LAUNCH_LIMIT = 1024


class Translation(NamedTuple):
    text: str
    kernels: list[Kernel]
    tokens: list[Token]  # what was translated, with its lines


def _variable(tokens: Sequence[Token], target: Target, number: int) -> str | None:
    """`T name[n]` of a threadgroup variable, without the keyword; None if it is a pointer."""
    text = "".join(t.text for t in tokens if t.kind != "marker").strip()
    if "*" in text.split("[")[0]:
        return None
    found = re.fullmatch(r"(.*?)\b(\w+)\s*((?:\[[^\]]*\]\s*)*)", text, re.DOTALL)
    if found is None or "=" in text or "," in text.split("<")[0]:
        raise MslError(f"line {tokens[0].line}: not a threadgroup variable: {text!r}")
    kind, name, sizes = (x.strip() for x in found.groups())
    if target == "cuda":
        return f"__shared__ {kind} {name}{sizes};"
    if target == "clang":
        cast = f"*(threadgroup {name}_t*)msl_threadgroup_memory()"
        return f"typedef {kind} {name}_t{sizes}; threadgroup {name}_t& {name} = {cast};"
    get = f'msl_threadgroup_memory({number}, sizeof({name}_t), alignof({name}_t), "{name}")'
    return f"typedef {kind} {name}_t{sizes}; auto& {name} = *({name}_t*)msl::{get};"


class _Rewriter:
    """Walks over the tokens of a text once."""

    def __init__(self, tokens: Sequence[Token], target: Target):
        self.tokens = tokens
        self.target: Target = target
        self.out: list[str] = []
        self.variables, self.parentheses, self.starts = 0, 0, True

    def text(self) -> str:
        i = 0
        while i < len(self.tokens):
            i = self._step(i)
        return "".join(self.out)

    def _step(self, i: int) -> int:
        token = self.tokens[i]
        found = attribute(self.tokens, i)
        if found is not None:
            if found[0] == "kernel":
                self.out.append({"cuda": "__device__ ", "clang": "kernel ", "cpu": ""}[self.target])
            return found[1]
        if token.text == "threadgroup" and self.starts and self.parentheses == 0:
            end = next(j for j in range(i, len(self.tokens)) if self.tokens[j].text == ";")
            variable = _variable(self.tokens[i + 1 : end], self.target, self.variables)
            if variable is not None:
                self.variables += 1
                self.out.append(variable)
                return end + 1
        self._append(token)
        return i + 1

    def _append(self, token: Token) -> None:
        if token.kind == "marker":
            found = re.match(r'#\s*(\d+)\s+"([^"]*)"', token.text)
            self.out.append(f'#line {found.group(1)} "{found.group(2)}"' if found else "")
            return
        self.parentheses += (token.text == "(") - (token.text == ")")
        if token.kind != "blank":
            self.starts = token.text in (";", "{", "}")
        keywords = CUDA_KEYWORDS if self.target == "cuda" else {}
        self.out.append(keywords.get(token.text, token.text))


def _position(p: Parameter) -> str:
    if p.attribute in SCALARS:
        return f"{p.base}(at.{p.attribute})"
    scalar, count = p.base.rstrip("23"), int(p.base[-1]) if p.base[-1].isdigit() else 1
    return f"{p.base}{{{', '.join(f'{scalar}(at.{p.attribute}.{f})' for f in 'xyz'[:count])}}}"


def _arguments(kernel: Kernel, buffer: str) -> str:
    """For a call of the C++ function; `buffer` is how to name the i-th."""
    parts = []
    for p in kernel.parameters:
        if p.position:
            parts.append(_position(p))
        else:
            star = "*" if p.reference == "&" else ""
            kind = f"{'const ' if p.constant else ''}{p.base}*"
            parts.append(f"{star}({kind}){buffer.format(p.buffer)}")
    return ", ".join(parts)


def _cpu_entries(kernels: Sequence[Kernel]) -> str:
    lines, table = [], []
    for i, k in enumerate(kernels):
        call = f"{k.expression}({_arguments(k, 'arguments[{}]')})"
        signature = f"static void msl_entry_{i}(void* const* arguments, const msl::Thread& at)"
        lines.append(f"{signature} {{ {call}; }}")
        table.append(f'{{"{k.name}", msl_entry_{i}}}')
    exported = 'extern "C" __attribute__((visibility("default"))) const msl::Kernel msl_kernels[]'
    return "\n".join([*lines, f"{exported} = {{{', '.join(table)}}};", ""])


def _cuda_entries(kernels: Sequence[Kernel]) -> str:
    lines = []
    for k in kernels:
        buffers = ", ".join(
            f"{'const ' if p.constant else ''}{p.base}* a{p.buffer}" for p in k.buffers
        )
        head = f'extern "C" __global__ void __launch_bounds__({LAUNCH_LIMIT}) {k.name}({buffers})'
        call = f"{k.expression}({_arguments(k, 'a{}')})"
        lines.append(f"{head} {{ const MslThread at = msl_thread(); {call}; }}")
    return "\n".join([*lines, ""])


def translate(text: str, target: Target, name: str = "program_source") -> Translation:
    """A Metal text in another language, and its kernels; `name` is what messages call it."""
    tokens = tokenise(preprocess(embed(text), name))
    kernels = signatures.kernels(tokens)
    body = _Rewriter(tokens, target).text()
    if target == "cpu":
        end = f'\n#line 1 "entries"\n{_cpu_entries(kernels)}'
        return Translation(f'#include "msl.h"\n{body}{end}', kernels, tokens)
    if target == "cuda":
        body = CUDA_FUNCTIONS.sub(r"metal::\1", body).replace("const constexpr", "static constexpr")
        return Translation(
            f'#include "msl_cuda.h"\n{body}\n{_cuda_entries(kernels)}', kernels, tokens
        )
    return Translation(f'#include "msl_check.h"\n{body}', kernels, tokens)
