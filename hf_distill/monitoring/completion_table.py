"""What was sampled, for people: some rows on the screen, tables in trackers, all in a file."""

import importlib
import json
import logging
import math
import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import TrainerCallback
from trl.trainer.utils import print_prompt_completions_sample

logger = logging.getLogger(__name__)

COMPLETIONS_FILE = "completions.jsonl"
TRACKERS = ("wandb", "trackio")
COLUMNS = ("step", "prompt", "hints", "completion")
Row = dict[str, Any]


class CompletionTable:
    """Collects rows of prompt, hints and completion between two logs.

    Special tokens stay visible in all texts.

    Args:
        output_dir: where `completions.jsonl` is written, one JSON object a row.
        report_to: names of trackers; those of "wandb" and "trackio" get a table of all rows.
        tokenizer: of the ids.
        num_shown: rows on the screen of the main process at every log, >= 1.
        accelerator: the trainer's.

    Raises:
        ValueError: num_shown is out of range.
    """

    def __init__(
        self,
        output_dir: str,
        report_to: Sequence[str],
        tokenizer: Any,
        num_shown: int,
        accelerator: Accelerator,
    ) -> None:
        if num_shown < 1:
            raise ValueError(f"num_shown must be at least 1, got {num_shown}")
        self.path = os.path.join(output_dir, COMPLETIONS_FILE)
        self.trackers = [name for name in TRACKERS if name in report_to]
        self.tokenizer, self.num_shown, self.accelerator = tokenizer, num_shown, accelerator
        self._rows: list[Row] = []  # of this process, not yet in the file
        self._unseen: list[Row] = []  # of all, in the file, not yet shown; on the main process

    def add(
        self,
        step: int,
        prompts_ids: Sequence[Sequence[int]],
        hints: Sequence[Sequence[str]],
        completions_ids: Sequence[Sequence[int]],
        extra: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Collect the rows of one rollout of this process.

        Args:
            step: optimizer steps taken before it.
            prompts_ids: B lists of token ids.
            hints: B lists of texts.
            completions_ids: B lists of token ids.
            extra: further columns, B values each that JSON can hold.

        Raises:
            ValueError: the numbers of rows differ, or an extra column has the name of another.
        """
        columns = {"prompt": prompts_ids, "hints": hints, "completion": completions_ids}
        for name in extra or {}:
            if name in COLUMNS:
                raise ValueError(f"an extra column must not be one of {COLUMNS}, got {name!r}")
        columns |= dict(extra or {})
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"all columns must have as many rows, got {lengths}")
        columns["prompt"] = [self._text(ids) for ids in prompts_ids]
        columns["hints"] = [list(texts) for texts in hints]
        columns["completion"] = [self._text(ids) for ids in completions_ids]
        for values in zip(*columns.values(), strict=True):
            self._rows.append({"step": step, **dict(zip(columns, values, strict=True))})

    def add_values(
        self,
        step: int,
        ids: Sequence[Sequence[int]],
        values: Mapping[str, Sequence[Sequence[float]]],
    ) -> None:
        """Collect what was measured of the scored tokens of some rows, for the file alone.

        Args:
            step: optimizer steps taken before it.
            ids: B lists of token ids.
            values: by name, B lists with one number for each of these ids; what is not finite is
                written as null.

        Raises:
            ValueError: the numbers of ids and values differ.
        """
        for name, rows in values.items():
            if list(map(len, rows)) != list(map(len, ids)):
                raise ValueError(
                    f"{name} must have a value for each token, got {list(map(len, rows))} values "
                    f"and {list(map(len, ids))} tokens"
                )
        for i, row in enumerate(ids):
            told = {
                name: [x if math.isfinite(x) else None for x in rows[i]]
                for name, rows in values.items()
            }
            tokens = [self._text([x]) for x in row]
            self._rows.append({"step": step, "tokens": tokens, "values": told})

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def start(self, step: int) -> None:
        """Drop rows of this step and later ones from the file: they will be sampled again.

        A new run starts at step 0 with an empty file. Every process may call it.
        """
        self._rows, self._unseen = [], []
        if not self.accelerator.is_main_process or not os.path.isfile(self.path):
            return
        with open(self.path, encoding="utf-8") as file:
            lines = file.readlines()
        kept = [line for line in lines if _step_of(line) < step]
        if len(kept) < len(lines):
            logger.info("%s: %d rows dropped", self.path, len(lines) - len(kept))
            with open(self.path + ".new", "w", encoding="utf-8") as file:
                file.writelines(kept)
            os.replace(self.path + ".new", self.path)

    def flush(self) -> None:
        """Append what was collected to the file. Every process must call it."""
        rows = gather_object(self._rows)
        self._rows = []
        if not self.accelerator.is_main_process or not rows:
            return
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._unseen += [row for row in rows if "completion" in row]

    def write(self, step: int) -> None:
        """Flush, print a few rows and send all since the last call to the trackers.

        Every process must call it.

        Args:
            step: of the log.
        """
        self.flush()
        rows, self._unseen = self._unseen, []
        if not rows:
            return
        # a generator of its own: nothing else may depend on whether rows are shown
        chosen = sorted(
            random.Random(step).sample(range(len(rows)), min(self.num_shown, len(rows)))
        )
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in names}
        shown = {name: [values[i] for i in chosen] for name, values in columns.items()}
        print_prompt_completions_sample(
            shown.pop("prompt"),
            shown.pop("completion"),
            {},
            None,
            step,
            extra={"hints": _joined(shown.pop("hints")), **_texts(shown)},
        )
        frame = pd.DataFrame(columns | {"hints": _joined(columns["hints"])})
        for name in self.trackers:
            tracker = importlib.import_module(name)
            if name != "wandb" or tracker.run is not None:
                tracker.log({"completions": tracker.Table(dataframe=frame)})


def _joined(hints: Sequence[Sequence[str]]) -> list[str]:
    return ["\n\n".join(texts) for texts in hints]


def _texts(columns: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
    return {name: [str(value) for value in values] for name, values in columns.items()}


def _step_of(line: str) -> float:
    """Return the step of a row; infinite if the line was cut off by a crash."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else float("inf")
    except json.JSONDecodeError:
        return float("inf")


class WriteTable(TrainerCallback):
    """Writes a table with every training log, and its file with every checkpoint.

    Args:
        table: that of the run.
    """

    def __init__(self, table: CompletionTable) -> None:
        self.table = table

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the table at the step of the run."""
        self.table.start(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write the table with a training log, on every process."""
        if "loss" in (logs or {}):
            self.table.write(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Append to the file: a resumed run does not sample these rows again."""
        self.table.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the rows since the last log."""
        self.table.write(state.global_step)
