"""The command `forecast`: whether self-distillation will help, before it is started."""

import argparse
import json
import logging
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill.cache import load_data
from hf_distill.data.hint_collator import HintCollator
from hf_distill.data.hints import Row
from hf_distill.data.token_classes import token_texts
from hf_distill.monitoring.forecast import Forecast
from hf_distill.monitoring.forecast_plot import NUM_SHOWN, plot_rollouts
from hf_distill.trainers.opsd_config import OPSDConfig
from hf_distill.trainers.opsd_trainer import OPSDTrainer

logger = logging.getLogger(__name__)

NUMERAL = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def add_forecast(parsers: Any) -> None:
    """Add the command to those of a command line."""
    forecast = parsers.add_parser("forecast", help="whether self-distillation will help")
    forecast.set_defaults(run=run)
    forecast.add_argument("model", help="of the hub, or a folder")
    forecast.add_argument("dataset", help="of the hub, a folder, or a .jsonl file")
    forecast.add_argument("--split", default="train")
    forecast.add_argument("--subset", help="of a data set of the hub")
    forecast.add_argument("--hint", help="a column or a template; the column hint, if left out")
    forecast.add_argument("--prompt_column", default="prompt")
    forecast.add_argument(
        "--answer_column",
        help="score a completion by whether its last number is this column's; without it the "
        "data's completions are scored by their likelihood",
    )
    forecast.add_argument("--num_rows", type=int, default=32, help="%(default)s, if left out")
    forecast.add_argument("--batch_size", type=int, default=8, help="%(default)s, if left out")
    forecast.add_argument("--max_completion_length", type=int, default=256)
    forecast.add_argument("--temperature", type=float, default=1.0, help="of the sampling")
    forecast.add_argument("--divergence", default="jsd", help="%(default)s, if left out")
    forecast.add_argument("--dtype", default="auto", help="such as bfloat16")
    forecast.add_argument("--seed", type=int, default=0)
    forecast.add_argument("--json", metavar="FILE", help="write all numbers")
    forecast.add_argument("--png", metavar="FILE", help=f"draw {NUM_SHOWN} rollouts")


def last_number(text: str) -> str | None:
    """Return the last number of a text without commas and trailing zeros, or None."""
    found = NUMERAL.findall(text)
    if not found:
        return None
    value = found[-1].replace(",", "")
    return value.rstrip("0").rstrip(".") if "." in value else value


def number_score(column: str) -> Callable[[Row, str], float]:
    """Return a function that says whether a text's last number is that of a row's column.

    Its errors are ValueErrors: the row has no such column, or it has no number.
    """

    def score(row: Row, text: str) -> float:
        if row.get(column) is None:
            raise ValueError(f"a row must have the column {column!r}, got {sorted(row)}")
        wanted = last_number(str(row[column]))
        if wanted is None:
            raise ValueError(f"the column {column!r} must have a number, got {row[column]!r}")
        return float(last_number(text) == wanted)

    return score


def run(options: argparse.Namespace) -> int:
    """Print a forecast; returns the exit status."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    data = load_data(options.dataset, options.split, options.subset)
    collator = HintCollator(tokenizer, options.hint, prompt_column=options.prompt_column)
    with tempfile.TemporaryDirectory() as folder:
        args = OPSDConfig(
            output_dir=folder,
            report_to="none",
            seed=options.seed,
            divergence=options.divergence,
            max_completion_length=options.max_completion_length,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            rollout={"temperature": options.temperature},
        )
        trainer = OPSDTrainer(model, args, collator, data, processing_class=tokenizer)
        score = None if options.answer_column is None else number_score(options.answer_column)
        found = trainer.forecast(num_rows=options.num_rows, score=score)
    print("\n".join(found.table()))
    _write(found, options, tokenizer)
    return 0


def _write(found: Forecast, options: argparse.Namespace, tokenizer: Any) -> None:
    if options.json is not None:
        Path(options.json).write_text(json.dumps(found.to_dict(), indent=1), encoding="utf-8")
    if options.png is not None:
        shown = [row for row in found.rollouts if row.ids][:NUM_SHOWN]
        texts = [token_texts(tokenizer, [[i] for i in row.ids]) for row in shown]
        plot_rollouts(texts, [row.signal for row in shown], options.png)
