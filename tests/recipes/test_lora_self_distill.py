"""A LoRA adapter in miniature: both arms from one adapter, accuracies, what is forgotten."""

import contextlib
import io
import itertools
import json
import sys
from pathlib import Path
from typing import NamedTuple

import lora_self_distill
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import math_tasks, word_problems
from helpers.accuracy import Accuracy, measure
from helpers.warm_up import fit
from hf_distill import HintCollator
from hf_distill.data.sides import student_side
from tests.hf_distill.trainers.models import PEFT_WARNING

pytestmark = pytest.mark.filterwarnings(PEFT_WARNING)

ROOT = Path(lora_self_distill.__file__).parent.parent
FEW = [
    "--num_eval", 4, "--num_other", 3, "--max_completion_length", 6, "--max_steps", 12,
    "--per_device_train_batch_size", 4, "--learning_rate", 0.003, "--warmup_steps", 0,
    "--disable_tqdm", "true", "--use_cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems with the answer 7, and a held-out one of four with the answer 5."""
    folder = tmp_path_factory.mktemp("seven")
    for split, answers in (("train", [7] * 24), ("test", [7, 7, 5, 7])):
        rows = [
            {"question": f"Tom has {i} coins .", "answer": f"#### {answer}"}
            for i, answer in enumerate(answers)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, seven: Path) -> Path:
    """A model that answers 5 to everything, as a folder."""
    tokenizer = word_problems.build_tokenizer()
    model = word_problems.build_model(tokenizer, seed=0)
    collator = HintCollator(tokenizer, [])
    batches = [
        collator([{**row, "completion": "#### 5"}]) for row in math_tasks.gsm8k(str(seven), 4).train
    ]
    examples = [(x["input_ids"][0].tolist(), x["labels"][0].tolist()) for x in batches]
    given = {"steps": 24, "batch_size": 4, "pad_token_id": collator.pad_token_id}
    fit(model, itertools.cycle(examples), **given, progress=False)
    folder = tmp_path_factory.mktemp("base") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(base: Path, seven: Path):
    """Runs the recipe on the tiny model and rows."""

    def call(out: Path, *arguments: object) -> dict:
        given = ["--model_name_or_path", base, "--dataset", seven, "--output_dir", out]
        given = ["lora_self_distill.py", *given, *FEW, *arguments]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(word) for word in given])
            lora_self_distill.main()
        return json.loads((out / "results.json").read_text())

    return call


class Both(NamedTuple):
    """A run of both arms: its folder, results and output, the adapters and rows of the arms."""

    out: Path
    found: dict
    printed: str
    starts: list[dict[str, torch.Tensor]]
    rows: dict[str, list[list[str]]]


@pytest.fixture(scope="module")
def both(run, tmp_path_factory: pytest.TempPathFactory, gsm8k: Path) -> Both:
    starts, rows, printed = [], {"self": [], "sft": []}, io.StringIO()
    original = lora_self_distill.Start._trainer

    def spy(self, name, track):
        starts.append({k: v.clone() for k, v in self.model.state_dict().items() if "lora_" in k})
        trainer = original(self, name, track)
        collate = trainer.data_collator

        def collator(batch):
            rows[name].append([row["prompt"][0]["content"] for row in batch])
            return collate(batch)

        trainer.data_collator = collator
        return trainer

    out = tmp_path_factory.mktemp("both")
    config = ["--config", ROOT / "recipes" / "lora_self_distill.yaml", "--seeds", 2]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(lora_self_distill.Start, "_trainer", spy)
        found = run(out, *config, "--other_dataset", gsm8k)["2"]
    return Both(out, found, printed.getvalue(), starts, rows)


def test_arms_share_adapter_rows_and_steps(both: Both):
    assert list(both.found) == ["base", "self", "sft"]
    own, control = both.starts
    assert own.keys() == control.keys()
    assert all(own[name].equal(control[name]) for name in own)
    assert max(float(x.abs().max()) for name, x in own.items() if "lora_A" in name) > 0
    assert both.rows["self"][:12] == both.rows["sft"][:12]
    for name in ("self", "sft"):
        assert [log["step"] for log in both.found[name]["log_history"]] == list(range(1, 13))
        assert both.found[name]["settings"]["lora_alpha"] == 32  # of the YAML file
        assert both.found[name]["settings"]["rollout"]["temperature"] == 1.0
    assert all("completion_length" in log for log in both.found["self"]["log_history"])
    assert not any("soft" in log for log in both.found["sft"]["log_history"])


