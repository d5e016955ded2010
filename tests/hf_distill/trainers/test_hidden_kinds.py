"""The hidden loss of models with other blocks, with attention dropout, and under checkpointing."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from hf_distill import DistillConfig, DistillTrainer
from tests.hf_distill.models import stacks
from tests.hf_distill.trainers import models


def make(folder: Path, student: nn.Module, teacher: nn.Module, **changes: Any) -> DistillTrainer:
    settings = {"hidden_layers": "uniform", "hidden_weight": 1.0, "max_steps": 2} | changes
    config = DistillConfig(**models.options(folder, **settings))
    return DistillTrainer(student, config, models.Pad(), models.rows(), teacher=teacher)


@pytest.mark.parametrize("kind", ["openai-gpt", "gemma3n_text", "deepseek_v4", "longcat_flash"])
def test_a_copy_has_the_same_states(tmp_path: Path, kind: str) -> None:
    settings = {"hidden": {"loss": "l1"}, "learning_rate": 0.0, "max_steps": 1}
    trainer = make(tmp_path, stacks.model(kind), stacks.model(kind), **settings)
    trainer.train()
    assert trainer.state.log_history[0]["hidden"] == 0


@pytest.mark.parametrize("kind", ["gemma3n_text", "mamba", "modernbert-decoder"])
def test_kinds_of_student_and_teacher_differ(tmp_path: Path, kind: str) -> None:
    """Streams are projected as a wider layer is."""
    teacher = stacks.model("llama", 1, num_hidden_layers=6)
    trainer = make(tmp_path, stacks.model(kind), teacher, hidden={"loss": "cosine"})
    layers: Any = trainer._layers
    assert layers.pairs == [(1, 2), (2, 4), (3, 6)]
    assert (layers.projections is not None) == (kind == "gemma3n_text")
    if layers.projections is not None:
        assert [tuple(x.weight.shape) for x in layers.projections] == [(32, 128)] * 3
    before = None if layers.projections is None else models.weights(layers.projections)
    trainer.train()
    assert 0 < trainer.state.log_history[0]["hidden"] < 2  # one less a cosine
    if before is not None:
        assert models.difference(before, models.weights(layers.projections)) > 0


@pytest.mark.parametrize("is_teacher", [False, True])
def test_a_model_without_a_stack_is_refused_at_once(tmp_path: Path, is_teacher: bool) -> None:
    pair = [stacks.model("xlm"), models.llama()]
    with pytest.raises(ValueError, match="XLMWithLMHeadModel has 0: set hidden_layers=None"):
        make(tmp_path, *(reversed(pair) if is_teacher else pair))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_attention_dropout_is_not_in_the_maps(tmp_path: Path, family: str) -> None:
    rate = {"gpt2": "attn_pdrop", "llama": "attention_dropout"}[family]
    pair = [stacks.model(family, **{rate: 0.4}) for _ in range(2)]
    for lm in pair:
        lm.set_attn_implementation("eager")
    settings = {"hidden_layers": [1], "hidden": {"attention_weight": 1.0}, "learning_rate": 0.0}
    trainer = make(tmp_path, *pair, max_steps=1, **settings)
    trainer.train()
    # KL of two float32 softmaxes of the same scores; with dropout's zeros it is above 1
    assert abs(trainer.state.log_history[0]["attention"]) < 1e-6


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("family", [models.llama, models.gpt2])
@pytest.mark.parametrize("attention_weight", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(
    tmp_path: Path, reentrant: bool, attention_weight: float, family: Any
) -> None:
    def trained(checkpointing: bool) -> dict[str, Any]:
        pair = [family(seed) for seed in (0, 1)]
        for lm in pair:
            lm.set_attn_implementation("eager")
        settings = {"hidden": {"attention_weight": attention_weight}}
        if checkpointing:
            settings |= {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
            }
            pair[0].enable_input_require_grads()
        trainer = make(tmp_path, *pair, **settings)
        started = models.weights(trainer.model)
        try:
            trainer.train()
        except ValueError as error:
            assert models.difference(models.weights(trainer.model), started) == 0
            return {"refused": str(error)}
        return models.weights(trainer.model)

    found = trained(True)
    if reentrant and attention_weight:
        assert '{"use_reentrant": False}' in found["refused"]
    else:
        # Adam's steps from gradients that are sums in another order, see `models.options`
        assert models.difference(found, trained(False)) < 2e-6
