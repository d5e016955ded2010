"""What a training step holds on each engine, by kind, and the peaks of its parts.

python -m tests.hf_distill.engines.memory [--engines ddp fsdp2] compares them with the plan.
"""

import argparse
import gc
import json
import os
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, TrainerCallback

from hf_distill import DistillConfig, DistillTrainer
from hf_distill.models import pieces
from hf_distill.monitoring.memory_plan import Planner
from hf_distill.monitoring.plan_settings import Plan, PlanSettings
from hf_distill.teachers import SelfTeacher
from tests.benchmarks.timing import resident_peak_mb
from tests.hf_distill.engines import cpu
from tests.hf_distill.engines.launching import started
from tests.hf_distill.engines.setups import ENGINES, Place
from tests.hf_distill.trainers import models

STEPS = 3


def _bytes(found: Iterable[Tensor | None]) -> int:
    """Of storages, each counted once; of a DTensor its piece, which on a CPU may be in a whole."""
    sizes: dict[int, int] = {}
    for x in found:
        if isinstance(x, DTensor):
            local = x.to_local()
            sizes[local.data_ptr()] = local.nbytes
        elif isinstance(x, Tensor) and x.device.type != "meta":
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(sizes.values())


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for x in value.values():
            yield from _tensors(x)
    elif isinstance(value, list | tuple):
        for x in value:
            yield from _tensors(x)


def _zero(optimizer: Any) -> Any:
    """DeepSpeed's optimizer inside of accelerate's, or nothing."""
    inside = getattr(optimizer, "optimizer", None)
    return inside if hasattr(inside, "optimizer") else None


def parameters(model: nn.Module) -> int:
    held = ((p if isinstance(p, DTensor) else pieces.piece(p)) for p in model.parameters())
    return _bytes(held)


def gradients(model: nn.Module, optimizer: Any) -> int:
    zero = _zero(optimizer)
    found: list[Any] = [p.grad for p in model.parameters()]
    for name in ("averaged_gradients", "grad_partitions_flat_buffer"):
        found += _tensors(getattr(zero, name, None))
    for name in FLAT:
        found += [x.grad for x in getattr(zero, name, None) or ()]
    return _bytes(found)


def states(optimizer: Any) -> int:
    """Of the optimizer: its states, and DeepSpeed's copy of the parameters in float32."""
    zero = _zero(optimizer)
    inside = optimizer.optimizer if zero is None else zero.optimizer
    found = [x for x in _tensors(dict(inside.state)) if x.numel() > 1]
    for name in FLAT:
        found += getattr(zero, name, None) or ()
    return _bytes(found)


FLAT = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")


def resident_mb() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Watched:
    """Measures its steps; the last one stays."""

    base: float
    found: dict[str, Any]

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        gc.collect()
        reset_peak()
        self.found = {"start MB": resident_mb() - self.base}
        loss = super().compute_loss(model, *args, **kwargs)  # pyright: ignore
        self.found["loss MB"] = resident_peak_mb() - self.base
        self.found["after MB"] = resident_mb() - self.base
        reset_peak()
        return loss

    def hook(self) -> None:
        zero = _zero(self.optimizer)
        inside = self.optimizer if zero is None else zero.optimizer
        inside = inside.optimizer if hasattr(inside, "optimizer") else inside
        inside.register_step_pre_hook(self.before_step)
        inside.register_step_post_hook(self.after_step)

    def before_step(self, *_: Any) -> None:
        if "backward MB" in self.found:
            return
        self.found["backward MB"] = resident_peak_mb() - self.base
        self.found["gradients"] = gradients(self.model_wrapped, self.optimizer)
        self.found["parameters"] = parameters(self.model_wrapped)
        reset_peak()

    def after_step(self, *_: Any) -> None:
        self.found["step MB"] = resident_peak_mb() - self.base
        self.found["states"] = states(self.optimizer)


class Distilled(Watched, DistillTrainer):
    pass


class Hooks(TrainerCallback):
    """Sees the optimizer once its engine has it."""

    def __init__(self) -> None:
        self.trainer: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.hook()


