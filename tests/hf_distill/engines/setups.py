"""Trainings that every engine should do as one process does, and the engines' settings.

Rows of a step, over all processes, are the same; SGD, so that a gradient of another size shows.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.distributed import DistributedConfig

from hf_distill import DistillConfig, DistillTrainer, OPSDConfig, OPSDTrainer
from hf_distill.cache import CachedTeacher, HeadSamples, cache_teacher
from hf_distill.models import forward
from tests.hf_distill.trainers import models, own_losses

ROWS = 6  # of a micro-batch, over all processes
WIDE = {"hidden_size": 72, "intermediate_size": 96, "vocab_size": 512}
WIDE |= {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 8}  # by 2 and by 3
WRAP = {
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
}


def _fsdp(version: int, **changes: Any) -> dict[str, Any]:
    sync = {"sync_module_states": False} if version == 1 else {}
    return {"fsdp": True, "fsdp_config": WRAP | sync | {"version": version} | changes}


def _zero(stage: int) -> dict[str, Any]:
    pieces = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {
        "deepspeed": {
            "zero_optimization": {"stage": stage} | pieces,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    }


ENGINES: Mapping[str, dict[str, Any]] = {
    "one": {"use_cpu": True},
    "ddp": {},
    "fsdp1": _fsdp(1, state_dict_type="SHARDED_STATE_DICT"),  # a whole one needs a device
    "fsdp2": _fsdp(2),
    "fsdp2-shard": _fsdp(2) | {"shard_loss": True},
    "fsdp2-ac": _fsdp(2, activation_checkpointing=True),
    "zero1": _zero(1),
    "zero2": _zero(2),
    "zero3": _zero(3),
    "native-fsdp2": {},  # Transformers' own, made at loading
    "tp": {},
}


class Place:
    """Says where a training runs: its folder, engine and number of processes."""

    def __init__(self, folder: Path, engine: str, num_processes: int) -> None:
        self.folder, self.engine, self.num_processes = folder, engine, num_processes

    def loaded(self, model: Any, name: str) -> Any:
        """Return the model, loaded in pieces if the engine is Transformers' own."""
        kinds = {"tp": "tp_size", "native-fsdp2": "fsdp_size"}
        if self.engine not in kinds:
            return model
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        if torch.distributed.get_rank() == 0:
            model.save_pretrained(self.folder / name)
        torch.distributed.barrier()
        given = DistributedConfig(**{kinds[self.engine]: self.num_processes})
        loaded = type(model).from_pretrained(
            self.folder / name, dtype=torch.float32, distributed_config=given
        )
        return loaded.train()

    def options(self, **changes: Any) -> dict[str, Any]:
        rows = ROWS // (1 if self.engine == "tp" else self.num_processes)
        made = models.options(self.folder, per_device_train_batch_size=rows)
        made.pop("adam_epsilon", None)
        made.pop("use_cpu", None)
        given = {
            "per_device_eval_batch_size": rows,
            "optim": "sgd",
            "learning_rate": 0.05,
            "max_grad_norm": 1e9,
            "max_steps": 3,
            "gradient_accumulation_steps": 2,
        }
        return made | given | ENGINES[self.engine] | changes


def llama(seed: int = 0, **changes: Any) -> Any:
    return models.llama(seed, **WIDE | changes)


def other(**changes: Any) -> Any:
    return llama(1, **{"hidden_size": 96, "intermediate_size": 128} | changes)


def distill(place: Place, student: Any = None, **changes: Any) -> DistillTrainer:
    data = changes.pop("data", None) or models.rows(48, longest=24)
    extra = {
        k: changes.pop(k) for k in ("loss", "eval_dataset", "processing_class") if k in changes
    }
    teacher, collator = changes.pop("by", None) or other(), models.Pad()
    if changes.pop("teacher_in_pieces", False):
        teacher = place.loaded(teacher, "teacher")
    student = adapted(place.loaded(student or llama(), "student"), changes)
    args = DistillConfig(**place.options(**changes))
    return DistillTrainer(student, args, collator, data, teacher=teacher, **extra)


def adapted(student: Any, changes: dict[str, Any]) -> Any:
    """Return the student with adapters if the changes say so, of the same values in each engine."""
    if not changes.pop("lora", False):
        return student
    values = dict(models.lora(llama()).named_parameters())
    made = models.lora(student)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                whole = values[name].detach()
                if isinstance(parameter, DTensor):
                    where = parameter.device_mesh, parameter.placements
                    parameter.copy_(distribute_tensor(whole, *where))
                else:
                    parameter.copy_(whole)
    return made


