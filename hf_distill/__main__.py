"""python -m hf_distill: caches, plans, forecasts, heat maps and a server on the command line.

python -m hf_distill cache write MODEL DATASET PATH
accelerate launch -m hf_distill cache write MODEL DATASET PATH
python -m hf_distill cache inspect PATH
python -m hf_distill cache import completions FILE --out PATH --top_k 20 --tokenizer MODEL
python -m hf_distill cache export PATH --to FILE.parquet
python -m hf_distill plan MODEL [TEACHER] --devices 8
python -m hf_distill forecast MODEL DATASET --hint COLUMN
python -m hf_distill heatmap FOLDER --out heat_map.html
python -m hf_distill serve MODEL
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

import hf_distill
from hf_distill.cache import (
    CachedTeacher,
    CacheError,
    CacheReader,
    cache_teacher,
    default_collator,
    load_data,
    make_codec,
)
from hf_distill.cache.codecs import CODECS
from hf_distill.cache.commands import add_import
from hf_distill.cache.export_command import add_export
from hf_distill.cache.inspect import describe, measure
from hf_distill.cache.progress import VERIFY as VERIFY_WRITTEN
from hf_distill.cache.reader import VERIFY as VERIFY_READ
from hf_distill.monitoring.heat_map import add_heat_map
from hf_distill.monitoring.plan_command import add_plan
from hf_distill.serving import add_serve
from hf_distill.teachers import ModelTeacher
from hf_distill.trainers.forecast_command import add_forecast


def _write(options: argparse.Namespace) -> int:
    given = {"dtype": options.dtype, "quantization": options.quantization}
    if options.revision is not None:
        given["revision"] = options.revision
    data = load_data(options.dataset, options.split, options.subset)
    tokenizer = AutoTokenizer.from_pretrained(
        options.tokenizer or options.model,
        revision=None if options.tokenizer else options.revision,
    )
    cache_teacher(
        ModelTeacher(options.model, **given),
        data,
        options.path,
        codec=make_codec(options.codec, options.codec_settings),
        data_collator=default_collator(data, tokenizer, options.hint or ()),
        processing_class=tokenizer,
        batch_size=options.batch_size,
        shard_rows=options.shard_rows,
        seed=options.seed,
        overwrite=options.overwrite,
        verify=options.verify,
        teacher_revision=options.revision,
    )
    return 0


def _inspect(options: argparse.Namespace) -> int:
    reader = CacheReader(options.path, options.verify)
    print("\n".join(describe(reader)))
    checked = {"full": "sizes and sha256", "lazy": "sizes", "size": "sizes"}[options.verify]
    print(f"{len(reader)} rows in {len(reader.manifest.shards)} shards: {checked} are right")
    if options.dataset is None:
        return 0
    teacher, own = (reader.manifest.config.get(x) or {} for x in ("teacher", "tokenizer"))
    name = options.model or teacher["name_or_path"]
    of = {"revision": None if options.model else teacher.get("revision")}
    words = own.get("name_or_path") or name
    tokenizer = AutoTokenizer.from_pretrained(words, **(of if words == name else {}))
    data = load_data(options.dataset, options.split, options.subset)
    collator = default_collator(data, tokenizer, options.hint or ())
    # another dtype would be measured too
    model = ModelTeacher(name, teacher.get("dtype"), **of).model
    found = measure(CachedTeacher(options.path), model, data, collator, options.sample)
    print(f"against {name}, {min(options.sample, len(data))} rows:")
    print("\n".join(f"{key:15s} {value:.4g}" for key, value in found.items()))
    return 0


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be JSON, got {text!r}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


def _add_write(parsers: Any) -> None:
    write = parsers.add_parser("write", help="run a teacher over a data set, keep what it says")
    write.set_defaults(run=_write)
    write.add_argument("model", help="of the hub, or a folder")
    write.add_argument("dataset", help="of the hub, a folder, or a .jsonl file")
    write.add_argument("path", help="the cache's folder")
    write.add_argument("--split", default="train")
    write.add_argument("--subset", help="of a data set of the hub")
    write.add_argument("--hint", help="a column or a template; the teacher sees it")
    write.add_argument("--tokenizer", help="if it is not the model's")
    write.add_argument("--revision", help="of the model")
    write.add_argument("--dtype", help="such as bfloat16")
    write.add_argument("--quantization", choices=("8bit", "4bit"))
    write.add_argument("--codec", default="head_samples", choices=CODECS)
    write.add_argument(
        "--codec_settings", type=_json_object, default={}, help="""JSON, such as '{"top_k": 20}'"""
    )
    write.add_argument("--batch_size", type=int, default=8)
    write.add_argument("--shard_rows", type=int)
    write.add_argument("--seed", type=int, default=0)
    write.add_argument("--overwrite", action="store_true", help="delete another cache in PATH")
    write.add_argument("--verify", default="size", choices=VERIFY_WRITTEN)


def make_parser() -> argparse.ArgumentParser:
    """Make the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_distill", description=f"hf_distill {hf_distill.__version__}"
    )
    commands = parser.add_subparsers(dest="command")
    cache = commands.add_parser("cache", help="teacher caches").add_subparsers(required=True)
    _add_write(cache)
    inspect = cache.add_parser("inspect", help="what is in a cache, and whether it is whole")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("path")
    inspect.add_argument("--verify", default="full", choices=VERIFY_READ)
    inspect.add_argument("--dataset", help="the cached data: measure the cache against its teacher")
    inspect.add_argument("--model", help="the teacher, if it is not where it was")
    inspect.add_argument("--sample", type=int, default=16, help="rows that are measured")
    inspect.add_argument("--split", default="train")
    inspect.add_argument("--subset", help="of a data set of the hub")
    inspect.add_argument("--hint", help="as at the writing")
    add_import(cache)
    add_export(cache)
    add_plan(commands)
    add_forecast(commands)
    add_heat_map(commands)
    add_serve(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return options.run(options)
    except CacheError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
