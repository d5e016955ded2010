"""Sampling from mixtures of experts whose config asks for what routers say."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_distill import HintCollator, OPSDConfig, OPSDTrainer
from hf_distill.rollouts import Sampling, generate
from hf_distill.rollouts.continuous_batching import ContinuousEngine
from tests.hf_distill.trainers import experts, models
from tests.hf_distill.trainers.experts import COEFFICIENT, moe

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
SAMPLING = Sampling(models.PAD, models.EOS, 8, 1.0)


def on_policy(folder: Path, model: Any, **changes: Any) -> OPSDTrainer:
    settings = {"max_steps": 1, "max_completion_length": 8, "per_device_train_batch_size": 2}
    return OPSDTrainer(
        model,
        OPSDConfig(**models.options(folder, **settings | changes)),
        HintCollator(models.tokenizer()),
        models.problems(),
        models.problems(4),
        processing_class=models.tokenizer(),
    )


@pytest.mark.parametrize("kind", experts.CONFIGS)
def test_completions_are_those_of_silent_routers(kind: str) -> None:
    asking = moe(kind)
    found, want = (
        generate(x, PROMPTS, **vars(SAMPLING), seed=3) for x in (asking, moe(kind, 0, False))
    )
    assert found == want
    assert asking.config.output_router_logits is True


def test_so_do_those_of_continuous_batching() -> None:
    asking = moe()
    found, want = (
        ContinuousEngine(SAMPLING, {}).sample(x, PROMPTS, 3) for x in (asking, moe(say=False))
    )
    assert found == want
    assert asking.config.output_router_logits is True


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "olmoe"])
def test_a_step_on_sampled_completions_adds_their_loss(
    tmp_path: Path, kind: str, adapters: bool
) -> None:
    def trained(say: bool) -> tuple[dict[str, float], list[Any]]:
        model = moe(kind, say=say)
        model = models.lora(model, target_modules=["q_proj", "v_proj"]) if adapters else model
        trainer, batches = on_policy(tmp_path, model), []
        play = trainer.rollouts.play

        def noted(*args: Any, **kwargs: Any) -> Any:
            episodes = play(*args, **kwargs)
            batches.extend(x.completions for batch in episodes for x in batch)
            return episodes

        trainer.rollouts.play = noted
        trainer.train()
        return trainer.state.log_history[0] | trainer.evaluate(), batches

    (found, completions), (plain, same) = trained(True), trained(False)
    assert completions[:2] == same[:2]  # sampled before the step
    assert found["aux"] > 0
    assert found["loss"] - plain["loss"] == pytest.approx(COEFFICIENT * found["aux"], rel=1e-4)
    assert found["eval_aux"] > 0
    assert "aux" not in plain


def test_an_error_leaves_the_config_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = moe()

    def fails(*args: Any, **kwargs: Any) -> torch.Tensor:
        assert model.config.output_router_logits is False
        raise RuntimeError("no device")

    monkeypatch.setattr(model, "generate", fails)
    with pytest.raises(RuntimeError, match="no device"):
        generate(model, PROMPTS, **vars(SAMPLING), seed=3)
    assert model.config.output_router_logits is True
