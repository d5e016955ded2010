"""Set-ups that are more than one training: resumed, saved and loaded, in bfloat16.

Importing the module adds them to the set-ups.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed as of_deepspeed

from hf_distill import Attempt, Feedback, HintCollator, OPSDConfig, OPSDTrainer
from hf_distill.trainers import distill_trainer
from tests.hf_distill.engines.no_logits import in_chunks
from tests.hf_distill.engines.setups import (
    EMA,
    SETUPS,
    SPECIAL,
    WIDER,
    Place,
    adapted,
    distill,
    largest,
    llama,
    opsd,
    projections_of,
    whole_weights,
)
from tests.hf_distill.trainers import models

SAVING: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
SHARDED = "SHARDED_STATE_DICT"
SAVING |= {"optim": "adamw_torch", "learning_rate": 1e-3, "train_sampling_strategy": "random"}


def found_of(trainer: Any) -> dict[str, Any]:
    """The weights and logs after a training."""
    logs = [dict(log) for log in trainer.state.log_history]
    return {"weights": whole_weights(trainer), "logs": logs}


def trained(make: Callable[..., Any], place: Place, **changes: Any) -> Any:
    trainer = make(place, **changes)
    trainer.train()
    return trainer


def resumed(
    make: Callable[..., Any], place: Place, sharded: bool = False, **changes: Any
) -> dict[str, Any]:
    """Train, and again from the middle."""
    changes |= sharded_checkpoints(place) if sharded else {}
    folder = place.folder / "checkpoint-2"
    straight = whole_weights(trained(make, place, **SAVING, **changes))
    trainer = make(place, **SAVING, **changes)
    trainer.train(resume_from_checkpoint=str(folder))
    return found_of(trainer) | {"straight": straight, "wrong": _projections_in(folder)}


def _projections_in(folder: Path) -> list[str]:
    """What a saved model has of projections, which belong to a run."""
    written = [name for file in folder.glob("*model*.safetensors") for name in load_file(file)]
    return [f"{name} is saved" for name in written if "projection" in name]


def best(make: Callable[..., Any], place: Place, **changes: Any) -> dict[str, Any]:
    """The model that is loaded at the end is not that of the last step."""
    given = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # so that it is not the last
    }
    rows = models.rows(24, seed=5, longest=24)
    trainer = trained(make, place, eval_dataset=rows, **given, **changes)
    at = trainer.state.best_global_step
    return found_of(trainer) | {"wrong": [] if at < 3 else [f"the best step is {at}, the last"]}


def sharded_checkpoints(place: Place) -> dict[str, Any]:
    """Checkpoints in pieces, where the engine has both kinds."""
    if not place.engine.startswith("fsdp"):
        return {}
    return {"fsdp_config": place.options()["fsdp_config"] | {"state_dict_type": SHARDED}}


def _gathering(place: Place) -> dict[str, Any]:
    """ZeRO-3 writes a whole model where its config says so."""
    if place.engine != "zero3":
        return {}
    config = copy.deepcopy(place.options()["deepspeed"])
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return {"deepspeed": config}


def saved(place: Place, sharded: bool = False, **changes: Any) -> dict[str, Any]:
    """What `save_model` writes, loaded without an engine, is what was trained."""
    changes |= sharded_checkpoints(place) if sharded else {}
    trainer = trained(distill, place, **_gathering(place), **changes)
    found, folder = found_of(trainer), place.folder / "saved"
    trainer.save_model(str(folder))
    if dist.is_initialized():
        dist.barrier()
    return found | {"wrong": _compared(folder, found["weights"], "lora" in changes)}


def _compared(folder: Path, weights: Mapping[str, Tensor], lora: bool) -> list[str]:
    """What a saved model has otherwise than the weights; adapters are merged and saved again."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return []
    with mock.patch.object(of_deepspeed, "_hf_deepspeed_config_weak_ref", None):  # not in pieces
        return _compared_alone(folder, weights, lora)


def _compared_alone(folder: Path, weights: Mapping[str, Tensor], lora: bool) -> list[str]:
    wanted = models.lora(llama()) if lora else llama()
    wanted.load_state_dict(dict(weights), strict=False)
    if lora:
        merged = PeftModel.from_pretrained(llama(), str(folder)).merge_and_unload()
        folder = folder.with_name("merged")
        merged.save_pretrained(folder)
        wanted = wanted.merge_and_unload()
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    apart = largest(dict(wanted.named_parameters()), dict(loaded.named_parameters()))
    moved = largest(dict(llama().named_parameters()), dict(loaded.named_parameters()))
    odd = [f"saved {apart:.0e} from trained"] if apart else []
    odd += _projections_in(folder)
    return odd if moved > 1e-4 else [*odd, "nothing was trained"]