def opsd(place: Place, **changes: Any) -> OPSDTrainer:
    student = adapted(place.loaded(llama(), "student"), changes)
    settings = {"max_completion_length": 8, "rollout": {"temperature": 0.0}} | changes
    if not settings.setdefault("on_policy", False):
        settings.pop("rollout")
    args = OPSDConfig(**place.options(**settings))
    rows, tokenizer = models.problems(48), models.tokenizer()
    return OPSDTrainer(student, args, train_dataset=rows, processing_class=tokenizer)


def cached(place: Place) -> DistillTrainer:
    rows, folder = models.rows(48, longest=24), place.folder / "cache"
    given = {"codec": HeadSamples(top_k=8, num_samples=4), "data_collator": models.Pad()}
    cache_teacher(llama(1), rows, folder, shard_rows=8, **given)
    return distill(place, data=rows, by=CachedTeacher(folder))


def by_name(place: Place) -> DistillTrainer:
    """A teacher that the trainer loads, when the engine's arguments are there."""
    folder = place.folder.parent / f"teacher-{place.num_processes}"
    if int(os.environ.get("RANK", "0")) == 0:
        other().save_pretrained(folder)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return distill(place, by=str(folder))


def padded(place: Place, **changes: Any) -> DistillTrainer:
    """The teacher's head has entries that stand for no token."""
    tokenizer = models.tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(WIDE["vocab_size"] - 2 - len(tokenizer))])
    given = {"by": other(vocab_size=520), "processing_class": tokenizer}
    return distill(place, **given, **changes)


def one_without_tokens(place: Place, **changes: Any) -> DistillTrainer:
    """The last process has nothing to score in the first micro-batch, little in the second."""
    rows = models.rows(48, longest=24)
    for row in rows[3:6]:
        row["labels"] = [-100] * len(row["labels"])
    for row in rows[9:12]:
        row["labels"] = [-100] * (len(row["labels"]) - 1) + row["labels"][-1:]
    return distill(place, data=rows, **changes)


WIDER = {"hidden_layers": "uniform"}  # of a teacher whose layers are
EMA = {"teacher": "ema", "self_teacher": {"ema_decay": 0.5}}
SETUPS: dict[str, Callable[[Place], Any]] = {  # `runs` adds some
    "separate": distill,
    "tied": lambda p: distill(p, llama(tie_word_embeddings=True)),
    "tied both": lambda p: distill(
        p, llama(tie_word_embeddings=True), by=llama(1, tie_word_embeddings=True)
    ),
    "jsd": lambda p: distill(p, divergence="jsd", alpha=1.0),
    "reverse kl, clip": lambda p: distill(p, divergence="reverse_kl", clip={"bound": 0.05}),
    "lora": lambda p: distill(p, lora=True),
    "teacher in pieces": lambda p: distill(p, teacher_in_pieces=True),
    "both in pieces, tied": lambda p: distill(
        p,
        llama(tie_word_embeddings=True),
        by=llama(1, tie_word_embeddings=True),
        teacher_in_pieces=True,
    ),
    "padded vocabulary": padded,
    "padded, in pieces": lambda p: padded(p, teacher_in_pieces=True),
    "teacher by name": by_name,
    "own loss": lambda p: distill(p, loss=own_losses.Measuring()),
    "gradient clipping": lambda p: distill(p, max_grad_norm=0.1),
    "gradient checkpointing": lambda p: distill(p, gradient_checkpointing=True),
    "a process without tokens": one_without_tokens,
    "hidden layers": lambda p: distill(p, by=llama(1), hidden_layers="uniform"),
    "projections": lambda p: distill(p, **WIDER),
    "projections, lora": lambda p: distill(p, lora=True, **WIDER),
    "projections, clipping": lambda p: distill(p, max_grad_norm=0.1, **WIDER),
    "projections, logits": lambda p: distill(p, label_smoothing_factor=0.1, **WIDER),
    "projections, a process without tokens": lambda p: one_without_tokens(p, **WIDER),
    "taid": lambda p: distill(
        p, taid={"t_start": 0.5, "t_end": 0.95, "step_size": 0.8, "momentum": 0.9}
    ),
    "entropy weights": lambda p: distill(p, token_weights={"entropy": 4.0}),
    "policy gradient": lambda p: distill(p, divergence="policy_gradient"),
    "label smoothing": lambda p: distill(p, label_smoothing_factor=0.1),
    "cache": cached,
    "evaluation": lambda p: distill(
        p,
        eval_dataset=models.rows(24, seed=5, longest=24),
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
    ),
    "base, lora": lambda p: opsd(p, lora=True),
    "base, full": lambda p: opsd(p),
    "live": lambda p: opsd(p, teacher="live"),
    "live, lora": lambda p: opsd(p, lora=True, teacher="live"),
    "lora scale": lambda p: opsd(p, lora=True, teacher="lora_scale"),
    "ema, full": lambda p: opsd(p, **EMA),
    "ema, lora": lambda p: opsd(p, lora=True, **EMA),
    "on-policy, base": lambda p: opsd(p, lora=True, on_policy=True),
    "on-policy, live": lambda p: opsd(p, on_policy=True, teacher="live"),
    "on-policy, ema": lambda p: opsd(p, on_policy=True, **EMA),
}


