"""What README and docs say of files, links, targets, tests and kinds is so."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import hf_distill
from hf_distill import DistillConfig
from hf_distill.cache.codecs import CODECS
from metal_ops import available_backends
from metal_ops.spec import KINDS
from tests.docs.fields import PAGES, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\(([^)\s]+)\)")


def page(name: str) -> str:
    return (DOCS / "pages" / name).read_text(encoding="utf-8")


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub and MkDocs spell them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), link
        assert not anchor or anchor in anchors(found), link


def test_the_site_has_every_page() -> None:
    listed = re.findall(r": ([\w.]+\.md)$", (DOCS / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(x.name for x in PAGES if x.name != "README.md")


@pytest.mark.parametrize(
    "path", sorted((DOCS / "pages" / "images").iterdir()), ids=lambda x: x.name
)
def test_pictures_are_readable(path: Path) -> None:
    """In light and dark, and for those who cannot see them."""
    root = ElementTree.parse(path).getroot()
    names = {element.tag.rpartition("}")[2] for element in root}
    assert {"title", "desc", "style"} <= names
    assert "prefers-color-scheme: dark" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("text", [README, page("trainers.md")], ids=["README", "trainers"])
def test_changed_lines_of_a_trainer_script(text: str) -> None:
    found = re.search(r"```diff\n(.*?)```", text, re.DOTALL)
    assert found is not None
    lines = found[1].splitlines()
    removed = [line for line in lines if line.startswith("-")]
    added = [line for line in lines if line.startswith("+")]
    assert len(removed) == len(added) <= 5
    config = DistillConfig(output_dir="out", report_to="none", use_cpu=True)
    assert issubclass(DistillConfig, type(config).__mro__[1])
    assert all(hasattr(hf_distill, name) for name in re.findall(r"Distill\w+", " ".join(added)))


def test_table_of_losses() -> None:
    section = page("losses.md").split("## Divergences")[1].split("\n#")[0]
    assert re.findall(r"^\| `(\w+)` \| \S.* \|$", section, re.MULTILINE) == list(KINDS)


def test_backends_that_are_named_exist() -> None:
    assert "Metal kernels on Apple GPUs, Triton kernels" in page("metal_ops.md")
    assert list(available_backends()) == ["metal", "triton", "compiled", "chunked"]
    assert available_backends()["chunked"] is None


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)) <= targets, path


def test_tests_that_are_named_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page("other_libraries.md"))
    assert len(named) >= 15
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), (path, name)


def test_recipes_that_are_named_exist() -> None:
    for path in PAGES:
        for name in re.findall(r"recipes/([\w.]+\.(?:py|yaml))", path.read_text(encoding="utf-8")):
            assert (ROOT / "recipes" / name).exists(), (path, name)


def test_codecs_are_named_as_in_the_code() -> None:
    table = re.findall(r"^\| `(\w+)`, `\"(\w+)\"` \|", page("caches.md"), re.MULTILINE)
    assert table == [(kind.__name__, name) for name, kind in CODECS.items()]
