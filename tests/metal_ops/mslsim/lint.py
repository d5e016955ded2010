"""Rules of Metal that no host compiler knows, on tokens and on clang's tree."""

import re
from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from clang.cindex import Cursor, CursorKind, StorageClass, TypeKind

from tests.metal_ops.mslsim.tokens import (
    ADDRESS_SPACES,
    Token,
    closing,
    significant,
    tokenise,
)

POINTERS = (TypeKind.POINTER, TypeKind.LVALUEREFERENCE, TypeKind.RVALUEREFERENCE)
FUNCTIONS = (CursorKind.FUNCTION_DECL, CursorKind.FUNCTION_TEMPLATE, CursorKind.CXX_METHOD)
VARIABLES = (CursorKind.VAR_DECL, CursorKind.PARM_DECL, CursorKind.FIELD_DECL)
CASTS = (
    CursorKind.CSTYLE_CAST_EXPR,
    CursorKind.CXX_STATIC_CAST_EXPR,
    CursorKind.CXX_REINTERPRET_CAST_EXPR,
    CursorKind.CXX_CONST_CAST_EXPR,
)
SCOPES = (CursorKind.TRANSLATION_UNIT, CursorKind.NAMESPACE)
GENERATED = "msl_threadgroup_memory"  # what threadgroup variables are translated to
PRAGMAS = r"#\s*pragma\s+(unroll|clang loop unroll)\b"


class Problem(NamedTuple):
    line: int  # of the text, 0 if unknown
    message: str


class Parsed(NamedTuple):
    """Clang's view of a translated text."""

    unit: Any  # clang.cindex.TranslationUnit
    lines: list[int]  # of the text, for each line of the translation
    tokens: list[Token]  # of the translation
    offsets: list[int]  # where they start
    source: list[Token]  # of the text itself, preprocessed

    def line(self, cursor: Cursor) -> int:
        return self.lines[cursor.location.line - 1]

    def declarator(self, cursor: Cursor, stops: str) -> list[str]:
        """What stands before a declared name, back to one of the `stops`.

        Not by cursor.get_tokens(), which leaves attributes out, and address spaces are some.
        """
        end = start = bisect_left(self.offsets, cursor.location.offset)
        while start and self.tokens[start - 1].text not in stops:
            start -= 1
        return [t.text for t in self.tokens[start:end]]

    def cast(self, cursor: Cursor) -> list[str]:
        """The type of a cast, with its bracket."""
        start = bisect_left(self.offsets, cursor.extent.start.offset)
        start += self.tokens[start].text != "("  # static_cast and its like
        return [t.text for t in self.tokens[start : closing(self.tokens, start)]]


def parsed(unit: Any, translated: str, lines: list[int], source: list[Token]) -> Parsed:
    tokens, offsets, here = [], [], 0
    for t in tokenise(translated):
        if t.kind not in ("marker", "blank"):
            tokens.append(t)
            offsets.append(here)
        here += len(t.text)
    return Parsed(unit, lines, tokens, offsets, source)


def cursors(tree: Parsed) -> Iterator[Cursor]:
    """Every node of the text, not of the headers."""
    for top in tree.unit.cursor.get_children():
        if top.location.file is not None and top.location.file.name == tree.unit.spelling:
            yield from top.walk_preorder()


def _no_space(words: list[str]) -> bool:
    return not any(w in ADDRESS_SPACES for w in words)


def _pointers(cursor: Cursor, tree: Parsed) -> Iterator[str]:
    """Apple: "pointer type must have explicit address space qualifier", on locals and casts too."""
    if cursor.kind in VARIABLES and cursor.type.kind in POINTERS:
        words = tree.declarator(cursor, "(,;{}<")
        if "auto" not in words and _no_space(words):
            yield f"{cursor.spelling} points to no address space"
        small = cursor.type.get_pointee().get_size() < 4  # also -5, of a template's parameter
        if "constant" in words and small and "&" not in words:
            yield f"{cursor.spelling}: constant memory has offsets of 4 bytes; device const may do"
    returns = cursor.kind in FUNCTIONS and cursor.result_type.kind in POINTERS
    if returns and _no_space(tree.declarator(cursor, ";{}")):
        yield f"{cursor.spelling} returns a pointer to no address space"
    if cursor.kind in CASTS and cursor.type.kind in POINTERS and _no_space(tree.cast(cursor)):
        yield "a cast to a pointer to no address space"


def _variables(cursor: Cursor, tree: Parsed) -> Iterator[str]:
    if cursor.kind == CursorKind.LAMBDA_EXPR:
        yield "a lambda: needs Metal 3.2"
    if cursor.kind in VARIABLES and cursor.type.kind in (TypeKind.LONGLONG, TypeKind.ULONGLONG):
        yield f"{cursor.spelling} is long long: Metal calls it long"
    if cursor.kind != CursorKind.VAR_DECL:
        return
    if cursor.storage_class == StorageClass.STATIC:
        yield f"{cursor.spelling} is static"
    if cursor.semantic_parent.kind in SCOPES and "constant" not in tree.declarator(cursor, ";{}"):
        yield f"{cursor.spelling}: variables outside of functions are in constant memory"


def _threadgroup_variables(cursor: Cursor, tree: Parsed) -> Iterator[str]:
    if cursor.kind not in FUNCTIONS or "kernel" in tree.declarator(cursor, ";{}"):
        return
    if any(inner.spelling == GENERATED for inner in cursor.walk_preorder()):
        yield f"{cursor.spelling} has a threadgroup variable and is no kernel"


def _calls(function: Cursor) -> set[str]:
    found = set()
    for inner in function.walk_preorder():
        if inner.kind == CursorKind.DECL_REF_EXPR and inner.referenced is not None:
            found.add(inner.referenced.get_usr())
    return found


def _recursion(tree: Parsed) -> Iterator[Problem]:
    functions = {c.get_usr(): c for c in cursors(tree) if c.kind in FUNCTIONS}
    calls = {usr: _calls(c) & functions.keys() for usr, c in functions.items()}
    for usr, cursor in functions.items():
        seen, todo = set(), list(calls[usr])
        while todo:
            callee = todo.pop()
            if callee not in seen:
                seen.add(callee)
                todo += calls[callee]
        if usr in seen:
            yield Problem(tree.line(cursor), f"lint: {cursor.spelling} calls itself")


def _tokens(source: list[Token]) -> Iterator[Problem]:
    for t in source:
        if t.kind == "marker" and "pragma" in t.text and not re.match(PRAGMAS, t.text):
            yield Problem(t.line, f"lint: unknown {t.text}")
    for before, t in pairwise(significant(source)):
        floating = re.fullmatch(r"(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?", t.text)
        if t.kind == "number" and floating:
            yield Problem(t.line, f"lint: {t.text} is a double: no f at its end")
        if before.text in ("%", "%="):
            yield Problem(t.line, "lint: %: Metal's compiler got (x / 65536) % 6 wrong")


def check(tree: Parsed) -> Iterator[Problem]:
    """Every breach, with its line."""
    yield from _tokens(tree.source)
    yield from _recursion(tree)
    for cursor in cursors(tree):
        for rule in (_pointers, _variables, _threadgroup_variables):
            for message in rule(cursor, tree):
                yield Problem(tree.line(cursor), f"lint: {message}")
