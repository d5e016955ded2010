"""Write metal_ops as a source tree for kernel-builder: `python -m tests.metal_ops.hub FOLDER`.

A kernel on the Hugging Face hub is loaded from any path, under a name of its own, perhaps beside
another version of itself. So its imports are relative, and its operators are registered in a
namespace that the builder puts into a generated module, `_ops`; ours of that name becomes
`_custom_ops`. Everything here is Python and text, which the builder calls noarch: there is nothing
to compile. Rules: huggingface/kernels, docs/source/builder/writing-kernels.md at 0b37842a.
"""

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEFT_OUT = ("selftest", "__main__.py", "bench.py")  # for a checkout or an installed package
BUILD = """\
[general]
name = "metal-ops"
version = 1
edition = 6
license = "Apache-2.0"
backends = ["cpu", "cuda", "metal", "rocm", "xpu"]

[torch-noarch]
pyext = ["py", "metal"]
"""
IMPORT = re.compile(r"^(\s*)from metal_ops(\.[\w.]+)? import (.*)$", re.MULTILINE)
OPERATOR = re.compile(r'"metal_ops::(\w+)"')


def relative(text: str, depth: int) -> str:
    """A module's text with relative imports and the builder's namespace.

    Args:
        text: of a module of metal_ops.
        depth: folders between it and the package.
    """
    dots = "." * (depth + 1)

    def rewrite(match: re.Match[str]) -> str:
        indent, module, names = match.groups()
        module = re.sub(r"^_ops\b", "_custom_ops", (module or "").removeprefix("."))
        if not module:
            names = re.sub(r"\b_ops\b", "_custom_ops as _ops", names)
        return f"{indent}from {dots}{module} import {names}"

    text = IMPORT.sub(rewrite, text)
    if OPERATOR.search(text):
        text = OPERATOR.sub(r'add_op_namespace_prefix("\1")', text)
        first = text.index("\nfrom ") if "\nfrom " in text else text.index("\nimport ")
        text = f"{text[:first]}\nfrom {dots}_ops import add_op_namespace_prefix{text[first:]}"
    if re.search(r"^\s*(import|from) metal_ops\b", text, re.MULTILINE):
        raise ValueError("an import of metal_ops must be written as `from metal_ops... import ...`")
    return text


def write(folder: Path) -> Path:
    """The tree in `folder`, which is made anew; returns that of the package in it."""
    package = folder / "torch-ext" / "metal_ops"
    if folder.exists():
        shutil.rmtree(folder)
    for source in sorted((ROOT / "metal_ops").rglob("*")):
        path = source.relative_to(ROOT / "metal_ops")
        if path.parts[0] in LEFT_OUT or source.suffix not in (".py", ".metal"):
            continue
        name = "_custom_ops.py" if path.as_posix() == "_ops.py" else path.name
        target = package / path.with_name(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text()
        if source.suffix == ".py":
            text = relative(text, len(path.parts) - 1)
        target.write_text(text)
    (folder / "build.toml").write_text(BUILD)
    shutil.copy(ROOT / "LICENSE", folder)
    return package


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: {sys.argv[0]} FOLDER")
    print(write(Path(sys.argv[1])))
