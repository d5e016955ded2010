"""A memory plan says what real models, adapters and optimizers hold, from their config alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import BertConfig, GPTNeoXConfig, LlamaConfig, LlamaModel, T5Config
from transformers.optimization import Adafactor

from hf_distill.__main__ import main
from hf_distill.models import forward
from hf_distill.models.structure import causal_lm
from hf_distill.monitoring.activations import Activations, count_activations
from hf_distill.monitoring.memory_plan import ENGINES, Planner
from hf_distill.monitoring.model_sizes import ModelSizes, Parameter, adapted
from hf_distill.monitoring.plan_settings import Plan, PlanSettings
from tests.hf_distill.trainers import experts, models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

FOLDERS = ("student", "teacher", "gpt2", "t5", "bert", "decoder", "neox", "classifier", "empty")
MAKERS = models.FAMILIES | {"moe": experts.moe}


def held(parameters: Any) -> int:
    return sum(p.numel() * p.itemsize for p in parameters)


def rows(plan: Plan) -> dict[str, Any]:
    return {row.kind: row for row in plan.rows}


def planned(config: Any, engine: str = "one", **settings: Any) -> Plan:
    return Planner(config, None, PlanSettings(**settings)).plan(engine)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("family", MAKERS)
def test_parameters_are_those_of_the_model(family: str, rank: int | None) -> None:
    real: nn.Module = MAKERS[family]()
    sizes = ModelSizes(real.config, torch.float32, rank)
    if rank is not None:
        real = adapted(real, rank)
    names = {name: tuple(p.shape) for name, p in causal_lm(real).named_parameters()}
    found = {p.name: p.shape for p in sizes.parameters}
    tied = getattr(real.config, "tie_word_embeddings", False)
    assert sizes.tied == tied
    assert set(names.values()) == set(found.values())
    row = rows(planned(real.config, lora_rank=rank, length=8))
    assert row["student parameters"].step == held(real.parameters())
    trained = [p for p in real.parameters() if p.requires_grad]
    assert row["gradients"].step == held(trained)
    assert row["teacher base"].step == (held(real.parameters()) if rank is None else 0)
    assert sizes.trains_head == (rank is None)
    assert sizes.vocab == models.VOCAB


@pytest.mark.parametrize("optim", ["adamw", "adafactor", "sgd"])
def test_states_are_those_of_the_optimizer(optim: str) -> None:
    model = models.phi()  # has biases
    given = [p for p in model.parameters() if p.requires_grad]
    made = {
        "adamw": lambda: torch.optim.AdamW(given),
        "adafactor": lambda: Adafactor(given, lr=1e-3, relative_step=False, scale_parameter=False),
        "sgd": lambda: torch.optim.SGD(given, lr=1e-3),
    }[optim]()
    for p in given:
        p.grad = torch.zeros_like(p)
    made.step()
    states = [x for s in made.state.values() for x in s.values() if isinstance(x, torch.Tensor)]
    large = held(x for x in states if x.numel() > 1)
    assert (large > 0) == (optim != "sgd")
    assert rows(planned(model.config, optim=optim, length=8))["optimizer states"].step == large


def test_dtypes_of_mixed_precision() -> None:
    config = models.llama().config
    count = sum(p.numel for p in ModelSizes(config, torch.float32).parameters)
    given = {"bf16": True, "devices": 2, "length": 8, "teacher": "live"}
    ddp, zero2 = (rows(planned(config, engine, **given)) for engine in ("ddp", "zero2"))
    assert ddp["student parameters"].step == 4 * count
    assert ddp["gradients"].loss == 4 * count  # DDP's buckets
    assert zero2["student parameters"].step == 2 * count
    assert zero2["optimizer states"].step == pytest.approx(3 * 4 * count / 2, rel=1e-3)
    fsdp2, zero3 = (rows(planned(config, engine, **given)) for engine in ("fsdp2", "zero3"))
    assert fsdp2["student parameters"].step == pytest.approx(4 * count / 2, rel=0.01)
    assert zero3["student parameters"].step == pytest.approx(2 * count / 2, rel=1e-3)
    ema = rows(planned(config, "ddp", **given | {"teacher": "ema", "dtype": "bfloat16"}))
    assert ema["teacher ema"].step == 4 * count


def test_pieces_are_as_large_as_the_largest() -> None:
    p = Parameter("x", (7, 5), 4, True, "rest", -1)
    assert p.cut(3, 0) == 15
    assert p.cut(2, -1) == 21
    assert Parameter("x", (), 4, True, "rest", None).cut(2, 0) == 1


def test_what_tensor_parallelism_cuts() -> None:
    sizes = ModelSizes(models.llama().config, torch.float32)
    layer = {p.name.removeprefix("model.layers.0."): p.axis for p in sizes.parameters}
    assert layer["self_attn.q_proj.weight"] == layer["lm_head.weight"] == -2
    assert layer["self_attn.o_proj.weight"] == -1
    assert layer["model.embed_tokens.weight"] == 0
    assert layer["input_layernorm.weight"] is None


def saved_by_hand(model: nn.Module, batch: int, length: int) -> int:
    """What a real forward keeps, counted by its storages."""
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    ids = torch.ones(batch, length, dtype=torch.long)
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool)
    known |= {ids.data_ptr(), mask.data_ptr()}
    with saved_tensors_hooks(pack, lambda x: x):
        causal_lm(model.train()).base_model(ids, attention_mask=mask, use_cache=False)
    return sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in known)


def test_activations_of_adapted_experts_are_not_known() -> None:
    """PEFT asks torch for autocast on the meta device, which has none."""
    sizes = ModelSizes(experts.moe().config, torch.float32, 3)
    found = count_activations(sizes.model, sizes.blocks, 1, 8)
    assert isinstance(found, str)
    assert found.startswith("RuntimeError")


@pytest.mark.parametrize(
    ("family", "rank"), [("llama", None), ("llama", 3), ("gpt2", None), ("gpt2", 3), ("moe", None)]
)
def test_activations_are_those_of_a_real_forward(family: str, rank: int | None) -> None:
    real: nn.Module = MAKERS[family]()
    sizes = ModelSizes(real.config, torch.float32, rank)
    real = real if rank is None else adapted(real, rank)
    found = count_activations(sizes.model, sizes.blocks, 3, 40)
    assert isinstance(found, Activations)
    # 0.985 to 0.992 of it, measured with these: a CPU's kernel keeps a little more
    assert found.total() == pytest.approx(saved_by_hand(real, 3, 40), rel=0.02)
    assert sum(found.inputs.values()) == 2 * 3 * 40 * models.SIZES["hidden_size"] * 4
    kept = found.outside[0] + sum(found.inputs.values()) + found.largest()
    assert found.total(checkpointing=True) == kept < found.total()


def test_autocast_keeps_products_in_16_bits() -> None:
    config = models.llama().config
    sizes = ModelSizes(config, torch.float32)
    plain, rounded = (count_activations(sizes.model, sizes.blocks, 8, 60, x) for x in (False, True))
    assert isinstance(plain, Activations)
    assert isinstance(rounded, Activations)
    assert 0.5 * plain.total() < rounded.total() < 0.95 * plain.total()


def test_a_model_that_needs_values_has_no_activations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def look(self: Any, input_ids: torch.Tensor, **_: Any) -> Any:
        return input_ids.sum().item()

    monkeypatch.setattr(LlamaModel, "forward", look)
    models.llama().config.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--engine", "one", "--length", "8"]) == 0
    printed = capsys.readouterr().out
    assert "without activations, which cannot be counted: RuntimeError: Tensor.item()" in printed


def test_few_tokens_are_read_by_logits_as_in_the_trainer() -> None:
    config = models.llama().config
    for engine, kind in (("fsdp2", "FSDP"), ("zero3", "ZeRO")):
        limit = config.hidden_size * forward.HEAD_COPIES[kind] / forward.LOGITS_COPIES
        for tokens, by_logits in ((int(limit) - 1, True), (int(limit) + 1, False)):
            given = {"devices": 2, "batch_size": 2, "length": 60, "scored_tokens": tokens}
            assert planned(config, engine, **given).by_logits is by_logits
            assert planned(config, engine, **given, lora_rank=2).by_logits is False
    assert not planned(config, "ddp", devices=2, length=4).by_logits


def test_the_loss_of_a_larger_vocabulary_and_of_more_tokens() -> None:
    config = LlamaConfig(**models.SIZES | {"vocab_size": 4096, "hidden_size": 64})
    gradient = 4096 * 64 * 4
    loss = rows(planned(config, length=64, device="cpu"))["loss"]
    assert loss.backward == pytest.approx(gradient, rel=0.05)
    chunk = 2 * 63 * 4096 * 4  # student and teacher
    assert loss.loss > gradient + chunk
    assert rows(planned(config, length=64, device="cpu", lora_rank=2))["loss"].loss > chunk
    more = rows(planned(config, length=64, batch_size=2, device="cpu"))["loss"]
    assert more.loss - loss.loss > 0.9 * chunk


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Configs, without weights."""
    made = tmp_path_factory.mktemp("configs")
    wide = LlamaConfig(**models.SIZES | {"hidden_size": 64, "vocab_size": 4096})
    for name, config in {"student": models.llama().config, "teacher": wide}.items():
        config.save_pretrained(made / name)
    models.gpt2().config.save_pretrained(made / "gpt2")
    T5Config().save_pretrained(made / "t5")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"vocab_size": 64, "num_hidden_layers": 1}
    BertConfig(**sizes).save_pretrained(made / "bert")
    BertConfig(**sizes, is_decoder=True).save_pretrained(made / "decoder")
    GPTNeoXConfig(**sizes).save_pretrained(made / "neox")
    of_classes = models.llama().config
    of_classes.architectures = ["LlamaForSequenceClassification"]
    of_classes.save_pretrained(made / "classifier")
    (made / "empty").mkdir()
    return {name: str(made / name) for name in FOLDERS}


