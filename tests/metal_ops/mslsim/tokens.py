"""Metal text as tokens that know their line: macros expanded, every keyword still in place."""

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._cpp_embed_headers import _embed_headers

from tests.metal_ops.mslsim import compilers

METAL_VERSION = 310  # the oldest language that torch asks for: Metal 3.1
ADDRESS_SPACES = ("device", "constant", "threadgroup", "thread")

TOKEN = re.compile(
    r"""(?P<marker>^\#[^\n]*$)
    |(?P<blank>\s+)
    |(?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
    |(?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
    |(?P<name>[A-Za-z_]\w*)
    |(?P<op>::|->|<<=|>>=|\+\+|--|[-+*/%&|^!=<>]=|&&|\|\||.)""",
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)


class MslError(SyntaxError):
    """Text that is not Metal, as far as one can tell without Apple's compiler."""


class Token(NamedTuple):
    kind: str  # marker, blank, text, number, name or op
    text: str
    line: int  # of the text that was given; 0 in other files


def embed(text: str) -> str:
    """The text with c10/metal headers in it, by the function that torch.mps.compile_shader uses."""
    include = Path(torch.__file__).parent / "include"
    return _embed_headers([line + "\n" for line in text.split("\n")], [include], set())


def preprocess(text: str, name: str) -> str:
    """With macros expanded, comments gone and `name` in the line markers."""
    text = re.sub(r"^[ \t]*#[ \t]*include[ \t]*<metal_\w+>[^\n]*$", "", text, flags=re.MULTILINE)
    command = [compilers.find(), "-E", "-x", "c++", "-nostdinc", "-undef", "-D__METAL__=1"]
    command += [f"-D__METAL_VERSION__={METAL_VERSION}", "-D__HAVE_BFLOAT__=1", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MslError(done.stderr.replace("<stdin>", name))
    return done.stdout.replace('"<stdin>"', f'"{name}"')


def tokenise(text: str) -> list[Token]:
    """Every character of preprocessed text, in tokens."""
    tokens, line = [], 1
    for match in TOKEN.finditer(text):
        kind, part = str(match.lastgroup), match.group()
        tokens.append(Token(kind, part, line))
        marker = re.match(r"#\s*(?:line\s+)?(\d+)", part) if kind == "marker" else None
        line = int(marker.group(1)) - 1 if marker else line + part.count("\n")
    return tokens


def significant(tokens: Sequence[Token]) -> list[Token]:
    return [t for t in tokens if t.kind not in ("marker", "blank")]


def closing(tokens: Sequence[Token], start: int) -> int:
    """The index behind the bracket that closes the one at `start`."""
    opens = tokens[start].text
    closes = {"(": ")", "[": "]", "{": "}", "<": ">"}[opens]
    depth = 0
    for i in range(start, len(tokens)):
        depth += (tokens[i].text == opens) - (tokens[i].text == closes)
        if depth == 0:
            return i + 1
    raise MslError(f"line {tokens[start].line}: {opens} without {closes}")


def attribute(tokens: Sequence[Token], i: int) -> tuple[str, int] | None:
    """The text of [[...]] at i and the index behind it."""
    if i + 1 >= len(tokens) or tokens[i].text != "[" or tokens[i + 1].text != "[":
        return None
    end = closing(tokens, i)
    return "".join(t.text for t in tokens[i + 2 : end - 2]).strip(), end


def without_attributes(tokens: Sequence[Token]) -> tuple[list[Token], list[str]]:
    """The other tokens, and the texts of the attributes."""
    kept, attributes, i = [], [], 0
    while i < len(tokens):
        found = attribute(tokens, i)
        if found is None:
            kept.append(tokens[i])
            i += 1
        else:
            attributes.append(found[0])
            i = found[1]
    return kept, attributes


def split(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """Between commas that no bracket, round or angular, encloses."""
    part, depth = [], 0
    for t in tokens:
        depth += (t.text in ("(", "[", "{", "<")) - (t.text in (")", "]", "}", ">"))
        if t.text == "," and depth == 0:
            yield part
            part = []
        else:
            part.append(t)
    if part:
        yield part


def spelled(tokens: Sequence[Token]) -> str:
    return " ".join(t.text for t in tokens)
