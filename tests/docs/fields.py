"""Write the tables of README and docs that come from the code: `python -m tests.docs.fields`.

A table stands between `<!-- kind: name -->` and `<!-- end -->`. Kinds: `fields` and `changed` of a
config or a group, `arguments` of a class or function, `faults` and `presets`.
"""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_distill import DistillConfig, OPSDConfig
from hf_distill.monitoring.faults import CHECKS, NOT_WATCHED
from metal_ops import presets

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").glob("*.md"))]
KINDS = "fields|changed|arguments|faults|presets"
BLOCK = re.compile(rf"(<!-- ({KINDS})(?:: ([\w.]+))? -->\n).*?(?=<!-- end -->)", re.DOTALL)
CONFIGS: dict[str, type] = {"DistillConfig": DistillConfig, "OPSDConfig": OPSDConfig}


def made() -> OPSDConfig:
    """A config with every group, those that are off by default too."""
    return OPSDConfig(
        output_dir="out", report_to="none", use_cpu=True, divergence="forward_kl", taid={}
    )


def groups() -> dict[str, Any]:
    """The groups of the configs by name, with their defaults."""
    config = made()
    found = {x.name: getattr(config, x.name) for x in dataclasses.fields(config)}
    own = {*DistillConfig.__annotations__, *OPSDConfig.__annotations__}
    return {k: v for k, v in found.items() if k in own and dataclasses.is_dataclass(v)}


def own_fields(name: str) -> list[dataclasses.Field]:
    """The fields that a config adds, or those of a group."""
    if name in CONFIGS:
        config = CONFIGS[name]
        parent = {x.name for x in dataclasses.fields(config.__mro__[1])}
        return [x for x in dataclasses.fields(config) if x.name not in parent]
    return list(dataclasses.fields(groups()[name]))


def changed_fields(name: str) -> list[dataclasses.Field]:
    """The fields of a config's parent for which it has another default."""
    config = CONFIGS[name]
    before = {x.name: x.default for x in dataclasses.fields(config.__mro__[1])}
    fields = dataclasses.fields(config)
    return [x for x in fields if x.name in before and before[x.name] != x.default]


def _cell(text: str) -> str:
    """Text as a cell: one line, and no bar that ends it."""
    escaped = re.sub(r"\s+", " ", text).strip().replace("|", "&#124;")
    return re.sub(r"<(\w+)>", r"&lt;\1&gt;", escaped)


def _sentence(text: str) -> str:
    return _cell(text[0].upper() + text[1:])


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(line)} |".replace("|  |", "| |") for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]]) + "\n"


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()!r}`"
    if field.name in groups() and field.name != "taid":
        return f"[a group](#{field.name})"
    return f"`{field.default!r}`".replace("'", '"')


def _of_fields(fields: list[dataclasses.Field], prefix: str = "") -> str:
    rows = ((f"`{prefix}{x.name}`", _default(x), _cell(x.metadata["help"])) for x in fields)
    return _table(("field", "default", "meaning"), rows)


def sections(doc: str) -> dict[str, str]:
    """The parts of a Google docstring by title."""
    parts = re.split(r"^(Args|Attributes|Returns|Raises|Source|Numerics):\n", doc, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def arguments(thing: Any) -> dict[str, str]:
    """What a class or function takes: from its docstring, the text of each argument."""
    text = sections(inspect.getdoc(thing) or "").get("Args", "")
    found = re.findall(r"^ {4}(\*{0,2}\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    return dict(found)


def _of_arguments(path: str) -> str:
    module, _, name = path.rpartition(".")
    thing = getattr(importlib.import_module(module), name)
    parameters = inspect.signature(thing).parameters

    def default(argument: str) -> str:
        given = parameters[argument.lstrip("*")]
        if given.kind in (given.VAR_KEYWORD, given.VAR_POSITIONAL):
            return ""
        if given.default is given.empty:
            return "required"
        shown = repr(given.default)
        return "empty" if "factory" in shown or shown == "()" else f"`{shown}`".replace("'", '"')

    rows = ((f"`{x}`", default(x), _sentence(text)) for x, text in arguments(thing).items())
    return _table((f"argument of `{name}`", "default", "meaning"), rows)


def _of_faults() -> str:
    limits = {x.name: x for x in own_fields("watchdog")}
    rows = (
        (
            f"`{x.fault}`",
            f"`{x.metric}`",
            _cell(limits[x.fault].metadata["help"].removesuffix(NOT_WATCHED)),
            f"`{limits[x.fault].default!r}`",
            _sentence(f"{x.text}."),
        )
        for x in CHECKS
    )
    return _table(("fault", "metric", "limit", "default", "what it means, and what to do"), rows)


def _of_presets() -> str:
    def row(name: str) -> tuple[str, ...]:
        preset = getattr(presets, name)
        signature = inspect.signature(preset)
        given = [f"{x.name}={x.default!r}" for x in signature.parameters.values()]
        first = (preset.__doc__ or "").partition("\n")[0]
        return f"`{name}`", f"`{', '.join(given)}`", _cell(first)

    return _table(("preset", "arguments", "what it does"), map(row, presets.NAMES))


def table(kind: str, name: str) -> str:
    """The text of one table."""
    if kind == "fields":
        return _of_fields(own_fields(name), "" if name in CONFIGS else f"{name}.")
    if kind == "changed":
        return _of_fields(changed_fields(name))
    if kind == "arguments":
        return _of_arguments(name)
    return _of_faults() if kind == "faults" else _of_presets()


def blocks(text: str) -> list[tuple[str, str]]:
    """The (kind, name) of each table of a page."""
    return [(kind, name) for _, kind, name in BLOCK.findall(text)]


def filled(text: str) -> str:
    """A page with its tables as the code has them."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{table(found[2], found[3])}\n", text)


if __name__ == "__main__":
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        if (after := filled(before)) != before:
            page.write_text(after, encoding="utf-8")
            print(f"written: {page.relative_to(ROOT)}")
