"""The command `cache export`: a cache as a parquet file."""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from hf_distill.cache.datasets import default_collator, load_data
from hf_distill.cache.export import Exporter
from hf_distill.cache.fingerprints import Collator, Data
from hf_distill.cache.reader import CacheReader
from hf_distill.data.turn_ends import tell_end_tokens

logger = logging.getLogger(__name__)

OF_DATA = ("split", "subset", "hint", "tokenizer")


def add_export(parsers: Any) -> None:
    """Add the command to those of `cache`."""
    made = parsers.add_parser("export", help="write a cache as a parquet file")
    made.set_defaults(run=_export)
    made.add_argument("path", help="the cache's folder, or a URL")
    made.add_argument("--to", required=True, help="the parquet file")
    made.add_argument("--dataset", help="the cached data: their input_ids are written too")
    made.add_argument("--split", help="of the data set; train, if left out")
    made.add_argument("--subset", help="of a data set of the hub")
    made.add_argument("--hint", help="as at the writing")
    made.add_argument("--tokenizer", help="of the data, if it is not where it was")
    made.add_argument("--overwrite", action="store_true", help="replace the file")


def _export(options: argparse.Namespace) -> int:
    try:
        data, collator = None, None
        of_data = [x for x in OF_DATA if getattr(options, x) is not None]
        if options.dataset is None and of_data:
            raise ValueError(f"--{of_data[0]} is of the data that --dataset names")
        if options.dataset is not None:
            data = load_data(options.dataset, options.split or "train", options.subset)
            collator = _collator(options, data)
        exporter = Exporter(options.path, data, collator)
        tokens = exporter.write(Path(options.to), options.overwrite)
    except ValueError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    logger.info("%s: %d tokens", options.to, tokens)
    return 0


def _collator(options: argparse.Namespace, data: Data) -> Collator:
    """Return the collator of the writing, as far as the manifest and the options say it."""
    if "input_ids" in data[0]:
        return default_collator(data, None, options.hint or ())
    config = CacheReader(options.path, "size").manifest.config
    teacher, own = (config.get(x) or {} for x in ("teacher", "tokenizer"))
    name, revision = teacher.get("name_or_path"), teacher.get("revision")
    words = options.tokenizer or own.get("name_or_path") or name
    tokenizer = AutoTokenizer.from_pretrained(words, revision=revision if words == name else None)
    return tell_end_tokens(default_collator(data, tokenizer, options.hint or ()), _ends(config))


def _ends(config: Any) -> list[int]:
    """Return the ids at which the teacher's generation config ends replies; none if it is gone."""
    name, revision = (config["teacher"].get(x) for x in ("name_or_path", "revision"))
    try:
        found = GenerationConfig.from_pretrained(name, revision=revision)
    except OSError:
        try:
            model = AutoConfig.from_pretrained(name, revision=revision)
        except (OSError, ValueError):
            return []
        found = GenerationConfig.from_model_config(model)
    ids: Any = found.eos_token_id
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]
