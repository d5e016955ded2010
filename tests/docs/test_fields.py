"""The tables that come from the code are complete and up to date."""

import dataclasses
import re
from pathlib import Path

import pytest

import hf_distill
import metal_ops
from tests.docs import fields
from tests.docs.fields import CONFIGS, PAGES, ROOT

PUBLIC = [hf_distill.HintCollator, hf_distill.CrossTokenizerCollator, hf_distill.SpanCollator]
PUBLIC += [hf_distill.Hint, hf_distill.ModelTeacher, hf_distill.SelfTeacher]
PUBLIC += [hf_distill.RoutedTeacher]
PUBLIC += [hf_distill.RemoteTeacher, hf_distill.CachedTeacher, hf_distill.cache_teacher]


def texts() -> dict[str, str]:
    return {page.name: page.read_text(encoding="utf-8") for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_up_to_date(page: Path) -> None:
    """`python -m tests.docs.fields` writes them."""
    text = page.read_text(encoding="utf-8")
    assert fields.filled(text) == text


def test_every_field_has_a_row() -> None:
    blocks = [block for text in texts().values() for block in fields.blocks(text)]
    groups = fields.groups()
    assert sorted(name for kind, name in blocks if kind == "fields") == sorted({*CONFIGS, *groups})
    assert [name for kind, name in blocks if kind == "changed"] == ["OPSDConfig"]
    page = texts()["fields.md"]
    for name in CONFIGS:
        parent = {x.name for x in dataclasses.fields(CONFIGS[name].__mro__[1])}
        own = set(CONFIGS[name].__annotations__) - parent
        assert all(f"| `{field}` |" in page for field in own)
        assert len(own) <= 17
    for group, value in groups.items():
        assert f"\n## {group}\n" in page
        assert all(f"| `{group}.{x.name}` |" in page for x in dataclasses.fields(value))


def test_every_field_says_what_it_is() -> None:
    for name in (*CONFIGS, *fields.groups()):
        for field in fields.own_fields(name):
            assert field.metadata.get("help", "").endswith((".", "...", ")")), (name, field.name)


def test_every_argument_has_a_table() -> None:
    for thing in (*PUBLIC, metal_ops.DivergenceSpec):
        documented = set(fields.arguments(thing))
        assert documented, thing
        module = "metal_ops" if thing is metal_ops.DivergenceSpec else "hf_distill"
        marker = f"<!-- arguments: {module}.{thing.__name__} -->"
        assert sum(marker in text for text in texts().values()) == 1, marker


@pytest.mark.parametrize("package", [hf_distill, metal_ops], ids=lambda x: x.__name__)
def test_every_public_name_is_on_a_page(package) -> None:
    everything = "\n".join(texts().values())
    assert not [name for name in package.__all__ if not re.search(rf"\b{name}\b", everything)]