BUCKETS = dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size"), "auto")
SIZES = {
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
TEACHER = {"hidden_size": 640, "intermediate_size": 1280, "num_attention_heads": 10}
TEACHER |= {"num_key_value_heads": 10}
ROWS, LENGTH, SHORTER = 4, 256, 200  # one row of a batch is padded


def made(place: Place, changes: dict[str, Any], count: int) -> Any:
    """A trainer of the sizes above, and what its plan is made from."""
    kind = changes.pop("teacher", "model")
    tied = changes.pop("tie_word_embeddings", False)
    lora = changes.pop("lora_rank", None)
    dtype = changes.pop("dtype", torch.float32)
    logits = changes.pop("by_logits", False)
    student = models.llama(0, **SIZES, tie_word_embeddings=tied).to(dtype)
    student = place.loaded(student, "student")
    if lora:
        config = LoraConfig(r=lora, target_modules="all-linear", task_type="CAUSAL_LM")
        student = get_peft_model(student, config)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(ROWS * count * STEPS):
        length = LENGTH if index % ROWS else SHORTER
        ids = torch.randint(3, SIZES["vocab_size"], (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": ids})
    given = {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 1}
    given |= {"optim": "adamw_torch_fused", "watchdog": {"action": "off"}, "max_grad_norm": 1.0}
    args = DistillConfig(**place.options(**given | changes))
    if kind == "model":
        teacher = place.loaded(models.llama(1, **SIZES | TEACHER).to(torch.bfloat16), "teacher")
    else:
        teacher = SelfTeacher(kind)
    hooks = Hooks()
    trainer = Distilled(student, args, models.Pad(), rows, teacher=teacher, callbacks=[hooks])
    hooks.trainer = trainer
    if logits:
        trainer._reader._refusal = "asked for"
    return trainer


def measure(engine: str, changes: dict[str, Any], folder: Path) -> None:
    """Be one process: train, and print what the last step held."""
    torch.set_num_threads(1)
    if engine != "one":
        cpu.take_processes_for_devices()
    if engine.startswith("zero"):
        cpu.without_compiled_ops()
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ.get("RANK", "0"))
    place = Place(folder, engine, world)
    if engine.startswith("zero"):  # DeepSpeed's own are for larger models
        ENGINES[engine]["deepspeed"]["zero_optimization"] |= BUCKETS
    warm_up(place)
    Distilled.base = resident_mb()
    trainer = made(place, dict(changes), 1 if engine == "tp" else world)
    trainer.train()
    if rank == 0:
        print("FOUND" + json.dumps(trainer.found), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def warm_up(place: Place) -> None:
    """What a first training imports and keeps is no part of a second one's."""
    args = DistillConfig(**place.options(max_steps=1, gradient_accumulation_steps=1))
    student = place.loaded(models.llama(0), "warm")
    DistillTrainer(student, args, models.Pad(), models.rows(16), teacher=models.llama(1)).train()
    gc.collect()


def run(engine: str, changes: dict[str, Any], processes: int = 2) -> dict[str, Any]:
    """Measure in processes of their own."""
    words = ["--process", engine, "--changes", json.dumps(changes)]
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed leaves the process
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        words += ["--out", folder]
        count = 1 if engine == "one" else processes
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count)]
        for process in started(["tests.hf_distill.engines.memory", *words], files):
            process.wait()
        files[0].seek(0)
        text = files[0].read()
    lines = [line for line in text.splitlines() if line.startswith("FOUND")]
    assert lines, text[-3000:]
    return json.loads(lines[-1].removeprefix("FOUND"))


def planned(engine: str, changes: dict[str, Any], processes: int = 2) -> Plan:
    """The plan of the same training."""
    given = dict(changes)
    if engine == "fsdp2-shard":
        engine, given["shard_loss"] = "fsdp2", True
    kind = given.pop("teacher", "model")
    given = {k: v for k, v in given.items() if k in PlanSettings.__dataclass_fields__}
    config = LlamaConfig(**SIZES, tie_word_embeddings=changes.get("tie_word_embeddings", False))
    teacher = LlamaConfig(**SIZES | TEACHER) if kind == "model" else None
    dtype = "float32" if engine == "tp" else "bfloat16"  # see `Place.loaded`
    settings = PlanSettings(
        devices=1 if engine == "one" else processes,
        batch_size=ROWS,
        length=LENGTH,
        scored_tokens=(ROWS - 1) * (LENGTH - 1) + SHORTER - 1,
        device="cpu",
        teacher=kind,
        teacher_dtype=None if teacher is None else dtype,
        **given,
    )
    return Planner(config, teacher, settings).plan(engine)


def compared(found: dict[str, Any], plan: Plan) -> dict[str, tuple[float, float]]:
    """What was held and what was planned, in MiB: tensors, and what a step adds to its start."""
    rows = {row.kind: row for row in plan.rows}
    mib, noted = 2**20, found["start MB"]
    start = sum(rows[x].loss for x in rows if x not in PASSING)
    pairs = {
        "parameters": (found["parameters"], rows["student parameters"].step),
        "gradients": (found["gradients"], rows["gradients"].step - _buckets(plan)),
        "optimizer states": (found["states"], rows["optimizer states"].step),
    }
    made = {x: (held / mib, formula / mib) for x, (held, formula) in pairs.items()}
    made["held at the start"] = noted, start / mib
    for moment in ("loss", "backward"):
        made[f"{moment}, above"] = (
            found[f"{moment} MB"] - noted,
            (plan.moments[moment] - start) / mib,
        )
        made[moment] = found[f"{moment} MB"], plan.moments[moment] / mib
    made["step"] = found["step MB"], plan.moments["step"] / mib
    return made


def _buckets(plan: Plan) -> int:
    """DDP's, which no Python object holds."""
    row = next(row for row in plan.rows if row.kind == "gradients")
    return row.loss if plan.engine == "ddp" else 0


PASSING = ("joined by the engine", "loss", "activations")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--engines", nargs="+", default=["one", "ddp", "fsdp2", "zero2", "zero3"])
    parser.add_argument("--changes", type=json.loads, default={})
    parser.add_argument("--process", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.process:
        measure(given.process, given.changes, given.out)
        return
    for engine in given.engines:
        found, plan = run(engine, given.changes), planned(engine, given.changes)
        for kind, (held, formula) in compared(found, plan).items():
            print(f"{engine:6s} {kind:20s} {held:8.1f} {formula:8.1f} MiB {formula / held:6.3f}")


if __name__ == "__main__":
    main()
