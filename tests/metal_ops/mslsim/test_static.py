"""Errors of language planted in a clean text: each is found, at its line."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("clang.cindex", reason="the static checks need libclang: pip install libclang")

from tests.metal_ops.mslsim import compilers, powers, static, vocabulary

pytestmark = pytest.mark.skipif(
    compilers.unavailable() is not None, reason=f"the simulator {compilers.unavailable()}"
)

HEADERS = Path(torch.__file__).parent / "include"


class Plant(NamedTuple):
    old: str
    new: str
    found: str  # part of a message; what "translator" says has no line


WITH = "METAL_FUNC Online with(Online o, float x) {"
MERGE = "  float top = simd_max(o.top);"
KERNEL = "  const uint V = uint(sizes[0]);"
LOAD = "template <typename T>\nMETAL_FUNC float load("
PLANTS = {
    "device pointer for a threadgroup one": Plant(
        "merge(o, shared, lane", "merge(o, tops, lane", "no matching function"
    ),
    "threadgroup pointer for a device one": Plant(
        "load(from, i + j, scale[0])", "load(shared, i + j, scale[0])", "no matching function"
    ),
    "parameter without address space": Plant(
        "threadgroup float* shared, uint lane", "float* shared, uint lane", "no address space"
    ),
    "local pointer without address space": Plant(
        KERNEL, KERNEL + " float v = 1.0f; float* w = &v; (void)w;", "w points to no address"
    ),
    "reference without address space": Plant(
        WITH, WITH.replace("Online o", "Online& o"), "o points to no address space"
    ),
    "cast without address space": Plant(
        KERNEL, KERNEL + " float v = 1.0f; (void)*(float*)&v;", "a cast to a pointer"
    ),
    "result without address space": Plant(
        LOAD, "float* nowhere();\n" + LOAD, "nowhere returns a pointer to no address space"
    ),
    "write through constant": Plant(KERNEL, KERNEL + " sizes[0] = 1;", "read-only variable"),
    "write through device const": Plant(
        KERNEL, KERNEL + " weights[0] = 1.0f;", "read-only variable"
    ),
    "double": Plant(MERGE, MERGE.replace("float", "double"), "poisoned"),
    "literal without f": Plant("0.0f};", "0.0};", "0.0 is a double"),
    "exponent without f": Plant("-3.0e38f;", "-3.0e38;", "3.0e38 is a double"),
    "std::": Plant("exp2(x - top);", "std::exp2(x - top);", "poisoned"),
    "implicit conversion to bfloat": Plant(
        "to[i] = T(exp2(load(from, i, scale[0]) - o.top));",
        "to[i] = exp2(load(from, i, scale[0]) - o.top);",
        "__bf16",
    ),
    "simd_sum of bfloat": Plant(
        KERNEL, KERNEL + " (void)simd_sum(T(1.0f));", "no matching function for call to 'simd_sum'"
    ),
    "simd_sum of long": Plant(
        KERNEL, KERNEL + " (void)simd_sum(sizes[0]);", "no matching function for call to 'simd_sum'"
    ),
    "if constexpr": Plant(KERNEL, KERNEL + " if constexpr (true) {}", "C++17 extension"),
    "lambda": Plant(KERNEL, KERNEL + " auto f = [](float v) { return v; }; (void)f;", "a lambda"),
    "structured binding": Plant(MERGE, MERGE + " auto [a, b] = o;", "C++17 extension"),
    "virtual": Plant("struct Online {", "struct Online { virtual void v();", "poisoned"),
    "recursion": Plant(
        LOAD,
        "METAL_FUNC float down(float n) { return n < 1.0f ? n : down(n - 1.0f); }\n" + LOAD,
        "down calls itself",
    ),
    "exceptions": Plant(KERNEL, KERNEL + " try { } catch (...) { }", "poisoned"),
    "new": Plant(KERNEL, KERNEL + " new int;", "poisoned"),
    "goto": Plant(KERNEL, KERNEL + " goto end;", "poisoned"),
    "threadgroup variable in a function": Plant(
        "uint simds) {\n  float top",
        "uint simds) {\n  threadgroup float more[32]; (void)more; float top",
        "merge has a threadgroup variable",
    ),
    "threadgroup variable with a value": Plant(
        "shared[2 * kSimd];", "shared[2 * kSimd] = {0.0f};", "translator"
    ),
    "gap between buffers": Plant("[[buffer(6)]]", "[[buffer(16)]]", "translator"),
    "unknown attribute": Plant("[[thread_index_in_simdgroup]]", "[[lane_id]]", "translator"),
    "signed position": Plant("uint lane [[", "int lane [[", "translator"),
    "buffer without address space": Plant("device float* tops", "float* tops", "translator"),
    "static local": Plant(
        KERNEL, KERNEL + " static int calls = 0; (void)calls;", "calls is static"
    ),
    "variable outside of constant memory": Plant(
        LOAD, "const float kHalf = 0.5f;\n" + LOAD, "kHalf: variables outside of functions"
    ),
    "array of unknown length": Plant(
        KERNEL, KERNEL + " float v[V]; (void)v;", "variable length arrays"
    ),
    "variable without a value": Plant(
        KERNEL, KERNEL + " float v; (void)(v + 1.0f);", "'v' is uninitialized"
    ),
    "shadowed variable": Plant(KERNEL, KERNEL + " { uint V = 1; (void)V; }", "shadows"),
    "small constants": Plant(
        LOAD, "void small(constant half* h);\n" + LOAD, "h: constant memory has offsets"
    ),
    "long long": Plant(KERNEL, KERNEL + " long long n = 1; (void)n;", "n is long long"),
    "remainder": Plant(KERNEL, KERNEL + " (void)(V % 6);", "lint: %"),
    "unknown pragma": Plant(KERNEL, KERNEL + "\n#pragma ivdep\n", "unknown #pragma ivdep"),
    "a name of nowhere": Plant("exp2(x - top);", "exp3(x - top);", "vocabulary: exp3"),
    "a name of the library that is not allowed": Plant(
        "if (lane == 0) {", "if (simd_is_first()) {", "vocabulary: simd_is_first"
    ),
    "not ASCII": Plant("consecutive elements", "consecutive \u00e9l\u00e9ments", "not ASCII"),
}


def test_the_text_is_clean():
    assert static.problems(powers.TEXT) == []


@pytest.mark.parametrize("name", PLANTS)
def test_planted_errors_are_found(name: str):
    plant = PLANTS[name]
    assert powers.TEXT.count(plant.old) == 1 or plant.old in (LOAD, WITH)
    at = powers.TEXT.index(plant.old)
    problems = static.problems(powers.TEXT[:at] + plant.new + powers.TEXT[at + len(plant.old) :])
    first = powers.TEXT[:at].count("\n") + 1
    lines = {0} if plant.found == "translator" else range(first, first + plant.new.count("\n") + 1)
    assert [p for p in problems if plant.found in p.message and p.line in lines], problems


def test_the_headers_of_torch_use_the_names_that_they_stand_for():
    sources = {name: where for name, (_, where) in vocabulary.entries().items()}
    shipped = {name: where for name, where in sources.items() if where.startswith("c10/metal/")}
    assert len(shipped) > len(sources) / 2
    for name, where in shipped.items():
        words = re.sub(r"//[^\n]*|/\*.*?\*/", "", (HEADERS / where).read_text(), flags=re.DOTALL)
        assert re.search(rf"(?<!\w){name}(?!\w)", words), (name, where)
