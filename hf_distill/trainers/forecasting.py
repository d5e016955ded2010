"""Measures what a forecast needs: completions without and with the hint, what both sides say."""

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from hf_distill import rollouts
from hf_distill.data import sides
from hf_distill.data.batches import unpad
from hf_distill.data.episodes import Episode
from hf_distill.data.hint_collator import HintCollator
from hf_distill.data.hints import Hint, Row
from hf_distill.data.token_classes import token_classes
from hf_distill.models.structure import unwrap, vocab_size
from hf_distill.monitoring.forecast import Forecast, ForecastRow, make_forecast
from hf_distill.rollouts.environments import Environment, play
from hf_distill.run import Run

logger = logging.getLogger(__name__)

OTHER = "hf_distill_other_row"  # the column with another row, for its hint
SEED = 7_777_777

Score = Callable[[Row, str], float]


class Said(NamedTuple):
    """Holds what both sides say of N scored tokens: the soft loss, and log-probabilities."""

    signal: Tensor
    student: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class Forecaster:
    """Measures rows.

    Attributes:
        run: of the trainer.
        collator: of prompts and episodes, as it is at the present step.
        engine: samples.
        environment: judges completions by "score", or None.
        read: what both sides say of a batch, and seconds of student and teacher.
        route: the number of a row's teacher, or None where there is one teacher.
        score: judges a completion, or None; takes the environment's place.
        batch_size: rows that are measured together.
    """

    run: Run
    collator: HintCollator
    engine: rollouts.Engine
    environment: Environment | None
    read: Callable[[dict[str, Any], dict[str, float]], Said]
    route: Callable[[Row], int] | None
    score: Score | None
    batch_size: int

    def measure(self, rows: Sequence[Row]) -> Forecast:
        """Return the forecast of some rows. Every process must call it with the same rows."""
        args, accelerator = self.run.args, self.run.accelerator
        here = list(rows)[accelerator.process_index :: accelerator.num_processes]
        count, most = len(here), -(-len(rows) // accelerator.num_processes)
        here += list(rows[:1]) * (most - count)  # an engine may need all processes to sample
        seconds: dict[str, float] = {}
        found: list[ForecastRow] = []
        with tqdm(desc="forecast", total=len(here), disable=not accelerator.is_main_process) as bar:
            for start in range(0, len(here), self.batch_size):
                batch = here[start : start + self.batch_size]
                following = here[(start + len(batch)) % len(here)]
                found += self._measured(batch, start, following, seconds)
                bar.update(len(batch))
        seconds = {k: v * len(rows) / len(found) for k, v in seconds.items()}
        every = cast("list[ForecastRow]", gather_object(found[:count]))
        classes = token_classes(self.collator.tokenizer, vocab_size(self.run.language_model))
        step_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return make_forecast(every, classes.tolist(), seconds, step_rows)

    def _measured(
        self, rows: Sequence[Row], start: int, following: Row, seconds: dict[str, float]
    ) -> list[ForecastRow]:
        contexts = unpad(*self._prompts(rows))
        with timed(seconds, "sample"):
            unaided = self._played(rows, contexts, start)
        batch, hints = self.collator.from_episodes(unaided)
        said = self._said(batch, rows, seconds)
        hinted = self._played(rows, _teacher_contexts(batch, contexts), start)
        wrong = self._wrong(unaided, hints, following)
        references = self._references(rows)
        made = []
        for i, episode in enumerate(unaided):
            before, after = episode, hinted[i]
            scores = self._score(before), self._score(after)
            signal, ratio = said[i]
            made.append(
                ForecastRow(
                    has_hint=bool(hints[i]) or self.collator.has_own_view,
                    scores=None if None in scores else cast("tuple[float, float]", scores),
                    reference=references[i],
                    lengths=(len(before.completions[0]), len(after.completions[0])),
                    ids=_scored_ids(batch, i),
                    signal=signal,
                    ratio=ratio,
                    wrong_ratio=wrong[i],
                )
            )
        return made

    def _prompts(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        found = self.collator.prompts(rows)
        return found["prompt_ids"], found["prompt_mask"]

    def _played(
        self, rows: Sequence[Row], contexts: Sequence[list[int]], start: int
    ) -> list[Episode]:
        """Sample one reply to each context, with the same draws for both; let it be judged."""
        model, column = self.run.student, self.collator.prompt_column
        episodes = [
            Episode(row, row[column], i, context=list(ids))
            for i, (row, ids) in enumerate(zip(rows, contexts, strict=True))
        ]
        seed = SEED + 1_000 * self.run.args.seed + start

        more = self.collator.sampling_inputs([episode.prompt for episode in episodes])

        def sample(prompts: Sequence[Sequence[int]], _: int) -> list[list[int]]:
            return self.engine.sample(model, prompts, seed, **more)

        end_ids = rollouts.end_token_ids(unwrap(model), self.collator.ends.ids)
        judge = self.environment if self.score is None else None
        play(episodes, sample, self.collator, judge, 1, end_ids)
        return episodes

    def _score(self, episode: Episode) -> float | None:
        if self.score is not None:
            return float(self.score(episode.row, episode.texts[0]))
        found = episode.columns.get("score")
        return None if found is None else float(found)

    def _said(
        self, batch: dict[str, Any], rows: Sequence[Row], seconds: dict[str, float]
    ) -> list[tuple[list[float], list[float]]]:
        """Return of each row of a batch the signal and the log-ratio of its tokens."""
        said = self.read(self._routed(batch, rows), seconds)
        ratio = (said.teacher - said.student).tolist()
        signal = said.signal.tolist()
        counts = (batch["labels"][:, 1:] != sides.IGNORE_INDEX).sum(1).tolist()
        made, at = [], 0
        for count in counts:
            made.append((signal[at : at + count], ratio[at : at + count]))
            at += count
        return made

    def _routed(self, batch: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
        if self.route is None:
            return batch
        return {**batch, sides.TEACHER_ROUTE: torch.tensor([self.route(row) for row in rows])}

    def _wrong(
        self, episodes: Sequence[Episode], hints: Sequence[Sequence[str]], following: Row
    ) -> list[list[float] | None]:
        """Return the log-ratios with the hint of the next row, where it is another one.

        The row behind the last is `following`, whose hint reads the last one's own attempt.
        """
        others = [x.seen() for x in episodes[1:]] + [{**episodes[-1].seen(), **following}]
        collator = copy.copy(self.collator)
        collator.hints = tuple(replace(x, text=_others(x)) for x in self.collator.hints)
        changed = [
            replace(episode, row={**episode.row, OTHER: other})
            for episode, other in zip(episodes, others, strict=True)
        ]
        batch, told = collator.from_episodes(changed)
        known = [list(x) != list(y) for x, y in zip(told, hints, strict=True)]
        if not any(known):
            return [None] * len(episodes)
        ratios = [ratio for _, ratio in self._said(batch, [x.row for x in episodes], {})]
        return [ratio if use else None for ratio, use in zip(ratios, known, strict=True)]

    def _references(self, rows: Sequence[Row]) -> list[tuple[float, float] | None]:
        """Return mean log-probabilities of a token of the data's completions, for both sides."""
        column = self.collator.completion_column
        judged = self.score is not None or self.environment is not None
        if judged or any(row.get(column) is None for row in rows):
            return [None] * len(rows)
        batch = self.collator(rows)
        said = self.read(self._routed(batch, rows), {})
        made, at = [], 0
        for count in (batch["labels"][:, 1:] != sides.IGNORE_INDEX).sum(1).tolist():
            of_row = slice(at, at + count)
            pair = float(said.student[of_row].mean()), float(said.teacher[of_row].mean())
            made.append(pair if count else None)
            at += count
        return made


def _others(hint: Hint) -> Callable[[Row], str | None]:
    return lambda row: hint.render(row[OTHER])


def _scored_ids(batch: Mapping[str, Tensor], row: int) -> list[int]:
    labels = batch["labels"][row, 1:]
    return labels[labels != sides.IGNORE_INDEX].tolist()


def _teacher_contexts(
    batch: Mapping[str, Tensor], contexts: Sequence[list[int]]
) -> list[list[int]]:
    """Return what the teacher reads before the first scored token.

    That is the student's context in a row of which nothing is scored, or without hints at all.
    """
    ids, index = batch.get("teacher_input_ids"), batch.get("teacher_completion_index")
    if ids is None or index is None:
        return [list(x) for x in contexts]
    rows = unpad(ids, batch["teacher_attention_mask"])
    made = []
    for row, at, own in zip(rows, index.tolist(), contexts, strict=True):
        known = [x for x in at if x >= 0]
        made.append(row[: min(known)] if known else list(own))
    return made


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of the block."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


class ForecastCallback(TrainerCallback):
    """Logs a forecast before the first step, and every so many steps.

    Args:
        log: measures one and logs it.
        steps: between two, or None.
    """

    def __init__(self, log: Callable[[], None], steps: int | None) -> None:
        self._log, self._steps = log, steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure, unless the run goes on from a checkpoint."""
        if state.global_step == 0:
            self._log()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure behind every `steps`-th step."""
        if self._steps is not None and state.global_step % self._steps == 0:
            self._log()
