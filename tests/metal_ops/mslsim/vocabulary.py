"""Names that Metal kernels may take from the language and its library.

vocabulary.tsv says of each where text that Apple's compiler accepts today uses it. The kernels
may name nothing else, so that what one machine cannot compile no other is asked to for the first
time.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from tests.metal_ops.mslsim.lint import Parsed, Problem, cursors
from tests.metal_ops.mslsim.tokens import Token, significant

FILE = Path(__file__).parent / "vocabulary.tsv"


def entries() -> dict[str, tuple[str, str]]:
    """What each name is, and where it is accepted."""
    with FILE.open() as f:
        rows = list(csv.reader(f, delimiter="\t"))[1:]
    return {name: (what, where) for name, what, where in rows}


def _declared(tree: Parsed) -> set[str]:
    """What the text itself gives a name to."""
    return {c.spelling for c in cursors(tree) if c.kind.is_declaration()}


def _used(tokens: list[Token]) -> Iterator[tuple[str, int]]:
    """Names with their qualification, without that of metal::, and their lines."""
    i = 0
    while i < len(tokens):
        start, parts = i, [tokens[i].text]
        while i + 2 < len(tokens) and tokens[i + 1].text == "::" and tokens[i].kind == "name":
            parts.append(tokens[i + 2].text)
            i += 2
        i += 1
        if tokens[start].kind == "name" and (start == 0 or tokens[start - 1].text != "."):
            known = parts[1:] if parts[0] == "metal" and len(parts) > 1 else parts
            yield "::".join(known), tokens[start].line


def check(tree: Parsed) -> Iterator[Problem]:
    known, declared = entries(), _declared(tree)
    for name, line in _used(significant(tree.source)):
        if name not in known and name.split("::")[0] not in declared:
            yield Problem(
                line, f"vocabulary: {name} is not known to be accepted by Apple's compiler"
            )
