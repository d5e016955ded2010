"""The command `cache import`: what others have written of a teacher, as a cache."""

import argparse
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import AutoTokenizer

from hf_distill.cache.arrays import ENTRIES, ArrayLogProbs
from hf_distill.cache.datasets import default_collator, load_data
from hf_distill.cache.distillkit import DistillKitLogProbs
from hf_distill.cache.files import commit
from hf_distill.cache.from_log_probs import cache_log_probs
from hf_distill.cache.progress import VERIFY
from hf_distill.cache.recorded import RecordedLogProbs

logger = logging.getLogger(__name__)

TABLES = ("arrays", "distillkit")
FORMATS: dict[str, Callable[[argparse.Namespace], RecordedLogProbs | ArrayLogProbs]] = {
    "completions": lambda given: RecordedLogProbs(given.source, given.top_k, given.name),
    "arrays": lambda given: ArrayLogProbs(
        given.source,
        given.top_k,
        given.name,
        entries=given.entries,
        split=given.source_split or "train",
    ),
    "distillkit": lambda given: DistillKitLogProbs(
        given.source,
        given.top_k,
        given.name,
        config=given.config,
        entries=given.entries,
        split=given.source_split or "train",
    ),
}


def add_import(parsers: Any) -> None:
    """Add the command to those of `cache`."""
    made = parsers.add_parser(
        "import", help="make a cache of what others have written of a teacher"
    )
    made.set_defaults(run=_import)
    made.add_argument("format", choices=FORMATS)
    made.add_argument(
        "source", metavar="PATH", help="a file; of arrays and DistillKit a folder too"
    )
    made.add_argument("--out", required=True, help="the cache's folder")
    made.add_argument("--top_k", type=int, required=True, help="entries of a token that are kept")
    made.add_argument("--tokenizer", help="the teacher's: a name or a folder")
    made.add_argument("--vocab_size", type=int, help="logits per token, if not the tokenizer's ids")
    made.add_argument("--name", help="of the teacher, for the manifest; PATH, if left out")
    made.add_argument("--rows", help="also write the rows to this .jsonl file, to train with")
    made.add_argument("--dataset", help="cache these rows, which PATH must have; all, if left out")
    made.add_argument("--split", help="of the data set; train, if left out")
    made.add_argument("--subset", help="of a data set of the hub")
    made.add_argument("--source_split", help="of PATH, if it is a folder; train, if left out")
    made.add_argument("--entries", choices=ENTRIES, help="the token of entry t; found, if left out")
    made.add_argument("--config", help="DistillKit's compression_config.yaml, if not beside PATH")
    made.add_argument("--batch_size", type=int, default=32)
    made.add_argument("--shard_rows", type=int)
    made.add_argument("--overwrite", action="store_true", help="delete another cache in --out")
    made.add_argument("--verify", default="size", choices=VERIFY)


def _import(options: argparse.Namespace) -> int:
    try:
        return _imported(options)
    except ValueError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _imported(options: argparse.Namespace) -> int:
    if options.tokenizer is None and options.vocab_size is None:
        raise ValueError("the logits per token must be known: give --tokenizer or --vocab_size")
    unread = {"config": ("distillkit",)} | dict.fromkeys(("entries", "source_split"), TABLES)
    for name, formats in unread.items():
        if getattr(options, name) is not None and options.format not in formats:
            raise ValueError(f"--{name} is of {' and '.join(formats)}, not of {options.format}")
    if options.dataset is None and (options.split or options.subset):
        raise ValueError("--split and --subset are of the rows that --dataset names")
    options.name = options.name or options.source
    source = FORMATS[options.format](options)
    words = options.tokenizer
    tokenizer = None if words is None else AutoTokenizer.from_pretrained(words)
    data: Any = source.rows
    if options.dataset is not None:
        data = load_data(options.dataset, options.split or "train", options.subset)
    if options.rows is not None:
        _write_rows(Path(options.rows), source.rows)
    manifest = cache_log_probs(
        source,
        data,
        options.out,
        vocab_size=options.vocab_size,
        data_collator=default_collator(data, tokenizer),
        processing_class=tokenizer,
        batch_size=options.batch_size,
        shard_rows=options.shard_rows,
        overwrite=options.overwrite,
        verify=options.verify,
    )
    logger.info("%s: %d rows, %d tokens", options.out, manifest.num_rows, manifest.stats["tokens"])
    return 0


def _write_rows(path: Path, rows: Any) -> None:
    """Write rows as JSON, one a line; the file is there when it is whole."""
    numbers = tqdm(range(len(rows)), desc="rows", unit="row")
    _, digest = commit(path, (json.dumps(rows[i]).encode() + b"\n" for i in numbers))
    logger.info("%s: %d rows with input_ids and labels, sha256 %s", path, len(rows), digest[:12])
