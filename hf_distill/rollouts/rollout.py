"""Rollouts: the completions that optimizer steps are trained on, and where they come from."""

import logging
import random
from collections.abc import Callable, Sequence
from itertools import count, islice
from typing import Any, NamedTuple, TypeVar, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_distill import rollouts
from hf_distill.data import alignment, sides
from hf_distill.data.batches import unpad
from hf_distill.data.episodes import FAILED_SIBLINGS, Episode
from hf_distill.data.hint_collator import HintCollator
from hf_distill.data.hints import Row
from hf_distill.data.token_weights import KEY
from hf_distill.models.structure import causal_lm, is_sharded, unwrap
from hf_distill.monitoring.completion_table import COLUMNS, CompletionTable
from hf_distill.monitoring.faults import PREFIX_NAME
from hf_distill.monitoring.metrics import CompletionMeter, HintOverlapMeter, ShareMeter
from hf_distill.rollouts.config import RolloutConfig
from hf_distill.rollouts.engines import check_images
from hf_distill.rollouts.environments import Environment, has_failed, play, share_siblings
from hf_distill.run import Run

logger = logging.getLogger(__name__)

T = TypeVar("T")

EVAL_STEP = 10**9  # eval rollouts draw from seeds that no training step uses


class RolloutWindow(NamedTuple):
    """Holds micro-batches, and the episodes they were made of; none if they are the data's.

    The episodes are in the order of the data, the rows of the micro-batches in that of `_order`.
    """

    episodes: list[list[Episode]]
    batches: list[dict[str, Tensor]]


def _order(episodes: list[list[Episode]]) -> list[int]:
    """Return the numbers of a step's episodes, so that micro-batches have rows of like lengths.

    Little of them is then padding. The longest are first: where memory is short, it shows at once.
    A step's loss is a sum over its tokens, whichever micro-batch has them. One micro-batch keeps
    its order.
    """
    flat = [episode for batch in episodes for episode in batch]
    if len(episodes) == 1:
        return list(range(len(flat)))
    lengths = [len(x.context) + sum(map(len, x.completions)) for x in flat]
    return sorted(range(len(flat)), key=lambda i: -lengths[i])


def _dealt(batches: list[list[T]], order: list[int]) -> list[list[T]]:
    """Return as many batches of as many things, in another order."""
    flat = [x for batch in batches for x in batch]
    others = iter(flat[i] for i in order)
    return [list(islice(others, len(batch))) for batch in batches]