def _clean(name: str) -> str:
    for part in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name


def projections_of(trainer: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights of projections of hidden layers, by name, if there are any."""
    projections = getattr(getattr(trainer, "_layers", None), "projections", None)
    return iter(()) if projections is None else projections.named_parameters("projection")


def whole_weights(trainer: Any) -> dict[str, Tensor]:
    """All weights, those of the projections of hidden layers too, on every process."""
    from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp1  # noqa: PLC0415
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    model = trainer.model_wrapped
    inside = trainer.accelerator.unwrap_model(trainer.model)

    def copied(module: nn.Module) -> dict[str, Tensor]:
        named = [*module.named_parameters(), *projections_of(trainer)]
        found = {_clean(name): p.detach() for name, p in named}
        return {
            name: p.full_tensor().clone() if isinstance(p, DTensor) else p.clone()
            for name, p in found.items()
        }

    if isinstance(model, Fsdp1):
        layers = getattr(trainer, "_layers", None)
        with (
            nullcontext() if layers is None else layers.attached(),
            Fsdp1.summon_full_params(model, writeback=False),
        ):
            found = copied(model)
        return {name: x for name, x in found.items() if "hidden_projection" not in name}
    if any(hasattr(p, "ds_tensor") for p in inside.parameters()):
        import deepspeed  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

        cut = [*inside.parameters(), *(p for _, p in projections_of(trainer))]
        with deepspeed.zero.GatheredParameters(cut):
            return copied(inside)
    return copied(inside)


def few_tokens(place: Place, **changes: Any) -> DistillTrainer:
    """Few enough that logits take less memory than the gradient of a head."""
    forward.HEAD_COPIES |= COPIES
    return distill(place, **changes)


def few_on_one_process(place: Place, **changes: Any) -> DistillTrainer:
    """Processes read the same micro-batch in two ways."""
    forward.HEAD_COPIES |= dict.fromkeys(COPIES, 0.5)  # 12 tokens
    return one_without_tokens(place, **changes)


SETUPS |= {
    "few tokens": few_tokens,
    "projections, few tokens": lambda p: few_tokens(p, **WIDER),
    "projections, few on one process": lambda p: few_on_one_process(p, **WIDER),
}
COPIES = dict(forward.HEAD_COPIES)

# set-ups that are more than one training, see `runs`
SPECIAL: dict[str, Callable[[Place], dict[str, Any]]] = {}


def train(name: str, place: Place) -> dict[str, Any]:
    """Run a set-up; its weights afterwards, and the logs."""
    forward.HEAD_COPIES |= dict.fromkeys(COPIES, 0.0)  # batches here are small
    if name in SPECIAL:
        return SPECIAL[name](place)
    trainer = SETUPS[name](place)
    trainer.train()
    logs = [dict(log) for log in trainer.state.log_history]
    return {"weights": whole_weights(trainer), "logs": logs}


def largest(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest absolute difference of weights."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:3]
    return max(float((a[n].detach().double() - b[n].detach().double()).abs().max()) for n in a)


# of each process's own rows, or of samples of its own pieces
OWN_ROWS = ("teacher_drift", "teacher_moved", "ema_moved", "ema_distance")


def same_logs(one: Any, many: Any) -> list[str]:
    """What differs in the logs of a run, by name and step."""
    timed = ("runtime", "per_second", "flos", "memory")
    odd = []
    for a, b in zip(one, many, strict=True):
        for key in a:
            # of a process's own rows
            if any(x in key for x in timed) or (key in b and key.startswith(OWN_ROWS)):
                continue
            if key not in b:
                odd.append(f"{key} is missing")
            elif isinstance(a[key], float) and abs(a[key] - b[key]) > 2e-5 * max(1, abs(a[key])):
                odd.append(f"{key} {a[key]:g} is {b[key]:g} at step {a.get('step')}")
    return sorted(set(odd))


torch.set_printoptions(precision=3)