def test_what_is_measured_before_and_after(both: Both, base: Path):
    before, distilled, supervised = both.found.values()
    assert before["unaided"]["right"] == 1  # of 4: those with the answer 5
    assert supervised["unaided"]["right"] == 3  # those with the answer 7
    assert before["unaided"]["ended"] == supervised["unaided"]["ended"] == 1.0
    assert before["other"]["kl"] == pytest.approx(0, abs=1e-6)
    assert distilled["other"]["kl"] > 1e-5
    assert supervised["other"]["kl"] > 0.1
    size = AutoModelForCausalLM.from_pretrained(base).num_parameters()
    assert before["trained_parameters"] == sum(x.numel() for x in both.starts[0].values())
    assert before["trained_share"] == before["trained_parameters"] / size
    png = (both.out / "lora_self_distill.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) < 100_000


@pytest.mark.parametrize("name", ["self", "sft"])
def test_a_saved_adapter_is_the_one_that_was_measured(
    both: Both, name: str, base: Path, seven: Path, gsm8k: Path
):
    tokenizer = AutoTokenizer.from_pretrained(base)
    task = math_tasks.gsm8k(str(seven), 4)
    model = AutoModelForCausalLM.from_pretrained(base)
    again = PeftModel.from_pretrained(model, both.out / "seed2" / name)
    accuracy = measure(
        again, task, task.test, HintCollator(tokenizer, task.hint), hinted=False,
        max_completion_length=6, batch_size=4, description="",
    )  # fmt: skip
    assert json.loads(json.dumps(accuracy.to_dict())) == both.found[name]["unaided"]
    loss, kl = forgotten(again, gsm8k, tokenizer)
    assert both.found[name]["other"]["loss"] == pytest.approx(loss, rel=1e-4)
    assert both.found[name]["other"]["kl"] == pytest.approx(kl, rel=1e-3)


def test_what_is_printed(both: Both):
    before, _, supervised = both.found.values()
    hinted = str(Accuracy.from_dict(before["hinted"])).strip()
    line = f"seed 2: base with the hint {hinted}; trained {before['trained_share']:.2%} of the base"
    assert line in both.printed.splitlines()
    rows = [line for line in both.printed.splitlines() if line.startswith("| 2    | sft")]
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert cells[2:4] == ["75.0% (3/4, 95 % 30.1% to 95.4%)", "100.0%"]
    assert cells[4:6] == [f"{supervised['other']['loss']:.4f}", f"{supervised['other']['kl']:.3g}"]


def forgotten(model: PeftModel, folder: Path, tokenizer) -> tuple[float, float]:
    """Cross-entropy and KL(base || model) per token of the first rows, a row at a time."""
    collator, totals = HintCollator(tokenizer, []), [0.0, 0.0, 0]
    for row in math_tasks.gsm8k(str(folder), 3).test:
        batch = collator([row])
        side = student_side(batch)
        model.eval()
        with torch.no_grad():
            q = model(**side.inputs).logits[side.predicts].double().log_softmax(-1)
            with model.disable_adapter():
                p = model(**side.inputs).logits[side.predicts].double().log_softmax(-1)
        labels = batch["labels"][batch["labels"] != -100]
        totals[0] -= float(q[range(len(q)), labels].sum())
        totals[1] += float((p.exp() * (p - q)).sum())
        totals[2] += len(labels)
    return totals[0] / totals[2], totals[1] / totals[2]


def test_finished_arms_are_kept_and_curves_follow_training(run, tmp_path: Path, monkeypatch):
    out = tmp_path / "out"
    given = ["--max_steps", 4, "--accuracy_steps", 2, "--arms", "sft"]
    first = run(out, *given, "--seeds", 0)
    assert [step for step, _ in first["0"]["sft"]["unaided_during"]] == [2]
    assert first["0"]["sft"]["other"] is None  # without another data set nothing is compared
    made = []
    original = lora_self_distill.Start.train

    def spy(self, name):
        made.append((self.config.seed, name))
        return original(self, name)

    monkeypatch.setattr(lora_self_distill.Start, "train", spy)
    second = run(out, *given, "--seeds", 0, 1)
    assert made == [(1, "sft")]
    assert second["0"] == first["0"]
    assert second["1"]["sft"]["log_history"] != first["0"]["sft"]["log_history"]
    (out / "lora_self_distill.png").unlink()
    monkeypatch.setattr(lora_self_distill, "Start", None)
    assert run(out, *given, "--seeds", 0, 1) == second
    assert (out / "lora_self_distill.png").is_file()
    with pytest.raises(ValueError, match="is of a run with lora_r 16, not 4"):
        run(out, *given, "--lora_r", 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "ema"], r"arms must be among \['self', 'sft'\], got \['ema'\]"),
        (["--seed", 3], "set seeds, not seed, got 3"),
        (["--use_peft", "false"], "use_peft must be true, got False"),
        (["--num_eval", 0], "num_eval must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_an_error(run, tmp_path: Path, arguments: list, message: str):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", *arguments)


def test_the_other_task_may_be_arithmetic(run, tmp_path: Path):
    given = ["--max_steps", 1, "--arms", "sft", "--other_dataset", "arithmetic"]
    found = run(tmp_path / "out", *given)
    assert found["0"]["base"]["other"]["loss"] > 3
    settings = found["0"]["sft"]["settings"]
    assert (settings["other_dataset"], settings["num_other"]) == ("arithmetic", 3)


def test_accuracies_come_back_from_json():
    accuracy = Accuracy(3, 7, 2.5, 0.75)
    assert Accuracy.from_dict(json.loads(json.dumps(accuracy.to_dict()))) == accuracy