class Rollouts:
    """Makes windows of the rows of an optimizer step.

    Args:
        args: an `OPSDConfig`.
        collator: of prompts and episodes.
        environment: judges the attempts, or None.
        engine: samples.
        accelerator: the trainer's.
        route: the number of a row's teacher, or None where there is one teacher.
        table: gets what was sampled in training, or None.
    """

    def __init__(
        self,
        args: Any,
        collator: HintCollator,
        environment: Environment | None,
        engine: rollouts.Engine,
        accelerator: Accelerator,
        route: Callable[[Row], int] | None,
        table: CompletionTable | None,
    ) -> None:
        self.args, self.config = args, cast(RolloutConfig, args.rollout)
        self.collator, self.environment, self.engine = collator, environment, engine
        self.accelerator, self.route, self.table = accelerator, route, table
        self._completions = {training: CompletionMeter() for training in (True, False)}
        self._sampled = ShareMeter("on_policy")
        self._failed = ShareMeter("failed")
        self._overlap = HintOverlapMeter()
        self._prefix: int | None = None  # of the last completions that were cut, since the last log

    def first_step(self, step: int) -> int:
        """Return the step whose completions a step is taken on."""
        return step - step % self.config.steps_per_rollout

    def is_first_step(self, step: int) -> bool:
        """Return whether a step needs new completions."""
        return step == self.first_step(step)

    def is_sampled(self, step: int) -> bool:
        """Return whether a step's completions are sampled; the same on all processes."""
        period = step // self.config.steps_per_rollout
        drawn = random.Random(f"{self.args.seed} {period}").random()
        return drawn < self.config.on_policy_fraction

    def window(
        self,
        model: nn.Module,
        batches: list[dict[str, Any]],
        step: int,
        resumed: list[list[dict[str, Any]]] | None,
        collator: HintCollator,
    ) -> RolloutWindow:
        """Make the window that begins at a step, or that a checkpoint holds the episodes of.

        Args:
            model: the student, wrapped or not.
            batches: of `HintCollator.prompts`.
            step: optimizer steps taken.
            resumed: states of the episodes of each micro-batch of the data.
            collator: of the rows, as it is at the window's first step.
        """
        rows = [batch["rows"] for batch in batches]
        sampled = self.is_sampled(step)
        if self.is_first_step(step):  # else the run before has counted it
            self._sampled.add(torch.tensor([sampled]))
        if not sampled:
            made = [self._routed(collator(x), x) for x in rows]
            return RolloutWindow([], made)
        if resumed is None:
            if not self.is_first_step(step):
                logger.warning(
                    "the checkpoint has no completions of this process, though step %d is not the "
                    "first on them: they are sampled anew, and the run is not the one it was",
                    step,
                )
            episodes = self.play(model, batches, step, training=True)
        else:
            episodes = self._episodes(batches)
            for one, states in zip(episodes, resumed, strict=True):
                for episode, state in zip(one, states, strict=True):
                    vars(episode).update(state)
        order = _order(episodes)
        ordered = _dealt(episodes, order)
        found = [self.batch(model, x, collator) for x in ordered]
        self._weigh_failed(found, ordered)
        if self.args.anchor_weight > 0:
            self._add_anchors(found, _dealt(rows, order))
        if resumed is None:
            self._show(step, found, episodes, order)
        return RolloutWindow(episodes, found)

    def _episodes(
        self, batches: list[dict[str, Any]], size: int | None = None
    ) -> list[list[Episode]]:
        """Make new episodes for the rows of each micro-batch; no two of them share a group."""
        column, size = self.collator.prompt_column, size or self.config.num_completions
        number = count()
        made = []
        for batch in batches:
            contexts = unpad(batch["prompt_ids"], batch["prompt_mask"])
            pairs = zip(batch["rows"], contexts, strict=True)
            made.append(
                [Episode(x, x[column], next(number) // size, context=ids) for x, ids in pairs]
            )
        return made

    def play(
        self, model: nn.Module, batches: list[dict[str, Any]], step: int, training: bool
    ) -> list[list[Episode]]:
        """Play the episodes of each micro-batch, the replies of a round sampled in one call."""
        end_ids = rollouts.end_token_ids(unwrap(model), self.collator.ends.ids)
        # large odd multipliers keep steps and processes of neighbouring seeds apart
        seed = (self.args.seed * 1_000_003 + step) * 65_537 + self.args.process_index

        longest = self._prefix_at(step) if training else None
        limit: dict[str, Any] = {} if longest is None else {"max_new_tokens": longest}
        size = None if training else 1
        episodes = self._episodes(batches, size)
        limit |= self.collator.sampling_inputs([x.prompt for each in episodes for x in each])

        def sample(prompts: Sequence[Sequence[int]], turn: int) -> list[list[int]]:
            completions = self.engine.sample(model, prompts, seed + (turn << 50), **limit)
            self._completions[training].add(completions, end_ids)
            return completions

        play(
            [episode for batch in episodes for episode in batch],
            sample,
            self.collator,
            self.environment,
            self.config.max_turns if self.environment else 1,
            end_ids,
            self._any_process if is_sharded(model) else bool,
        )
        for batch in episodes if training else []:
            share_siblings(batch)
        return episodes

    def _prefix_at(self, step: int) -> int | None:
        """Return to how many tokens a step's completions are cut; None lets them end."""
        found = self.config.prefix_at(self.first_step(step))
        if found is None or found >= self.args.max_completion_length:
            return None
        self._prefix = found
        return found

    def _any_process(self, goes_on: bool) -> bool:
        """Return whether some process goes on; all must ask it."""
        here = torch.tensor(int(goes_on), device=self.accelerator.device)
        return bool(cast(Tensor, self.accelerator.reduce(here, reduction="sum")))

    def batch(
        self, model: nn.Module, episodes: list[Episode], collator: HintCollator
    ) -> dict[str, Any]:
        """Make the student's and the teacher's rows of one micro-batch."""
        batch, hints = collator.from_episodes(episodes)
        alignment.assert_completions(batch, [episode.completions for episode in episodes])
        limit = getattr(getattr(causal_lm(model), "config", None), "max_position_embeddings", None)
        mask = batch.get("teacher_attention_mask", batch["attention_mask"])
        if sides.has_own_tokens(batch):  # its tokens are counted by another model
            mask = batch["attention_mask"]
        others = [x["teacher_attention_mask"].sum(1) for x in sides.contrast_batches(batch)]
        lengths = torch.stack([mask.sum(1), *others]).amax(0).tolist()
        for i, length in enumerate(lengths):
            if limit is not None and length > limit:
                written = sum(map(len, episodes[i].completions))
                raise ValueError(
                    f"row {i} of the batch: the teacher's row has {length} tokens (context "
                    f"{length - written}, completion {written}), the model takes {limit}"
                )
        for episode, texts in zip(episodes, hints, strict=True):
            episode.hints = list(texts)
        return self._routed(batch, [episode.row for episode in episodes])

    def _weigh_failed(self, batches: list[dict[str, Any]], episodes: list[list[Episode]]) -> None:
        """Add weights of tokens, 0 in rows of completions that have succeeded, where wanted."""
        for batch, made in zip(batches, episodes, strict=True) if self.config.only_failed else ():
            failed = torch.tensor([has_failed(episode) for episode in made])
            self._failed.add(failed)
            batch[KEY] = failed.float()[:, None].expand(batch["labels"].shape).contiguous()

    def _show(
        self,
        step: int,
        batches: list[dict[str, Any]],
        episodes: list[list[Episode]],
        order: list[int],
    ) -> None:
        """Measure and tabulate what was sampled."""
        self._compare_with_hints(episodes)
        if self.table is not None:
            self._tabulate(self.table, step, batches, episodes, order)

    def _routed(self, batch: dict[str, Tensor], rows: Sequence[Row]) -> dict[str, Tensor]:
        if self.route is not None:
            batch[sides.TEACHER_ROUTE] = torch.tensor([self.route(row) for row in rows])
        return batch

    def _add_anchors(self, batches: list[dict[str, Any]], rows: list[list[Row]]) -> None:
        """Add rows of the data's own completions, and how many tokens the step has of them."""
        references = [self.collator.references(x) for x in rows]
        tokens = sum(int((x["labels"] != sides.IGNORE_INDEX).sum()) for x in references)
        own = torch.tensor(tokens, device=self.accelerator.device)
        total = cast(Tensor, self.accelerator.reduce(own, reduction="sum"))
        for batch, reference in zip(batches, references, strict=True):
            batch |= {f"{sides.ANCHOR_PREFIX}{name}": x for name, x in reference.items()}
            batch[f"{sides.ANCHOR_PREFIX}count"] = total

    def _compare_with_hints(self, episodes: list[list[Episode]]) -> None:
        tokenizer = self.collator.tokenizer
        for episode in (episode for batch in episodes for episode in batch):
            encoded = tokenizer("\n".join(episode.hints), add_special_tokens=False)
            self._overlap.add(
                [[token for reply in episode.completions for token in reply]],
                [episode.context],
                [cast(list[int], encoded["input_ids"])],
            )

    def _tabulate(
        self,
        table: CompletionTable,
        step: int,
        batches: list[dict[str, Any]],
        episodes: list[list[Episode]],
        order: list[int],
    ) -> None:
        """Add the rows to the table, in the order of the data."""
        flat = [episode for batch in episodes for episode in batch]
        made = [
            row for batch in batches for row in unpad(batch["input_ids"], batch["attention_mask"])
        ]
        ids = [row for _, row in sorted(zip(order, made, strict=True))]
        starts = [len(episode.context) for episode in flat]
        names = list(dict.fromkeys(name for episode in flat for name in episode.columns))
        names = [name for name in names if name != FAILED_SIBLINGS]  # each has a row of its own
        table.add(
            step,
            [row[:start] for row, start in zip(ids, starts, strict=True)],
            [episode.hints for episode in flat],
            [row[start:] for row, start in zip(ids, starts, strict=True)],
            {
                f"environment {name}" if name in COLUMNS else name: [
                    _plain(episode.columns.get(name)) for episode in flat
                ]
                for name in names
            },
        )

    def read(self, training: bool) -> dict[str, float]:
        """Return metrics since the last reading. Every process must call it."""
        metrics = self._completions[training].read(self.accelerator)
        if training:
            metrics |= self._overlap.read(self.accelerator)
        if training and self.config.only_failed:
            metrics |= self._failed.read(self.accelerator)
        if training and self._prefix is not None:
            metrics[PREFIX_NAME], self._prefix = self._prefix, None
        if training and self.config.on_policy_fraction < 1.0:
            metrics |= self._sampled.read(self.accelerator)
        return metrics


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold."""
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def make_engine(
    run: Run, collator: HintCollator, environment: Environment | None
) -> rollouts.Engine:
    """Make the engine that samples completions.

    Args:
        run: with an `OPSDConfig`.
        collator: of the prompts.
        environment: judges the attempts, or None.

    Raises:
        ValueError: processes would have to sample together with vLLM, but an environment lets each
            play another number of rounds; or a processor's images, with another engine than
            "generate" or several rounds.
        ImportError: the engine's library is not installed.
    """
    config = cast(RolloutConfig, run.args.rollout)
    rounds = 1 if environment is None else config.max_turns
    if config.engine == "vllm" and rounds > 1 and run.accelerator.num_processes > 1:
        raise ValueError(
            "engine 'vllm' needs the same rounds on all "
            f"{run.accelerator.num_processes} processes: set rollout.max_turns=1, got {rounds}"
        )
    generation_kwargs = dict(config.generation_kwargs)
    if collator.processor is not None:
        check_images(config.engine, rounds)
        # a sampled placeholder would stand for an image that is not there
        generation_kwargs.setdefault("suppress_tokens", collator.processor.placeholder_ids)
    sampling = rollouts.Sampling(
        collator.pad_token_id,
        collator.ends.ids,
        run.args.max_completion_length,
        config.temperature,
        generation_kwargs,
    )
    return rollouts.make_engine(
        config.engine,
        sampling,
        batch_size=config.batch_size,
        engine_kwargs=config.engine_kwargs,
        model=run.student,
        accelerator=run.accelerator,
        processing_class=collator.tokenizer,
    )


def make_table(run: Run, collator: HintCollator) -> CompletionTable | None:
    """Make the table of what is sampled, or None if `log_completions` is 0."""
    args = run.args
    if not args.log_completions:
        return None
    return CompletionTable(
        args.output_dir,
        args.report_to,
        collator.tokenizer,
        args.log_completions,
        run.accelerator,
    )
