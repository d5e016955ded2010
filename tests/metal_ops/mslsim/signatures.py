"""The kernels of a text: their names, and what each parameter is bound to."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tests.metal_ops.mslsim.tokens import (
    ADDRESS_SPACES,
    MslError,
    Token,
    attribute,
    closing,
    significant,
    spelled,
    split,
    without_attributes,
)

POSITIONS = (
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_threadgroup",
    "threads_per_grid",
    "threadgroups_per_grid",
    "dispatch_threads_per_threadgroup",
)
SCALARS = (
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "threads_per_simdgroup",
)
MAX_BUFFERS = 31


class Parameter(NamedTuple):
    name: str
    attribute: str  # without [[ and ]]
    space: str  # device, constant, threadgroup, thread or ""
    reference: str  # "*", "&" or ""
    constant: bool
    base: str  # the type without all that
    buffer: int = -1  # its index; -1 is a position

    @property
    def position(self) -> bool:
        return self.attribute in POSITIONS + SCALARS


class Kernel(NamedTuple):
    name: str  # as compile_shader's caller knows it
    expression: str  # as C++ calls it
    parameters: list[Parameter]
    max_threads: int

    @property
    def buffers(self) -> list[Parameter]:
        return sorted((p for p in self.parameters if p.buffer >= 0), key=lambda p: p.buffer)


class _Template(NamedTuple):
    parameters: list[Parameter]
    names: list[tuple[str, str]]  # of its own parameters, with their defaults


def _parameter(tokens: Sequence[Token]) -> Parameter:
    kept, attributes = without_attributes(tokens)
    words = [t.text for t in kept]
    kind, name = words[:-1], words[-1]
    space = next((w for w in kind if w in ADDRESS_SPACES), "")
    reference = next((w for w in kind if w in "*&"), "")
    skip = (*ADDRESS_SPACES, "const", "volatile", "*", "&")
    base = " ".join(w for w in kind if w not in skip)
    constant = "const" in kind or space == "constant"
    return Parameter(name, "".join(attributes), space, reference, constant, base)


def _declarations(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """What stands before each body or semicolon, outside of functions and structs."""
    head, i = [], 0
    while i < len(tokens):
        t = tokens[i]
        if t.text == "{":
            if head and head[0].text == "namespace":
                head = []
                i += 1
                continue
            i = closing(tokens, i)
            yield head
            head = []
            continue
        if t.text in (";", "}"):
            yield head
            head = []
        else:
            head.append(t)
        i += 1


def _head(tokens: Sequence[Token]) -> tuple[list[Token], list[str], list[Parameter]]:
    """Of a function: what stands before its parameters, the attributes there, the parameters."""
    before, attributes, i = [], [], 0
    while i < len(tokens):
        found = attribute(tokens, i)
        if found is not None:
            attributes.append(found[0])
            i = found[1]
        elif tokens[i].text == "(":
            end = closing(tokens, i)
            return before, attributes, [_parameter(p) for p in split(tokens[i + 1 : end - 1])]
        else:
            before.append(tokens[i])
            i += 1
    return before, attributes, []


def _string(attributes: Sequence[str], pattern: str, default: str) -> str:
    found = re.search(pattern, " ".join(attributes), re.DOTALL)
    return found.group(1) if found else default


def _host_name(attributes: Sequence[str], default: str) -> str:
    quoted = _string(attributes, r"host_name\s*\(((?:\s*\"[^\"]*\"\s*)+)\)", f'"{default}"')
    return "".join(re.findall(r'"([^"]*)"', quoted))


def _template(head: Sequence[Token], parameters: list[Parameter]) -> _Template:
    names = []
    for part in split(head[2 : closing(head, 1) - 1]):
        words = [t.text for t in part]
        default = ""
        if "=" in words:
            default = " ".join(words[words.index("=") + 1 :])
            words = words[: words.index("=")]
        names.append((words[-1], default))
    return _Template(parameters, names)


def _instance(
    kept: Sequence[Token], templates: dict[str, _Template]
) -> tuple[str, list[Parameter]]:
    """`template decltype(f<A>) f<A>`: what to call, and the parameters with the arguments in."""
    start = closing(kept, 2)
    name, arguments = kept[start].text, split(kept[start + 2 : -1])
    values = [spelled(a) for a in arguments]
    template = templates[name]
    given = dict(zip((n for n, _ in template.names), values, strict=False))
    for own, default in template.names:
        given.setdefault(own, given.get(default, default))
    return spelled(kept[start:]), [
        p._replace(base=" ".join(given.get(w, w) for w in p.base.split()))
        for p in template.parameters
    ]


def _alias(texts: Sequence[str]) -> tuple[str, str] | None:
    """The name and the type of `using name = type` and `typedef type name`."""
    if texts[:1] == ["using"] and texts[2:3] == ["="]:
        return texts[1], " ".join(texts[3:])
    if texts[:1] == ["typedef"]:
        return texts[-1], " ".join(texts[1:-1])
    return None


def _is_kernel(before: Sequence[Token], attributes: Sequence[str]) -> bool:
    return any(t.text == "kernel" for t in before) or "kernel" in attributes


def _bind(kernel: Kernel) -> Kernel:
    """With buffer indices, which torch fills by the position of the argument."""
    where, bound, following = f"kernel {kernel.name}: parameter", [], 0
    for p in kernel.parameters:
        if p.position:
            allowed = r"(uint|ushort)[23]?" if p.attribute in POSITIONS else "uint|ushort"
            if p.reference or not re.fullmatch(allowed, p.base):
                raise MslError(
                    f"{where} {p.name}: [[{p.attribute}]] is uint or ushort, got {p.base}"
                )
            bound.append(p)
            continue
        index = re.fullmatch(r"buffer\s*\(\s*(\d+)\s*\)", p.attribute)
        if p.attribute and not index:
            raise MslError(f"{where} {p.name}: unknown attribute [[{p.attribute}]]")
        if p.space not in ("device", "constant") or not p.reference:
            raise MslError(f"{where} {p.name} must point to device or constant memory")
        bound.append(p._replace(buffer=int(index.group(1)) if index else following))
        following = bound[-1].buffer + 1
    indices = [p.buffer for p in bound if p.buffer >= 0]
    if indices != list(range(len(indices))) or len(indices) > MAX_BUFFERS:
        raise MslError(
            f"kernel {kernel.name}: buffers {indices}, expected 0, 1, 2 ... in this order"
        )
    return kernel._replace(parameters=bound)


def _without_aliases(kernel: Kernel, aliases: dict[str, str]) -> Kernel:
    parameters = [p._replace(base=aliases.get(p.base, p.base)) for p in kernel.parameters]
    return kernel._replace(parameters=parameters)


def kernels(tokens: Sequence[Token]) -> list[Kernel]:
    """All that a Metal library of this text would export, in the order of the text."""
    found: list[Kernel] = []
    templates: dict[str, _Template] = {}
    aliases: dict[str, str] = {}
    for head in _declarations(significant(tokens)):
        texts = [t.text for t in head]
        aliases.update([a for a in [_alias(texts)] if a is not None])
        if texts[:1] == ["template"] and "decltype" in texts:
            kept, attributes = without_attributes(head)
            if _is_kernel(kept, attributes):
                kept = [t for t in kept if t.text != "kernel"]
                expression, parameters = _instance(kept[:1] + kept[1:], templates)
                name = _host_name(attributes, expression)
                found.append(Kernel(name, expression, parameters, 1024))
            continue
        before, attributes, parameters = _head(head)
        if not _is_kernel(before, attributes):
            continue
        words = [t.text for t in before]
        expression = spelled(before[words.index("void") + 1 :])
        name = expression.split(" ")[0]
        if words[:2] == ["template", "<"]:
            templates[name] = _template(before, parameters)
            continue
        limit = _string(attributes, r"max_total_threads_per_threadgroup\s*\((\d+)\)", "1024")
        found.append(Kernel(_host_name(attributes, name), expression, parameters, int(limit)))
    if not found:
        raise MslError("no kernel in the text")
    return [_bind(_without_aliases(k, aliases)) for k in found]
