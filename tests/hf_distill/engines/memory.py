"""What tensors hold in a training step on each engine, by kind and at the highest of its parts.

python -m tests.hf_distill.engines.memory [--engines ddp fsdp2] compares them with the plan.
"""

import argparse
import gc
import json
import os
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, TrainerCallback

from hf_distill import DistillConfig, DistillTrainer
from hf_distill.models import pieces
from hf_distill.monitoring.memory_plan import Planner
from hf_distill.monitoring.plan_settings import Plan, PlanSettings
from hf_distill.teachers import SelfTeacher
from tests.benchmarks.timing import allocations
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


def held() -> int:
    """Of all tensors that Python holds, in bytes; DDP's buckets and pieces of work are not seen."""
    gc.collect()
    found = (x for x in gc.get_objects() if isinstance(x, Tensor))
    local = (x.to_local() if isinstance(x, DTensor) else x for x in found)
    stored = (x.untyped_storage() for x in local if type(x) is not FakeTensor and not x.is_meta)
    return sum({x.data_ptr(): x.nbytes() for x in stored}.values())


class Watched:
    """Measures what tensors hold in its last step, as the allocator counts it."""

    found: dict[str, Any]
    turn = 0
    held = 0
    profile: Any = None

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        self.turn += 1
        if self.turn < STEPS:
            return super().compute_loss(model, *args, **kwargs)  # pyright: ignore
        self.held = held()
        self.found = {"start": self.held}
        self.begin()
        loss = super().compute_loss(model, *args, **kwargs)  # pyright: ignore
        self.end("loss")
        self.begin()
        return loss

    def begin(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()

    def end(self, name: str) -> None:
        """Note the highest of a part of the step."""
        self.profile.__exit__(None, None, None)
        changes = allocations(self.profile)
        self.profile = None
        self.found[name] = self.held + max(accumulate(changes), default=0)
        self.held += sum(changes)

    def hook(self) -> None:
        zero = _zero(self.optimizer)
        inside = self.optimizer if zero is None else zero.optimizer
        inside = inside.optimizer if hasattr(inside, "optimizer") else inside
        inside.register_step_pre_hook(self.before_step)
        inside.register_step_post_hook(self.after_step)

    def before_step(self, *_: Any) -> None:
        if self.turn < STEPS or "backward" in self.found:
            return
        self.end("backward")
        self.found["gradients"] = gradients(self.model_wrapped, self.optimizer)
        self.found["parameters"] = parameters(self.model_wrapped)
        self.begin()

    def after_step(self, *_: Any) -> None:
        """DeepSpeed steps several groups: the parts of all of them are one."""
        if self.turn < STEPS:
            return
        before = self.found.get("step", 0)
        self.end("step")
        self.found["step"] = max(before, self.found["step"])
        self.found["states"] = states(self.optimizer)
        self.begin()


class Distilled(Watched, DistillTrainer):
    pass


class Hooks(TrainerCallback):
    """Sees the optimizer once its engine has it."""

    def __init__(self) -> None:
        self.trainer: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.hook()


@torch.no_grad()
def alone(model: Any) -> Any:
    """Give each piece a storage of its own, as on a device: Transformers' pieces are views."""
    for p in model.parameters():
        x = p._local_tensor if isinstance(p, DTensor) else p.data  # to_local() is another tensor
        if x.untyped_storage().nbytes() > x.nbytes:
            x.set_(x.clone())
    return model


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
    student = alone(place.loaded(student, "student"))
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
        teacher = alone(
            place.loaded(models.llama(1, **SIZES | TEACHER).to(torch.bfloat16), "teacher")
        )
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
    trainer = made(place, dict(changes), 1 if engine == "tp" else world)
    trainer.train()
    trainer.profile.__exit__(None, None, None)  # behind the last step of the optimizer
    if rank == 0:
        print("FOUND" + json.dumps(trainer.found), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(engine: str, changes: dict[str, Any], processes: int = 2) -> dict[str, Any]:
    """Measure in processes of their own."""
    words = ["--process", engine, "--changes", json.dumps(changes)]
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
    """What was held and what was planned, in MiB: tensors, and the highest of parts of a step."""
    rows, mib = {row.kind: row for row in plan.rows}, 2**20
    buckets = _buckets(plan)
    pairs = {
        "parameters": (found["parameters"], rows["student parameters"].step),
        "gradients": (found["gradients"], rows["gradients"].step - buckets),
        "optimizer states": (found["states"], rows["optimizer states"].step),
        "start": (found["start"], sum(rows[x].loss for x in rows if x not in PASSING) - buckets),
    }
    pairs |= {x: (found[x], plan.moments[x] - buckets) for x in MOMENTS}
    return {x: (held / mib, formula / mib) for x, (held, formula) in pairs.items()}


def _buckets(plan: Plan) -> int:
    """DDP's, which no Python object holds."""
    row = next(row for row in plan.rows if row.kind == "gradients")
    return row.loss if plan.engine == "ddp" else 0


MOMENTS = ("loss", "backward", "step")
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
