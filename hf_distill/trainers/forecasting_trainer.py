"""ForecastingTrainer: a DistillTrainer that can say beforehand what self-distillation will give."""

import logging
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_distill.data import sides
from hf_distill.data.hint_collator import HintCollator
from hf_distill.data.span_collator import find_span_collator
from hf_distill.losses import Tokens
from hf_distill.losses.chunks import log_probs
from hf_distill.models.modes import evaluating
from hf_distill.models.signals import Signal
from hf_distill.monitoring.forecast import Forecast
from hf_distill.rollouts.environments import Environment
from hf_distill.rollouts.rollout import Rollouts
from hf_distill.trainers.distill_trainer import DistillTrainer
from hf_distill.trainers.forecasting import Forecaster, Said, Score, timed
from hf_distill.trainers.opsd_config import OPSDConfig

logger = logging.getLogger(__name__)


class ForecastingTrainer(DistillTrainer):
    """Measures forecasts, for `OPSDTrainer`, which has what they are made of."""

    args: OPSDConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    hint_collator: HintCollator
    environment: Environment | None
    rollouts: Rollouts | None

    def forecast(
        self, rows: Any = None, num_rows: int = 32, score: Score | None = None
    ) -> Forecast:
        """Say whether this training will help, from what is measured on some rows now.

        Each row is sampled twice with the student's weights, without and with the hint; both sides
        score the student's own completion, with another row's hint too. All processes must call it.

        Args:
            rows: of the data; by default the first of the evaluation set, or of the training set.
            num_rows: how many of them, at least 1.
            score: judges a completion: a function of the row and the text that returns a number,
                such as 1.0 for a right answer. Without it the environment's "score" does; without
                an environment the data's completions are scored by their likelihood.

        Raises:
            ValueError: completions are not sampled, parameters lie in pieces, there are no rows, or
                the teacher has another tokenizer.
        """
        if self.rollouts is None:
            raise ValueError("a forecast samples completions and needs on_policy=True, got False")
        if self._run.sharded:
            raise ValueError(
                "a forecast reads the model whole, and its parameters lie in pieces: measure it on "
                "one device (python -m hf_distill forecast)"
            )
        if find_span_collator(self.hint_collator) is not None:
            raise ValueError(
                "a forecast compares both sides token by token and needs one tokenizer, got a "
                "SpanCollator"
            )
        given = rows if rows is not None else self.eval_dataset or self.train_dataset
        given = next(iter(given.values()), None) if isinstance(given, dict) else given
        chosen = list(islice(cast(Any, given) or (), num_rows))
        if not chosen:
            raise ValueError(f"a forecast needs at least one row, got num_rows {num_rows}")
        collator = self._hinting.at(self.hint_collator, self.state.global_step, training=False)
        forecaster = Forecaster(
            self._run,
            collator,
            self.rollouts.engine,
            self.environment,
            self._said_of,
            self._run.teacher.route,
            score,
            self.args.per_device_eval_batch_size,
        )
        return forecaster.measure(chosen)

    def _log_forecast(self) -> None:
        found = self.forecast(num_rows=self.args.forecast_rows)
        if self.is_world_process_zero():
            logger.info("forecast at step %d:\n%s", self.state.global_step, found.sentence)
        will_log = self.control.should_log
        self.log(found.metrics())
        self.control.should_log = will_log  # a log of its own must not take the step's place

    def _said_of(self, inputs: dict[str, Any], seconds: dict[str, float]) -> Said:
        """Return what both sides say of a batch's scored tokens, on the CPU."""
        model = cast(nn.Module, self.model)
        batch = self.task.read(self._prepare_inputs(dict(inputs)), None, 1)
        targets = sides.targets(batch.inputs["labels"], batch.student.predicts)
        with evaluating(model), torch.no_grad(), self.accelerator.autocast():
            with timed(seconds, "teacher"):
                teacher = self._signal(model, batch)
                of_teacher = log_probs(teacher, targets).cpu()
            with timed(seconds, "student"):
                tokens = Tokens(targets, torch.ones_like(targets, dtype=torch.float32))

                def read(student: Signal) -> tuple[Tensor, Tensor]:
                    terms = self.loss(student, teacher, tokens)
                    return terms.metrics["soft"], log_probs(student, targets)

                signal, of_student = self._reader.run(model, batch.student, read)
        return Said(signal.float().cpu(), of_student.cpu(), of_teacher)