def _trained_exactly(place: Place, **changes: Any) -> tuple[Any, dict[str, Tensor]]:
    """A trainer after its training, and the weights in float32.

    DeepSpeed trains such copies, whose start is in 16 bits.
    """
    trainer = distill(place, **changes)
    projections = dict(projections_of(trainer))
    start = llama().state_dict() | {name: p.detach().clone() for name, p in projections.items()}
    trainer.train()
    if not trainer.is_deepspeed_enabled:
        return trainer, whole_weights(trainer)
    import deepspeed.utils as zero  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

    named = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters()) | projections
    found = {name: zero.safe_get_full_fp32_param(p).clone() for name, p in named.items()}
    return trainer, {name: found[name] - (w.bfloat16() - w) for name, w in start.items()}


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Root of the sum of squares over all weights."""
    return sum(float((a[n].double() - b[n].double()).square().sum()) for n in a) ** 0.5


def bf16(place: Place, **changes: Any) -> dict[str, Any]:
    """Hidden states are as near to float32 as logits are."""
    if place.engine == "one":
        return found_of(trained(distill, place, **changes))
    given: dict[str, Any] = {"bf16": True} | changes
    if place.engine.startswith("zero"):
        given["deepspeed"] = place.options()["deepspeed"] | {"bf16": {"enabled": "auto"}}
    by_logits = mock.patch.object(distill_trainer, "hidden_states_refusal", return_value="compared")
    with by_logits:
        _, logits = _trained_exactly(place, **given)
    trainer, weights = _trained_exactly(place, **given)
    return found_of(trainer) | {"weights": weights, "by logits": logits}


def near(one: Mapping[str, Tensor], many: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether bfloat16 by hidden states is as near to float32 as by logits, and how near."""
    hidden, logits = (_distance(one, many[x]) for x in ("weights", "by logits"))
    text = f"{hidden:.2e} from float32, by logits {logits:.2e}"
    return 0 < hidden <= 1.1 * logits, text


def offload(place: Place) -> Any:
    """What an engine keeps on the processor is there."""
    options: dict[str, Any] = place.options()
    if "fsdp_config" in options:
        return distill(place, fsdp_config=options["fsdp_config"] | {"cpu_offload": True})
    if "deepspeed" not in options:
        return distill(place)
    config = copy.deepcopy(options["deepspeed"])
    zero = config["zero_optimization"]
    zero["offload_optimizer"] = {"device": "cpu"}
    if zero["stage"] == 3:
        zero["offload_param"] = {"device": "cpu"}
    return distill(place, deepspeed=config)


def no_logits(place: Place) -> dict[str, Any]:
    """Neither student nor teacher makes logits of more tokens than a chunk has."""
    found = found_of(trained(distill, place))
    if place.engine == "one":
        return found
    fused, by_logits, _ = in_chunks(place)
    is_seen = any(x in by_logits for x in ("made logits", "whole head"))
    missed = [] if is_seen else [f"the check does not see logits: {by_logits}"]
    return found | {"wrong": [x for x in (fused, *missed) if x]}


class Asker:
    """Asks again after each reply that has ended; its feedback is the length of the reply."""

    def __call__(self, attempts: Sequence[Attempt]) -> list[Feedback]:
        again = {"role": "user", "content": "Hint : think first"}
        return [Feedback([again], {"feedback": f"get {len(a.text.split())}"}) for a in attempts]


def environment(place: Place, **changes: Any) -> OPSDTrainer:
    """Dialogues that go on for other numbers of rounds on each process."""
    student = llama()
    with torch.no_grad():  # replies end soon, not always
        student.lm_head.weight[models.EOS] = 0.5 * student.lm_head.weight[5:20].sum(0)
    student = adapted(place.loaded(student, "student"), changes)
    rollout = {"max_turns": 3, "temperature": 0.0}
    settings = {"max_completion_length": 4, "rollout": rollout, "on_policy": True} | changes
    rows, tokenizer = models.problems(48, chat=True), models.tokenizer()
    args = OPSDConfig(**place.options(**settings))
    collator = HintCollator(tokenizer, "{feedback}")
    given = {"processing_class": tokenizer, "environment": Asker()}
    return OPSDTrainer(student, args, collator, rows, **given)


SETUPS |= {
    "watchdog stops": lambda p: opsd(
        p, teacher="live", max_steps=6, watchdog={"action": "stop", "dead_signal": 50.0}
    ),
    "environment": environment,
    "environment, lora": lambda p: environment(p, lora=True),
    "offload": offload,
}
SAVED = {
    "saved": saved,
    "saved, sharded": partial(saved, sharded=True),
    "saved, lora merged": partial(saved, lora=True),
    "saved, lora, sharded": partial(saved, lora=True, sharded=True),
    "saved, projections": partial(saved, **WIDER),
    "saved, projections, sharded": partial(saved, sharded=True, **WIDER),
    "saved, projections, lora": partial(saved, lora=True, **WIDER),
}
SPECIAL |= SAVED | {
    "resumed": partial(resumed, distill),
    "resumed, ema": partial(resumed, opsd, **EMA),
    "resumed, ema, lora": partial(resumed, opsd, lora=True, **EMA),
    "resumed, lora, sharded": partial(resumed, distill, lora=True, sharded=True),
    "resumed, base": partial(resumed, opsd),
    "resumed, projections": partial(resumed, distill, **WIDER),
    "resumed, projections, sharded": partial(resumed, distill, sharded=True, **WIDER),
    "resumed, projections, lora": partial(resumed, distill, lora=True, **WIDER),
    "resumed, projections, lora, sharded": partial(
        resumed, distill, lora=True, sharded=True, **WIDER
    ),
    "best model, projections": partial(best, distill, **WIDER),
    "best model": partial(best, distill),
    "best model, lora": partial(best, distill, lora=True),
    "bf16": bf16,
    "bf16, projections": partial(bf16, **WIDER),
    "no logits": no_logits,
}
SETUPS |= SPECIAL
