"""What a plan says of each engine, against sums by hand over the parameters of a real model.

Sizes are even, so that two devices hold halves. `tests/hf_distill/engines/test_memory.py` compares
plans with what engines hold; here every row is exact, in every setting.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from hf_distill.__main__ import main
from hf_distill.models.structure import causal_lm
from hf_distill.monitoring.activations import Activations
from hf_distill.monitoring.memory_plan import Planner, first_that_fits, plan_all
from hf_distill.monitoring.model_sizes import ModelSizes, adapted
from hf_distill.monitoring.plan_settings import PlanSettings, Row
from metal_ops import Head, linear_scratch_bytes
from tests.hf_distill.monitoring.test_memory_plan import planned, rows
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

VOCAB, HIDDEN = 64, models.SIZES["hidden_size"]
MODEL = models.llama(vocab_size=VOCAB)
CONFIG = MODEL.config
SIZE = sum(p.numel() for p in MODEL.parameters())
BLOCK = sum(p.numel() for p in MODEL.model.layers[0].parameters())
HEAD = HIDDEN * VOCAB
OTHER: Any = LlamaConfig(
    **models.SIZES | {"hidden_size": 64, "vocab_size": VOCAB}, dtype="bfloat16"
)
TWO = {"devices": 2, "length": 32, "teacher": "live"}


def made(engine: str, **settings: Any) -> dict[str, Row]:
    return rows(planned(CONFIG, engine, **TWO | settings))


def bytes_each(row: Row, size: int = SIZE) -> list[float]:
    """Bytes of a row at the three moments, per parameter of the model."""
    return [x / size for x in row[1:4]]


@pytest.mark.parametrize(
    ("engine", "settings", "gradients", "states"),
    [
        ("ddp", {}, [4, 4, 8], 8),  # once more in the buckets
        ("ddp", {"gradient_accumulation_steps": 2}, [8, 8, 8], 8),
        ("ddp", {"bf16": True}, [4, 4, 8], 8),
        ("ddp", {"optim": "sgd"}, [4, 4, 8], 0),
        ("fsdp2", {}, [0, 0, 2], 4),
        ("fsdp2", {"gradient_accumulation_steps": 2}, [2, 2, 2], 4),
        ("fsdp2", {"bf16": True}, [0, 0, 2], 4),
        ("zero2", {}, [0, 0, 4], 6),  # the step has them in float32 beside, and such parameters
        ("zero2", {"gradient_accumulation_steps": 2}, [2, 2, 4], 6),
        ("zero2", {"bf16": True}, [0, 0, 3], 6),
        ("zero2", {"optim": "sgd"}, [0, 0, 4], 2),
        ("zero2", {"optim": "adafactor"}, [0, 0, 4], 4),  # of a flat tensor: no rows and columns
        ("zero3", {}, [2, 2, 4], 6),
        ("zero3", {"bf16": True}, [1, 1, 3], 6),
    ],
)
def test_gradients_and_states(
    engine: str, settings: dict[str, Any], gradients: list[float], states: float
) -> None:
    found = made(engine, **settings)
    assert bytes_each(found["gradients"]) == gradients
    assert bytes_each(found["optimizer states"]) == [states] * 3


@pytest.mark.parametrize(
    ("engine", "settings", "size"),
    [
        ("ddp", {}, 2),  # as its config says
        ("zero2", {}, 2),
        ("fsdp2", {}, 1),
        ("fsdp2", {"teacher_dtype": "float32", "bf16": True}, 2),
        ("zero3", {"teacher_dtype": "float32"}, 2),
        ("zero3", {"teacher_dtype": "float32", "bf16": True}, 1),  # DeepSpeed rounds it
    ],
)
def test_another_model(engine: str, settings: dict[str, Any], size: float) -> None:
    given = PlanSettings(**TWO | {"teacher": "model"} | settings)
    row = rows(Planner(CONFIG, OTHER, given).plan(engine))["teacher parameters"]
    other = sum(p.numel for p in ModelSizes(OTHER, torch.float32).parameters)
    assert bytes_each(row, other) == [size] * 3


def test_one_config_of_both_models_stays_as_it_is() -> None:
    config: Any = LlamaConfig(**models.SIZES | {"vocab_size": VOCAB}, dtype="bfloat16")
    row = rows(Planner(config, config, PlanSettings(length=32, teacher="model")).plan("one"))
    assert bytes_each(row["student parameters"]) == [4] * 3
    assert bytes_each(row["teacher parameters"]) == [2] * 3
    assert config.dtype == torch.bfloat16


def test_the_student_as_its_own_teacher() -> None:
    for engine, size in (("ddp", 4), ("zero2", 4), ("fsdp2", 2), ("zero3", 2)):
        for kind in ("ema", "base"):
            row = made(engine, teacher=kind)[f"teacher {kind}"]
            assert bytes_each(row) == [size] * 3, (engine, kind)
        assert bytes_each(made(engine)["teacher live"]) == [0, 0, 0]


@pytest.mark.parametrize("vocab", [VOCAB, 8192])
def test_what_an_engine_joins(vocab: int) -> None:
    config, kind = LlamaConfig(**models.SIZES | {"vocab_size": vocab}), "joined by the engine"
    given, head = {**TWO, "batch_size": 2}, 4 * vocab * HIDDEN
    row = {x: rows(planned(config, x, **given))[kind] for x in ("ddp", "fsdp2", "zero3", "tp")}
    # a block and the next, with their gradients and the copies that are cut; or the head
    backward = max(4 * 4 * BLOCK, head)
    assert (backward == head) == (vocab != VOCAB)
    assert row["fsdp2"][1:4] == (2 * head, backward, 0)
    assert row["zero3"][1:4] == (head, backward, 0)
    assert row["ddp"][1:4] == row["tp"][1:4] == (0, 4 * BLOCK, 0)
    assert rows(planned(config, "ddp", bf16=True, **given))[kind] == row["ddp"]
    half = rows(planned(config, "fsdp2", bf16=True, **given))[kind]
    assert half[1:4] == (head, backward // 2, 0)
    for engine in ("fsdp2", "zero3"):  # a teacher in pieces has a head too
        held = rows(planned(config, engine, **given | {"teacher": "base"}))[kind]
        assert held.loss - row[engine].loss == head
        assert held.backward - row[engine].backward == head // 2
        assert held.step == 0
        adapters = rows(planned(config, engine, **given | {"teacher": "base", "lora_rank": 2}))
        assert adapters[kind].loss == row[engine].loss


def test_adapters_have_no_gradients_of_what_is_joined() -> None:
    lm = causal_lm(adapted(models.llama(), 2))
    block = sum(p.numel() for p in lm.model.layers[0].parameters())  # pyright: ignore
    row = made("fsdp2", lora_rank=2)["joined by the engine"]
    assert row[1:4] == (2 * 4 * HEAD, 2 * 4 * block, 0)
    assert made("ddp", lora_rank=2)["joined by the engine"][1:4] == (0, 0, 0)


def scratch(tokens: int, dtype: torch.dtype, width: int | None = None, processes: int = 1) -> int:
    """What the op takes; `width` is that of another model as teacher, in bfloat16."""
    student = Head(torch.empty(VOCAB, HIDDEN, dtype=dtype, device="meta"))
    if width is None:
        return linear_scratch_bytes(tokens, student, student, processes)
    other = torch.empty(VOCAB, width, dtype=torch.bfloat16, device="meta")
    return linear_scratch_bytes(tokens, student, Head(other))


def test_the_loss_by_hidden_states() -> None:
    tokens, gradient = 62, 4 * HEAD
    states = tokens * HIDDEN
    wide, rounded = (scratch(tokens, x) for x in (torch.float32, torch.bfloat16))
    for engine, whole, kept in (("ddp", 1, 1), ("zero2", 1, 1), ("fsdp2", 1, 2), ("zero3", 2, 4)):
        row = made(engine, batch_size=2)["loss"]
        at_loss = whole * gradient + wide + 3 * 4 * states
        assert row[1:4] == (at_loss, kept * gradient + 4 * states, 0), engine
        row = made(engine, batch_size=2, bf16=True)["loss"]
        autocast = 2 * 2 * HEAD if engine == "ddp" else 0  # keeps both heads in 16 bits
        at_loss = whole * gradient + rounded + autocast + 3 * 2 * states
        assert row[1:4] == (at_loss, kept * gradient + 2 * states, 0), engine
    row = made("fsdp2", batch_size=2, lora_rank=2)["loss"]
    assert row[1:4] == (wide + 3 * 4 * states, 4 * states, 0)


def test_the_loss_of_a_wider_teacher() -> None:
    tokens, gradient = 62, 4 * HEAD
    for bf16 in (False, True):
        given = PlanSettings(**TWO | {"batch_size": 2, "teacher": "model", "bf16": bf16})
        row = rows(Planner(CONFIG, OTHER, given).plan("ddp"))["loss"]
        size, dtype = (2, torch.bfloat16) if bf16 else (4, torch.float32)
        autocast = 2 * VOCAB * (HIDDEN + 64) if bf16 else 0
        states = tokens * (2 * HIDDEN + 64) * size
        assert row.loss == gradient + scratch(tokens, dtype, 64) + states + autocast


def test_the_loss_by_logits() -> None:
    logits, gradient = 20 * 4 * VOCAB, 4 * HEAD
    for engine, of_head in (("fsdp2", gradient), ("zero3", gradient)):
        row = made(engine, scored_tokens=20)["loss"]
        assert row[1:4] == (3 * logits, logits + of_head, 0), engine


def test_the_loss_over_heads_in_pieces() -> None:
    """Of few tokens too: half of the head, its gradient and the logits of a chunk."""
    gradient = 4 * HEAD // 2
    for tokens in (20, 62):
        chunk, of_both = (scratch(x, torch.float32, None, 2) for x in (tokens, 2 * tokens))
        given = {"batch_size": 2, "scored_tokens": tokens}
        states = 4 * tokens * HIDDEN
        row = made("tp", **given)["loss"]
        assert row[1:4] == (gradient + chunk + 3 * states, gradient + states, 0)
        row = made("fsdp2", shard_loss=True, **given)  # hidden states of both devices
        loss = row["loss"]
        assert loss[1:4] == (gradient + of_both + 3 * 2 * states, gradient + 2 * states, 0)
        assert row["joined by the engine"].loss == 0


def test_deepspeeds_buffer() -> None:
    kind = "engine's buffers"
    for engine in ("zero2", "zero3"):
        assert made(engine)[kind][1:4] == (4 * HIDDEN**2,) * 3
        assert made(engine, bf16=True)[kind][1:4] == (2 * HIDDEN**2,) * 3
        assert made(engine, reduce_bucket_size=1000)[kind][1:4] == (4000,) * 3
    assert made("fsdp2", reduce_bucket_size=1000)[kind][1:4] == (0, 0, 0)


def test_activations_of_parts() -> None:
    kept = Activations((10, 4), {"a": (8, 2), "b": (6, 0)}, {"a": 1, "b": 2})
    assert kept.total() == 24
    assert kept.total(parts=2) == (4 + 3) + (2 + 3) + 3
    assert kept.total(checkpointing=True, parts=2) == (4 + 3) + (1 + 2) + (2 + 3)
    planner = Planner(CONFIG, None, PlanSettings(**TWO))
    found = planner.activations("tp")
    assert isinstance(found, Activations)
    assert rows(planner.plan("tp"))["activations"].loss == found.total(parts=2) < found.total()
    assert rows(planner.plan("ddp"))["activations"].loss == found.total()


def test_tensor_parallelism_of_adapters_and_of_biases() -> None:
    plain, lora = (ModelSizes(CONFIG, torch.float32, rank) for rank in (None, 3))
    axes = {p.name.replace(".base_layer", ""): p.axis for p in lora.parameters}
    assert {p.name: p.axis for p in plain.parameters}.items() <= axes.items()
    assert {axis for name, axis in axes.items() if "lora_" in name} == {None}
    biased = ModelSizes(models.phi().config, torch.float32)
    of_name = {p.name.partition(".layers.0.")[2]: p.axis for p in biased.parameters}
    assert of_name["self_attn.q_proj.bias"] == 0
    assert of_name["self_attn.dense.weight"] == -1
    assert of_name["self_attn.dense.bias"] is None  # added once, to the sum


def test_scored_tokens_are_all_but_the_first_of_each_row() -> None:
    assert PlanSettings(batch_size=3, length=10).tokens == 27
    assert PlanSettings(batch_size=3, length=10, scored_tokens=5).tokens == 5


def test_the_first_engine_to_fit_is_the_simplest() -> None:
    plans, _ = plan_all(Planner(CONFIG, None, PlanSettings(**TWO)))
    needs = {x.engine: x.needs for x in plans}
    assert needs["fsdp2"] < needs["zero2"] < needs["ddp"]
    for name, memory in needs.items():
        fits = first_that_fits(plans, memory)
        assert fits is not None
        assert fits.engine == next(x for x, y in needs.items() if y <= memory), name
    assert first_that_fits(plans, min(needs.values()) - 1) is None


def test_a_device_is_not_planned_to_the_brim(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CONFIG.save_pretrained(tmp_path)
    needs = planned(CONFIG, length=32).needs
    for share, said in ((0.95, "nothing fits: one needs least"), (0.85, "take one: ")):
        given = ["plan", str(tmp_path), "--length", "32", "--memory", str(needs / share / 2**30)]
        assert main(given) == 0
        assert said in capsys.readouterr().out
