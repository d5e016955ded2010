"""Properties of the tree itself: sizes, first lines, who imports whom."""

import ast
import importlib
import subprocess
from pathlib import Path

import pytest

import hf_distill
import metal_ops

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    p for d in ("metal_ops", "hf_distill", "recipes") for p in (ROOT / d).rglob("*.py")
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.py"))
WINGS = ("cache", "data", "losses", "models", "rollouts", "teachers")
FACES = ("hf_distill", *(f"hf_distill.{wing}" for wing in WINGS))  # what recipes may import


def tracked() -> set[str]:
    """Files that git knows or would know, without ignored ones."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.splitlines() if (ROOT / name).exists()}


def imported(tree: ast.AST) -> dict[str, set[str]]:
    """The modules that a file imports, and the names that it takes from each."""
    found = {a.name: set() for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_is_short(path: Path):
    assert len(path.read_text().splitlines()) < 400


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_recipes_use_the_public_package(path: Path):
    found = imported(ast.parse(path.read_text()))
    assert not [name for name in found if name.split(".")[0] in ("metal_ops", "recipes")]
    own = {name for name in found if name.split(".")[0] == "hf_distill"}
    assert own <= set(FACES)
    for face in own:
        assert found[face] <= set(importlib.import_module(face).__all__), face


@pytest.mark.parametrize("package", [hf_distill, metal_ops], ids=lambda p: p.__name__)
def test_public_names_are_documented(package):
    for name in package.__all__:
        assert getattr(package, name).__doc__, name


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_first_line_says_what_a_file_is(path: Path):
    """There is no other list of files: this line must be enough to find one."""
    first = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
    assert len(first) >= 10
    assert first.endswith((".", ":"))


def test_the_top_level_is_the_agreed_one():
    top = {name.split("/")[0] for name in tracked()}
    assert top - {"findings"} == {
        ".ci",
        ".gitignore",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "docs",
        "hf_distill",
        "metal_ops",
        "pyproject.toml",
        "recipes",
        "tests",
    }