def test_the_command_prints_one_engine_and_all(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="hf_distill")
    given = ["plan", folders["student"], folders["teacher"], "--devices", "2", "--length", "32"]
    assert main([*given, "--engine", "fsdp2"]) == 0
    printed = capsys.readouterr().out
    assert "| activations (estimate) |" in printed
    assert "GiB per device, at the loss; the student is read by its hidden states" in printed
    assert caplog.text.count("assumed: student 0.02 M parameters in float32") == 1
    assert main([*given, "--memory", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| GiB per device when it needs most |")
    assert [x.split()[1] for x in lines[2:7]] == ["ddp", "zero2", "fsdp2", "zero3", "tp"]
    assert lines[-1].startswith("take ddp: 0.0")
    assert lines[-1].endswith("GiB is within 90% of 1 GiB")
    assert main([*given, "--memory", "0.001"]) == 0
    assert "nothing fits: " in capsys.readouterr().out


def test_the_command_remarks_on_what_can_hardly_be_meant(
    folders: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    student, teacher = folders["student"], folders["teacher"]
    limit, vocab = models.llama().config.max_position_embeddings, models.llama().config.vocab_size
    assert main(["plan", student, "--engine", "one", "--length", str(limit)]) == 0
    assert not [x for x in caplog.records if x.levelname == "WARNING"]
    assert main(["plan", student, teacher, "--engine", "one", "--length", str(limit + 1)]) == 0
    found = [x.getMessage() for x in caplog.records if x.levelname == "WARNING"]
    assert [x.split(":")[0] for x in found] == [
        f"rows of {limit + 1} tokens are longer than the {limit} of the student's "
        "max_position_embeddings",
        f"rows of {limit + 1} tokens are longer than the {limit} of the teacher's "
        "max_position_embeddings",
        f"the student's head has {vocab} entries and the teacher's 4096",
    ]


def test_json(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", folders["student"], "--devices", "4", "--length", "32", "--json"]
    assert main([*given, "--memory", "80"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [plan["engine"] for plan in found["plans"]] == ["ddp", "zero2", "fsdp2", "zero3"]
    assert found["refused"] == {
        "tp": "num_key_value_heads must be a multiple of the devices under tp, got 2 for 4"
    }
    assert found["fits"] == "ddp"
    for plan in found["plans"]:
        sums = {x: sum(row[x] for row in plan["rows"].values()) for x in plan["moments"]}
        assert sums == plan["moments"]
        assert plan["needs"] == max(sums.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["nowhere/at-all"],
            "must be a folder with config.json or a name of the hub, got 'nowhere",
        ),
        (["{empty}"], "a model's folder must have a config.json, got '"),
        (["{student}", "--devices", "0"], "devices must be at least 1, got 0"),
        (["{student}", "--length", "1"], "length must be at least 2, got 1"),
        (["{student}", "--lora_rank", "0"], "lora_rank must be at least 1, got 0"),
        (
            ["{student}", "--length", "8", "--scored_tokens", "8"],
            r"scored_tokens must be in \[1, 7\]",
        ),
        (["{student}", "--engine", "one", "--devices", "2"], "engine one has 1 device, got 2"),
        (
            ["{student}", "--engine", "tp", "--devices", "3"],
            "num_attention_heads must be a multiple",
        ),
        (["{gpt2}", "--engine", "tp", "--devices", "2"], "gpt2 has no tensor parallel plan"),
        (["{student}", "{teacher}", "--teacher", "ema"], "is another model or the student itself"),
        (["{student}", "--teacher", "lora_scale"], "teacher lora_scale needs adapters"),
        (["{student}", "--memory", "0"], "memory must be above 0 GiB, got 0"),
        (
            ["{student}", "--reduce_bucket_size", "0"],
            "reduce_bucket_size must be at least 1, got 0",
        ),
        (
            ["{student}", "--teacher_dtype", "bfloat16"],
            "teacher_dtype needs another model as teacher, .* got 'bfloat16' and teacher base",
        ),
        (
            ["{student}", "--devices", "2", "--engine", "zero3", "--shard_loss"],
            "shard_loss needs engine fsdp2, got zero3",
        ),
        (["{t5}"], "a plan needs a causal language model, got model type 't5'"),
        (["{bert}"], "'bert' with is_decoder=False, which reads later tokens"),
        (["{student}", "{bert}"], "'bert' with is_decoder=False, which reads later tokens"),
        (["{classifier}"], "causal language model, got LlamaForSequenceClassification"),
    ],
)
def test_what_cannot_be_is_an_error(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    given = [word.format(**folders) for word in words]
    assert main(["plan", *given]) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(capsys.readouterr().err)


@pytest.mark.parametrize("name", ["decoder", "neox"])
def test_decoders_are_planned(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["plan", folders[name], "--length", "16"]) == 0
    assert "| one | " in capsys.readouterr().out


def test_every_engine_has_a_plan() -> None:
    config = models.llama().config
    planner = Planner(config, None, PlanSettings(devices=2, length=8))
    assert [x for x in ENGINES if planner.refusal(x)] == ["one"]
    with pytest.raises(ValueError, match="a model as teacher needs its config, and a self-teacher"):
        Planner(config, config, PlanSettings())
    with pytest.raises(ValueError, match="optim must be one of"):
        PlanSettings(optim="lion")
