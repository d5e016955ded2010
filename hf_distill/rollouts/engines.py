"""Which engine samples: its name, its options, and how it is made."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol

from accelerate import Accelerator
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig, TrainerCallback

from hf_distill.rollouts import vllm
from hf_distill.rollouts.continuous_batching import ContinuousEngine
from hf_distill.rollouts.generate import GenerateEngine
from hf_distill.rollouts.sampling import Sampling

ENGINES = ("generate", "continuous", "vllm")

# Fields of generation_kwargs that are said elsewhere, in the words of the three engines
SAID_ELSEWHERE = {
    "temperature": "rollout.temperature",
    "do_sample": "rollout.temperature (0 is greedy)",
    "max_new_tokens": "max_completion_length",
    "max_length": "max_completion_length",
    "max_tokens": "max_completion_length",
    "pad_token_id": "the tokenizer",
    "eos_token_id": "the tokenizer and the model's generation config",
    "stop_token_ids": "the tokenizer and the model's generation config",
    "num_return_sequences": "rollout.num_completions",
    "n": "rollout.num_completions",
    "seed": "the trainer's seed",
    "use_cache": "the engine",
    "return_dict_in_generate": "the engine",
}


class Engine(Protocol):
    """Samples completions. One is made for a run."""

    def sample(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        seed: int,
        max_new_tokens: int | None = None,
    ) -> list[list[int]]:
        """Sample completions of the prompts.

        Args:
            model: the student, wrapped or not; it is afterwards as before, and so is torch's
                random state.
            prompts: lists of token ids.
            seed: of the samples.
            max_new_tokens: of this call, if fewer than the run's max_completion_length; the same on
                all processes.

        Returns:
            One list of ids per prompt, with its end token if it has ended, without padding.
        """
        ...

    def weights_changed(self) -> None:
        """Note new weights: after every optimizer step, and when training begins and ends."""


class TellEngine(TrainerCallback):
    """Tells an engine that the weights have changed: by a step, a checkpoint or the best model.

    Args:
        engine: that of the run.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def _tell(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.engine.weights_changed()

    on_train_begin = on_step_end = on_train_end = _tell


def _check_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    unknown = sorted(set(given) - set(known))
    if unknown:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(f"{what} has no field {unknown[0]!r}; {has}")


def _engine_options(engine: str) -> list[str]:
    if engine == "continuous":
        return [x.name for x in fields(ContinuousBatchingConfig) if x.name not in SAID_ELSEWHERE]
    return vllm.engine_options() if engine == "vllm" else []


def check_engine(
    engine: str,
    engine_kwargs: Mapping[str, Any],
    generation_kwargs: Mapping[str, Any],
    batch_size: int | None,
) -> None:
    """Check the names of all options. Values are checked by who uses them.

    Args:
        engine: one of `ENGINES`.
        engine_kwargs: options of the engine.
        generation_kwargs: options of sampling, in the engine's words.
        batch_size: prompts of one call, for "generate".

    Raises:
        ValueError: an option is unknown, is said elsewhere, or is out of range.
    """
    if engine not in ENGINES:
        raise ValueError(f"rollout engine must be one of {ENGINES}, got {engine!r}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"rollout batch_size must be at least 1, got {batch_size}")
    if batch_size is not None and engine != "generate":
        raise ValueError(
            f"rollout batch_size is for engine 'generate'; {engine!r} batches by itself, "
            f"got {batch_size}"
        )
    _check_known(f"engine_kwargs of engine {engine!r}", engine_kwargs, _engine_options(engine))
    for name in generation_kwargs:
        if name in SAID_ELSEWHERE:
            raise ValueError(
                f"generation_kwargs must not set {name!r}: {SAID_ELSEWHERE[name]} does"
            )
    if engine == "generate":
        known = [name for name in vars(GenerationConfig()) if name not in SAID_ELSEWHERE]
        _check_known("GenerationConfig", generation_kwargs, known)
    elif engine == "continuous":
        _check_known("sampling by engine 'continuous'", generation_kwargs, ("top_k", "top_p"))


def check_images(engine: str, rounds: int) -> None:
    """Check what a student that reads images samples with.

    Args:
        engine: of the rollouts.
        rounds: replies of an episode, at most.

    Raises:
        ValueError: it is another engine than "generate", or more than one reply.
    """
    if engine != "generate":
        raise ValueError(
            f"a processor's images are given to rollout engine 'generate' only, got {engine!r}"
        )
    if rounds > 1:
        raise ValueError(
            "with a processor's images an environment judges one reply: set rollout.max_turns=1, "
            f"got {rounds}"
        )


def make_engine(
    engine: str,
    sampling: Sampling,
    *,
    batch_size: int | None = None,
    engine_kwargs: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
    accelerator: Accelerator | None = None,
    processing_class: Any = None,
) -> Engine:
    """Make the engine of a run.

    Args:
        engine: "generate", "continuous" or "vllm".
        sampling: how completions are sampled.
        batch_size: as in `generate`, for that engine.
        engine_kwargs: options of the engine.
        model: the student, for "vllm".
        accelerator: the trainer's, for "vllm".
        processing_class: the tokenizer, for "vllm".

    Raises:
        ValueError: as `check_engine`; or "vllm" without a model and an accelerator.
        ImportError: the engine's library is not installed.
    """
    engine_kwargs = engine_kwargs or {}
    check_engine(engine, engine_kwargs, sampling.generation_kwargs, batch_size)
    if engine == "generate":
        return GenerateEngine(sampling, batch_size)
    if engine == "continuous":
        return ContinuousEngine(sampling, engine_kwargs)
    if model is None or accelerator is None:
        raise ValueError("engine 'vllm' needs the model and the accelerator, got None")
    return vllm.VLLMEngine(sampling, engine_kwargs, model, accelerator, processing_class)
