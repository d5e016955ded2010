"""Names and options of engines: what is refused, and with which words."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from hf_distill import HintCollator, OPSDConfig
from hf_distill.rollouts import (
    ENGINES,
    GenerateEngine,
    Sampling,
    TellEngine,
    check_engine,
    make_engine,
    rollout,
)
from hf_distill.rollouts.continuous_batching import ContinuousEngine
from hf_distill.run import Run
from tests.hf_distill.trainers import models

SAMPLING = Sampling(models.PAD, models.EOS, 8, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "sglang"}, "rollout engine must be one of .*'vllm'.*, got 'sglang'"),
        ({"batch_size": 0}, "rollout batch_size must be at least 1, got 0"),
        (
            {"engine": "continuous", "batch_size": 4},
            "batch_size is for engine 'generate'; 'continuous' batches by itself, got 4",
        ),
        (
            {"engine": "vllm", "batch_size": 4},
            "batch_size is for engine 'generate'; 'vllm' batches by itself, got 4",
        ),
        (
            {"engine_kwargs": {"num_blocks": 4}},
            "engine_kwargs of engine 'generate' has no field 'num_blocks'; it has none",
        ),
        (
            {"engine": "continuous", "engine_kwargs": {"num_block": 4}},
            "engine_kwargs of engine 'continuous' has no field 'num_block'; it has page_size",
        ),
        (
            {"engine": "continuous", "engine_kwargs": {"seed": 4}},
            "engine 'continuous' has no field 'seed'",
        ),
        (
            {"engine": "vllm", "engine_kwargs": {"modus": "server"}},
            "engine_kwargs of engine 'vllm' has no field 'modus'; it has mode, ",
        ),
        (
            {"engine": "vllm", "engine_kwargs": {"temperature": 1.0}},
            "engine_kwargs of engine 'vllm' has no field 'temperature'",
        ),
        ({"generation_kwargs": {"top_pp": 0.9}}, "GenerationConfig has no field 'top_pp'"),
        (
            {"generation_kwargs": {"temperature": 0.9}},
            "generation_kwargs must not set 'temperature': rollout.temperature does",
        ),
        (
            {"generation_kwargs": {"num_return_sequences": 2}},
            "must not set 'num_return_sequences': rollout.num_completions does",
        ),
        (
            {"engine": "vllm", "generation_kwargs": {"max_tokens": 2}},
            "must not set 'max_tokens': max_completion_length does",
        ),
        (
            {"engine": "continuous", "generation_kwargs": {"min_p": 0.1}},
            "sampling by engine 'continuous' has no field 'min_p'; it has top_k, top_p",
        ),
    ],
)
def test_what_a_config_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPSDConfig(output_dir="out", report_to="none", rollout=settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 1, "generation_kwargs": {"top_p": 0.9, "min_p": 0.1}},
        {"engine": "continuous", "engine_kwargs": {"num_blocks": 4, "page_size": 16}},
        {"engine": "continuous", "generation_kwargs": {"top_p": 0.9, "top_k": 3}},
        {"engine": "vllm", "engine_kwargs": {"mode": "server", "server_port": 1}},
        {"engine": "vllm", "generation_kwargs": {"frequency_penalty": 0.5}},
    ],
)
def test_what_a_config_takes(settings: dict[str, Any]) -> None:
    made = OPSDConfig(output_dir="out", report_to="none", rollout=settings).rollout
    for name, value in settings.items():
        assert getattr(made, name) == value


def test_engines_by_name() -> None:
    engine = make_engine("generate", SAMPLING, batch_size=3)
    assert isinstance(engine, GenerateEngine)
    assert (engine.sampling, engine.batch_size) == (SAMPLING, 3)
    engine = make_engine("continuous", SAMPLING, engine_kwargs={"num_blocks": 9})
    assert isinstance(engine, ContinuousEngine)
    assert engine.engine_kwargs == {"num_blocks": 9}
    assert ENGINES == ("generate", "continuous", "vllm")


def test_making_one_checks_its_options_too() -> None:
    with pytest.raises(ValueError, match="must be one of"):
        make_engine("beam", SAMPLING)
    with pytest.raises(ValueError, match="has no field 'x'"):
        make_engine("generate", Sampling(0, 2, 8, 1.0, {"x": 1}))
    with pytest.raises(ValueError, match="'vllm' needs the model and the accelerator, got None"):
        make_engine("vllm", SAMPLING)


@pytest.mark.parametrize("event", ["on_train_begin", "on_step_end", "on_train_end"])
def test_an_engine_hears_of_steps_checkpoints_and_the_best_model(event: str) -> None:
    """A checkpoint is loaded before training begins, the best model before it ends."""
    heard: list[str] = []
    engine: Any = SimpleNamespace(weights_changed=lambda: heard.append(event))
    args = TrainingArguments("out", report_to="none", use_cpu=True)
    handler = CallbackHandler([TellEngine(engine)], None, None, None, None)
    handler.call_event(event, args, TrainerState(), TrainerControl())
    assert heard == [event]


def test_defaults_pass() -> None:
    check_engine("generate", {}, {}, None)


@pytest.mark.parametrize(
    ("engine", "sharded", "processes", "turns", "refused"),
    [
        ("generate", True, 2, 8, False),
        ("generate", True, 2, 1, False),
        ("generate", True, 1, 8, False),
        ("generate", False, 2, 8, False),
        ("vllm", False, 2, 8, True),
    ],
)
def test_rounds_that_processes_must_play_together(
    engine: str, sharded: bool, processes: int, turns: int, refused: bool
) -> None:
    args = OPSDConfig(
        output_dir="out", report_to="none", rollout={"engine": engine, "max_turns": turns}
    )
    accelerator: Any = SimpleNamespace(num_processes=processes)
    collator = HintCollator(models.tokenizer())
    run = Run(args, models.llama(), None, None, collator, accelerator, sharded, losses=())
    if engine == "generate":
        assert isinstance(rollout.make_engine(run, collator, None), GenerateEngine)
    if not refused:
        assert isinstance(rollout.make_engine(run, collator, lambda _: []), GenerateEngine)
        return
    with pytest.raises(ValueError, match=r"on all 2 processes: set rollout.max_turns=1, got 8"):
        rollout.make_engine(run, collator, lambda _: [])
