"""Self-distillation of image-text models: rows with images on both sides, off and on policy."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_distill import Feedback, HintCollator, OPSDConfig, OPSDTrainer
from tests.hf_distill.data import image_processors
from tests.hf_distill.trainers import image_models, models
from tests.hf_distill.trainers.test_image_text import ROUNDING, SETTINGS, Keep

KINDS = ["qwen2_vl", "qwen3_vl", "llava", "gemma3", "idefics3", "internvl"]
pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

GREEDY = {"temperature": 0.0}
OPTIONS = SETTINGS | {"max_completion_length": 6, "alpha": 1.0, "teacher": "live"}


def trainer(
    folder: Path, kind: str, environment: Any = None, model: Any = None, **changes: Any
) -> Any:
    processor, lm = image_processors.processor(kind), model or image_models.model(kind)
    args = OPSDConfig(**models.options(folder, **OPTIONS | changes))
    given = {"processing_class": processor, "callbacks": [Keep()], "environment": environment}
    return OPSDTrainer(lm, args, HintCollator(processor), image_processors.rows(), **given)


def scored(lm: Any, kind: str, messages: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, V] float64 logits and [N] ids of a last reply, by the processor's own call."""
    apply = image_processors.processor(kind).apply_chat_template
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    context = apply(messages[:-1], add_generation_prompt=True, **options)["input_ids"].shape[1]
    inputs = apply(messages, **options)
    return lm(**inputs).logits[0, context - 1 : -1].double(), inputs["input_ids"][0, context:]


