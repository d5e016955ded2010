"""What samples for a trainer, and the table of what was sampled, from its config."""

from typing import Any, cast

from hf_distill import rollouts
from hf_distill.episodes import Environment
from hf_distill.tables import CompletionTable
from hf_distill.trainers.configs import OPSDConfig
from hf_distill.trainers.groups import RolloutConfig


def make_engine(trainer: Any, environment: Environment | None) -> rollouts.Engine:
    """The engine of an `OPSDTrainer` that samples.

    Raises:
        ValueError: processes would have to sample together, but an environment lets each play
            another number of rounds.
        ImportError: the engine's library is not installed.
    """
    args: OPSDConfig = trainer.args
    rollout, collator = cast(RolloutConfig, args.rollout), trainer.hint_collator
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    together = rollout.engine == "vllm" or sharded
    rounds = 1 if environment is None else rollout.max_turns
    if together and rounds > 1 and trainer.accelerator.num_processes > 1:
        raise ValueError(
            "engine 'vllm' and sharded parameters need the same rounds on all "
            f"{trainer.accelerator.num_processes} processes: set rollout.max_turns=1, got {rounds}"
        )
    sampling = rollouts.Sampling(
        collator.pad_token_id,
        collator.eos_token_id,
        args.max_completion_length,
        rollout.temperature,
        rollout.generation_kwargs,
    )
    return rollouts.make_engine(
        rollout.engine,
        sampling,
        batch_size=rollout.batch_size,
        engine_kwargs=rollout.engine_kwargs,
        model=trainer.model,
        accelerator=trainer.accelerator,
        processing_class=collator.tokenizer,
    )


def make_table(trainer: Any) -> CompletionTable | None:
    """The table of an `OPSDTrainer`, or None if `log_completions` is 0."""
    args: OPSDConfig = trainer.args
    if not args.log_completions:
        return None
    return CompletionTable(
        cast(str, args.output_dir),
        cast(list[str], args.report_to),
        trainer.hint_collator.tokenizer,
        args.log_completions,
        trainer.accelerator,
    )
