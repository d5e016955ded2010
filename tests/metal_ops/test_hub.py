"""metal_ops as a kernel of the Hugging Face hub: the tree loads from anywhere, under any name."""

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

import metal_ops
from tests.metal_ops import hub

# what the builder generates
GENERATED = """\
import torch
ops = torch.ops.{name}
def add_op_namespace_prefix(op_name):
    return f"{name}::{{op_name}}"
"""


def load(package: Path, name: str) -> ModuleType:
    (package / "_ops.py").write_text(GENERATED.format(name=name))
    spec = importlib.util.spec_from_file_location(name, package / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kernel(tmp_path):
    name = "_metal_ops_0123abc"
    yield load(hub.write(tmp_path / "kernel"), name)
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[module]


def test_it_computes_beside_the_installed_package(kernel):
    student, teacher = torch.randn(2, 3, 33)
    results = []
    for package in (metal_ops, kernel):
        leaf = student.clone().requires_grad_()
        spec = package.DivergenceSpec("jsd", beta=0.3, temperature=2.0)
        loss = package.divergence(leaf, teacher, spec)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want)
    assert kernel.divergence is not metal_ops.divergence
    assert hasattr(torch.ops._metal_ops_0123abc, "divergence")


def test_no_module_names_the_package(tmp_path):
    package = hub.write(tmp_path / "kernel")
    named = re.compile(
        r'^\s*(import|from) metal_ops|import_module\(f?"metal_ops|"metal_ops::', re.M
    )
    for path in package.rglob("*.py"):
        assert not named.search(path.read_text()), path
    assert not (package / "_ops.py").exists()  # the builder writes its own
    assert {p.suffix for p in package.rglob("*") if p.is_file()} <= {".py", ".metal"}


def test_the_build_file_names_the_package_and_its_files(tmp_path):
    package = hub.write(tmp_path / "kernel")
    build = tomllib.loads((tmp_path / "kernel" / "build.toml").read_text())
    assert build["general"]["name"].replace("-", "_") == package.name
    assert set(build["torch-noarch"]["pyext"]) == {"py", "metal"}


def test_an_import_it_cannot_rewrite_is_an_error():
    with pytest.raises(ValueError, match="must be written"):
        hub.relative("import metal_ops.spec\n", 0)
