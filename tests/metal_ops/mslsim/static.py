"""What is wrong with a Metal text, as far as a machine without Apple's compiler can tell."""

from collections.abc import Iterator
from pathlib import Path

from clang import cindex

from tests.metal_ops.mslsim import lint, vocabulary
from tests.metal_ops.mslsim.lint import Parsed, Problem
from tests.metal_ops.mslsim.tokens import MslError
from tests.metal_ops.mslsim.translate import translate

SHIMS = Path(__file__).parent / "shims" / "clang"
FILE = "translated.cpp"
ERRORS = (
    "c++17-extensions",  # Metal 3.1 is C++14
    "c++20-extensions",
    "implicit-float-conversion",
    "implicit-int-conversion",
    "shadow",
    "sometimes-uninitialized",
    "uninitialized",
    "vla-cxx-extension",
)
FLAGS = (
    "-std=c++14",
    "-nostdinc",
    "-nostdinc++",
    "-fno-exceptions",
    "-fno-rtti",
    "-Xclang",
    "-cl-single-precision-constant",
    f"-I{SHIMS}",
    *(f"-Werror={name}" for name in ERRORS),
)


def _lines(translated: str) -> list[int]:
    """What #line says of each line; 0 for those of other files."""
    lines, here = [], 0
    for line in translated.split("\n"):
        lines.append(here)
        words = line.split()
        if words[:1] == ["#line"]:
            here = int(words[1])
        elif here:
            here += 1
    return lines


def parse(text: str) -> Parsed:
    translated, _, tokens = translate(text, "clang")
    unit = cindex.Index.create().parse(FILE, FLAGS, [(FILE, translated)])
    return lint.parsed(unit, translated, _lines(translated), tokens)


def _clang(tree: Parsed) -> Iterator[Problem]:
    for found in tree.unit.diagnostics:
        if found.severity < cindex.Diagnostic.Error:
            continue
        here = found.location.file is not None and found.location.file.name == FILE
        line = tree.lines[found.location.line - 1] if here else 0
        yield Problem(line, f"clang: {found.spelling}")


def problems(text: str) -> list[Problem]:
    """All that the translator, clang, the lint and the vocabulary object to, by line."""
    if not text.isascii():
        line = next(i for i, x in enumerate(text.split("\n"), 1) if not x.isascii())
        return [Problem(line, "not ASCII, which torch.mps.compile_shader asks for")]
    try:
        tree = parse(text)
    except MslError as error:
        return [Problem(0, f"translator: {error.msg}")]
    found = [*_clang(tree), *lint.check(tree), *vocabulary.check(tree)]
    return sorted(set(found))
