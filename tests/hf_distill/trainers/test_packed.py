"""Distilling on packed rows: loss, gradients and weights are those of padded rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DataCollatorWithFlattening,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from hf_distill import DistillConfig, DistillTrainer, HintCollator, OPSDConfig, OPSDTrainer
from hf_distill.cache import CachedTeacher, TopK, cache_teacher
from hf_distill.data import Side, sides, student_side, teacher_side
from hf_distill.models.forward import Reader
from hf_distill.teachers import ModelTeacher, RoutedTeacher
from tests.hf_distill.models import numbering
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.test_padding import error

TOLERANCE = 3e-6  # of the largest gradient, and of the loss; measured: at most 6e-7
ROWS = models.rows(6)
for each in ROWS[::2]:  # reasoning that no token ends
    each["input_ids"][1] = models.WORDS.index("think")
    each["labels"][1] = -100
PLAIN = [{name: row[name] for name in ("input_ids", "labels")} for row in ROWS]
KERNELS = {"return_flash_attn_kwargs": True, "return_seq_idx": True}


def mixtral(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = MixtralConfig(**models.SIZES, num_local_experts=4, output_router_logits=True)
    return models._spread(MixtralForCausalLM(config))


def mistral(seed: int = 0) -> nn.Module:
    """Its window is shorter than most rows."""
    torch.manual_seed(seed)
    return models._spread(MistralForCausalLM(MistralConfig(**models.SIZES, sliding_window=3)))


FAMILIES: dict[str, Callable[[int], Any]] = models.FAMILIES | {
    "mixtral": mixtral,
    "mistral": mistral,
}


def trainer(folder: Path, family: str, collator: Any, **changes: Any) -> DistillTrainer:
    options = {"alpha": 0.6, "temperature": 2.0} | changes
    kind, rows = options.pop("attention", "sdpa"), options.pop("rows", ROWS)
    routes = options.pop("routes", False)
    student, teacher = (FAMILIES[family](seed) for seed in (0, 1))
    student.set_attn_implementation(kind)
    if routes:
        teachers = {"one": ModelTeacher(teacher), "other": ModelTeacher(FAMILIES[family](2))}
        teacher = RoutedTeacher(teachers, "teacher")
        rows = [row | {"teacher": ("one", "other")[i % 2]} for i, row in enumerate(rows)]
    args = DistillConfig(**models.options(folder, **options))
    return DistillTrainer(student, args, collator, rows, rows, models.tokenizer(), teacher=teacher)


def gradients(run: DistillTrainer) -> dict[str, Tensor]:
    """The loss of a step's micro-batches as training has it, and its gradients, by name."""
    loss = torch.zeros(())
    batches, count = run.get_batch_samples(iter(run.get_train_dataloader()), 2, run.args.device)
    for batch in batches:
        part = run.compute_loss(run.model, batch, num_items_in_batch=count)
        part.backward()
        loss += part.detach()
    named = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    return named | {"loss": loss}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention": "eager"}),
        ("llama", {"attention": "packed_sdpa"}),
        ("mistral", {"attention": "packed_sdpa"}),
        ("llama", {"label_smoothing_factor": 0.1}),  # reads whole logits
        ("llama", {"hidden_layers": "uniform", "hidden_weight": 0.5}),
        ("llama", {"token_weights": {"reasoning": 3.0, "markers": ["think", "done"]}}),
        ("llama", {"token_weights": {"position": "late", "skip_first": 1, "drift": 0.7}}),
        ("llama", {"routes": True}),
        ("mistral", {}),
        ("gemma2", {"attention": "eager"}),
        ("gpt2", {}),
        ("mixtral", {}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x)),
)
def test_a_step_is_that_of_padded_rows(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    want = gradients(trainer(tmp_path, family, models.Pad(), **changes))
    packed = DataCollatorWithFlattening(**(KERNELS if family == "gpt2" else {}))
    found = error(gradients(trainer(tmp_path, family, packed, **changes)), want)
    print(f"error {found:.1e}")
    assert found <= TOLERANCE


@pytest.mark.parametrize("written_packed", [False, True])
def test_a_cache_serves_padded_and_packed_rows(tmp_path: Path, written_packed: bool) -> None:
    flat, rows = DataCollatorWithFlattening(), ROWS[:4]
    whole = TopK(top_k=models.VOCAB, num_exact=models.VOCAB, temperature_range=(1.0, 2.0))
    collator = flat if written_packed else models.Pad()
    cache_teacher(models.llama(1), rows, tmp_path / "cache", codec=whole, data_collator=collator)
    teacher = CachedTeacher(tmp_path / "cache")
    found = []
    for collator in (models.Pad(), flat):
        args = DistillConfig(**models.options(tmp_path, per_device_train_batch_size=3))
        run = DistillTrainer(models.llama(), args, collator, rows, teacher=teacher)
        found.append(gradients(run))  # the second batch is of one row
    assert error(found[1], found[0]) <= TOLERANCE


def test_training_logs_and_evaluates_as_on_padded_rows(tmp_path: Path) -> None:
    runs = [trainer(tmp_path, "llama", x, gradient_accumulation_steps=2, eval_strategy="steps")
            for x in (models.Pad(), DataCollatorWithFlattening())]  # fmt: skip
    for run in runs:
        run.train()
    assert_same_runs(*runs)


def assert_same_runs(*runs: DistillTrainer) -> None:
    assert models.difference(*(models.weights(run.model) for run in runs)) <= 2e-6
    one, other = (run.state.log_history[:-1] for run in runs)
    assert [sorted(x) for x in one] == [sorted(x) for x in other]
    assert any("eval_perplexity" in x for x in one)
    for was, found in zip(one, other, strict=True):
        numbers = {k: v for k, v in was.items() if not k.endswith(("runtime", "per_second"))}
        assert {k: found[k] for k in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-6)


def side(rows: list[dict[str, list[int]]], **changes: Any) -> Side:
    return student_side(DataCollatorWithFlattening(**changes)(rows))


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("llama", "packed_sdpa"),
        ("mistral", "sdpa"),
        ("gemma2", "eager"),
    ],
)
def test_no_other_row_hears_a_change(family: str, attention: str) -> None:
    model = FAMILIES[family](0)
    model.set_attn_implementation(attention)
    reader, rows = Reader("student", "logits"), [dict(row) for row in PLAIN[:3]]
    before = reader.logits(model, side(rows))
    changed = [3 + (i + 1) % 50 for i in rows[1]["input_ids"]]
    rows[1] = {"input_ids": changed, "labels": rows[1]["labels"]}
    after = reader.logits(model, side(rows))
    counts = [sum(x != -100 for x in row["labels"][1:]) for row in rows]
    ends = torch.tensor(counts).cumsum(0)
    assert torch.equal(before[: ends[0]], after[: ends[0]])
    assert torch.equal(before[ends[1] :], after[ends[1] :])
    assert ((before - after)[ends[0] : ends[1]].abs().amax(-1) > 0).all()