def reference(lm: Any, kind: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean KL of the hinted model from the model, a row at a time, and its gradients."""
    each = []
    for row in image_processors.rows():
        content = row["prompt"][0]["content"]
        hint = f"\n\n{row['hint']}"
        told = content + hint if isinstance(content, str) else [*content, text(hint)]
        own, ids = scored(lm, kind, [*row["prompt"], *row["completion"]])
        with torch.no_grad():
            hinted = [{"role": "user", "content": told}, *row["completion"]]
            other, same = scored(lm, kind, hinted)
        assert ids.tolist() == same.tolist()
        log_q, log_p = own.log_softmax(-1), other.log_softmax(-1)
        each.append((log_p.exp() * (log_p - log_q)).sum(-1))
    loss = torch.cat(each).mean()
    loss.backward()
    found = {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad(set_to_none=True)
    return loss.item(), found


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_each_row_alone(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer(tmp_path, kind, on_policy=False)
    wanted, gradients = reference(made.model, kind)
    with caplog.at_level(logging.INFO, logger="hf_distill"):
        made.train()
    assert "without a hint student and teacher are 0.0e+00 nats apart" in caplog.text
    assert models.steps(made)[0]["loss"] == pytest.approx(wanted, rel=1e-5)
    found = next(x.gradients for x in made.callback_handler.callbacks if isinstance(x, Keep))
    largest = max(float(x.abs().max()) for x in gradients.values())
    assert models.difference(found, gradients) < 3 * ROUNDING * largest


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_completions_are_those_of_each_row_alone(tmp_path: Path, kind: str) -> None:
    made = trainer(tmp_path, kind, temperature=1.0, rollout=GREEDY, eval_strategy="no")
    start: Any = models.copied(made.model).eval()
    made.train()
    window = made._window
    episodes = [x for batch in window.episodes for x in batch]
    apply = image_processors.processor(kind).apply_chat_template
    never = made.hint_collator.processor.placeholder_ids
    for episode in episodes:
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = apply(episode.prompt, add_generation_prompt=True, **options)
        assert inputs["input_ids"][0].tolist() == episode.context
        greedy = start.generate(
            **inputs, max_new_tokens=6, do_sample=False, suppress_tokens=never, eos_token_id=2
        )
        assert greedy[0, len(episode.context) :].tolist() == episode.completions[0]


def test_what_stands_for_an_image_is_never_sampled(tmp_path: Path) -> None:
    """Of two opposite rows of the head one is above all others, at each token."""
    made = trainer(tmp_path, "qwen2_vl", rollout=GREEDY)
    image, video = made.hint_collator.processor.placeholder_ids
    with torch.no_grad():
        weight = made.model.lm_head.weight
        direction = weight[0].clone()
        weight.zero_()
        weight[image], weight[video] = direction, -direction
    made.train()
    episodes = [x for batch in made._window.episodes for x in batch]
    assert not {image, video} & {token for x in episodes for y in x.completions for token in y}


def judge(attempts: Any) -> list[Any]:
    return [Feedback() for _ in attempts]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"engine": "continuous"}}, "'generate' only, got 'continuous'"),
        ({"rollout": {"engine": "vllm"}}, "'generate' only, got 'vllm'"),
        ({"rollout": {"max_turns": 2}}, "set rollout.max_turns=1, got 2"),
    ],
)
def test_other_rollouts_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, "llava", environment=judge, **changes)


def test_a_forecast_and_an_evaluation_read_the_images(tmp_path: Path) -> None:
    made = trainer(tmp_path, "qwen2_vl", rollout=GREEDY, temperature=1.0)
    found = made.forecast(num_rows=2)
    made.train()
    (episodes,) = made._window.episodes
    assert [list(x.ids) for x in found.rollouts] == [x.completions[0] for x in episodes[:2]]
    loss = made.evaluate(image_processors.rows())["eval_loss"]
    assert loss == pytest.approx(models.steps(made)[0]["loss"], rel=1e-5)


def frozen(kind: str, part: str = "language_model", **changes: Any) -> Any:
    """The model with only a part of it trained, which has adapters."""
    lm = image_models.model(kind)
    config = LoraConfig(r=2, target_modules=rf".*{part}.*\.(q_proj|v_proj|qkv)", **changes)
    return get_peft_model(lm, config)


FIRST = ("qwen2_vl", "idefics3")
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in FIRST]


@pytest.mark.parametrize("kind", [*FIRST, *SLOW])
def test_a_frozen_tower_runs_once_for_both_sides(tmp_path: Path, kind: str) -> None:
    part = "text_model" if kind == "idefics3" else "language_model"
    weights, losses = [], []
    for shares in (True, False):
        torch.manual_seed(0)
        student = frozen(kind, part)
        made = trainer(
            tmp_path, kind, on_policy=False, model=student, max_steps=2, learning_rate=1e-2
        )
        made._images = made._images if shares else None
        shared = made._images
        made.train()
        assert shared is None or shared.num_shared >= 2
        weights.append(models.weights(student))
        losses.append([x["loss"] for x in models.steps(made)])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]
    assert models.difference(*weights) == 0.0


@pytest.mark.parametrize("case", ["adapters in the tower", "a trained tower", "dropout"])
def test_a_tower_that_may_differ_runs_for_each_side(tmp_path: Path, case: str) -> None:
    student = (
        frozen("llava", "vision_tower") if case == "adapters in the tower" else frozen("llava")
    )
    if case == "a trained tower":
        student.base_model.model.model.multi_modal_projector.requires_grad_(True)
    if case == "dropout":
        student.base_model.model.config.vision_config.attention_dropout = 0.1
    made = trainer(tmp_path, "llava", on_policy=False, model=student)
    assert not made._images.can_be_shared
    made.train()
    assert made._images.num_shared == 0


def test_a_resumed_run_is_the_whole_one(tmp_path: Path) -> None:
    """The names of LLaVA's weights are others in its checkpoints."""
    changes = {"learning_rate": 1e-3, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    changes |= {"per_device_train_batch_size": 1, "rollout": {"temperature": 1.0}}
    whole, again = (trainer(tmp_path, "llava", **changes) for _ in range(2))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    made = models.weights(whole.model)
    assert models.difference(made, models.weights(again.model)) == 0.0
    loaded = type(whole.model).from_pretrained(tmp_path / "checkpoint-2")
    assert models.difference(made, models.weights(loaded)) == 0.0