def hinted(folder: Path, packing: bool, **changes: Any) -> OPSDTrainer:
    options = {"on_policy": False, "alpha": 0.7} | changes
    how = {"hint_dropout": options.pop("hint_dropout", 0.0), "packing": packing}
    taught, adapted = options.pop("taught", None), options.pop("adapted", False)
    collator = HintCollator(models.tokenizer(), **how)
    model, rows = models.llama(), models.problems(12)
    return OPSDTrainer(
        models.lora(model) if adapted else model,
        OPSDConfig(**models.options(folder, **options)),
        collator,
        rows,
        rows,
        collator.tokenizer,
        teacher=taught and models.gpt2(1),
    )


HINTED: list[dict[str, Any]] = [
    {"taught": True},
    {"teacher": "base", "adapted": True},
    {"teacher": "ema", "divergence": "jsd", "label_smoothing_factor": 0.1},
    {"teacher": "base", "hint_dropout": 0.5},
]


@pytest.mark.filterwarnings(models.PEFT_WARNING)
@pytest.mark.parametrize("changes", HINTED, ids=lambda x: "-".join(x))
def test_a_hinted_step_is_that_of_padded_rows(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = [gradients(hinted(tmp_path, packing, **changes)) for packing in (False, True)]
    print(f"error {error(found[1], found[0]):.1e}")
    assert error(found[1], found[0]) <= TOLERANCE


def test_hinted_training_logs_and_evaluates_as_on_padded_rows(tmp_path: Path) -> None:
    changes = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "teacher": "ema"}
    runs = [hinted(tmp_path, packing, **changes) for packing in (False, True)]
    for run in runs:
        run.train()
    assert_same_runs(*runs)


@torch.no_grad()
def test_no_other_row_hears_a_hint() -> None:
    reader, rows = Reader("teacher", "logits"), models.problems(3)
    said = []
    for hint in ("think first", "then done"):
        rows[1]["hint"] = hint
        batch = HintCollator(models.tokenizer(), packing=True)(rows)
        given = teacher_side(batch, student_side(batch))
        assert given.rows is not None
        row = given.rows[sides.places(given.predicts)]
        said.append((row, reader.logits(models.llama(), given)))
    (row, one), (other_row, other) = said
    assert torch.equal(row, other_row)
    assert torch.equal(one[row != 1], other[row != 1])
    assert ((one - other)[row == 1].abs().amax(-1) > 0).all()


def test_packing_of_sampled_completions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got packing=True .* and on_policy=True"):
        hinted(tmp_path, True, on_policy=True)


SEE = "rows of one sequence see each other"


@pytest.mark.parametrize("family", ["opt", "bloom", "mamba", "roberta", "recurrent gemma"])
def test_models_whose_rows_see_each_other_are_refused(tmp_path: Path, family: str) -> None:
    rows = [{"input_ids": row["input_ids"]} for row in numbering.rows()]
    for whose, kinds in (("teacher", ("llama", family)), ("student", (family, "llama"))):
        student, teacher = (numbering.make(kind) for kind in kinds)
        run = DistillTrainer(
            student, DistillConfig(**models.options(tmp_path)), DataCollatorWithFlattening(), rows,
            teacher=teacher,
        )  # fmt: skip
        with pytest.raises(ValueError, match=f"{whose}: a .* must read packed rows.*{SEE}"):
            run.train()
        alone = DataCollatorWithFlattening()(rows[:1])  # which is no packed row
        if family not in ("bloom", "mamba"):  # their forwards take no positions
            assert run.compute_loss(student, alone).isfinite()


def test_positions_that_are_not_the_models_are_refused() -> None:
    given = side(PLAIN[:2], position_ids_start=2)
    with pytest.raises(ValueError, match=r"must be the model's own \(position_ids_start"):
        Reader("student").look(models.gpt2(), given)
