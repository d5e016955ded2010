"""What the README shows is run, in miniature."""

import dataclasses
import re
from pathlib import Path

import pytest
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

import hf_distill
from helpers import word_problems
from hf_distill import DistillConfig, Hint, HintCollator, OPSDConfig
from metal_ops import available_backends
from metal_ops.spec import KINDS
from tests.hf_distill.trainers import letters, models
from tests.hf_distill.trainers.models import PEFT_WARNING

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
WORDS = {"none": None, "true": True, "false": False}


def replace(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


@pytest.mark.filterwarnings(PEFT_WARNING)
def test_self_distillation_example(tmp_path: Path):
    code, _, weaned, environment, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    tokenizer = word_problems.build_tokenizer()
    word_problems.build_model(tokenizer, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    code = replace(code, '"Qwen/Qwen2.5-0.5B-Instruct"', repr(str(tmp_path / "model")))
    code = replace(code, 'output_dir="out"', f"output_dir={str(tmp_path / 'out')!r}, use_cpu=True")
    code = replace(code, "max_steps=100", "max_steps=2, per_device_train_batch_size=1")
    code = replace(code, "max_completion_length=256", "max_completion_length=4, report_to='none'")
    code = replace(code, "rows = [", "rows = 4 * [")
    names: dict = {}
    exec(code, names)
    assert names["trainer"].state.global_step == 2
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    PeftModel.from_pretrained(base, tmp_path / "out")
    exec(weaned, names)
    for step, few in ((0, True), (500, False)):  # of 80 rows, an expected 0 and 64
        made = names["collator"].at(step, seed=0).contexts(20 * names["rows"])
        assert (made["teacher_hint_dropped"].sum() < 20) == few
    small = "max_steps=2, per_device_train_batch_size=4, max_completion_length=4, report_to='none'"
    settings = f"output_dir={str(tmp_path / 'judged')!r}, use_cpu=True, {small}"
    names |= {"Hint": Hint, "model": names["trainer"].model}
    exec(replace(environment, 'output_dir="out"', settings), names)
    names["trainer"].train()
    assert names["trainer"].state.global_step == 2


def test_offline_example(tmp_path: Path):
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[-1]
    code = code.replace('"cache"', repr(str(tmp_path / "cache")))
    small = f"output_dir={str(tmp_path)!r}, use_cpu=True, max_steps=2, report_to='none'"
    code = replace(code, 'output_dir="out"', small)
    tokenizer = word_problems.build_tokenizer()
    collator = HintCollator(tokenizer, [])
    rows = [{"prompt": f"What is {i} + 1 ?", "completion": f"{i + 1}"} for i in range(8)]
    names = {
        "model": word_problems.build_model(tokenizer, seed=0),
        "student": word_problems.build_model(tokenizer, seed=1),
        "dataset": Dataset.from_list(rows),
        "collator": collator,
    }
    exec(code, names)
    logs = names["trainer"].state.log_history
    assert names["trainer"].state.global_step == 2
    assert logs[-1]["train_loss"] > 0


def test_universal_example(tmp_path: Path):
    lines = re.findall(r"^    (collator = Univ.*|config = .*\"uld\".*)$", README, re.MULTILINE)
    assert len(lines) == 2
    small = f"output_dir={str(tmp_path)!r}, use_cpu=True, max_steps=2, report_to='none'"
    names = {name: getattr(hf_distill, name) for name in ("DistillConfig", "UniversalCollator")}
    names |= {"student_tokenizer": models.tokenizer(), "teacher_tokenizer": letters.letters()}
    exec(replace("\n".join(lines), 'output_dir="out"', small), names)
    trainer = hf_distill.DistillTrainer(
        models.llama(),
        names["config"],
        names["collator"],
        models.problems(),
        processing_class=names["student_tokenizer"],
        teacher=letters.reader(),
    )
    trainer.train()
    assert trainer.state.global_step == 2


def test_changed_lines_of_a_trainer_script():
    diff = re.search(r"```diff\n(.*?)```", README, re.DOTALL).group(1).splitlines()
    removed = [line for line in diff if line.startswith("-")]
    added = [line for line in diff if line.startswith("+")]
    assert len(removed) == len(added) <= 5
    assert issubclass(
        DistillConfig, type(DistillConfig(output_dir="out", report_to="none")).mro()[1]
    )
    assert all(hasattr(hf_distill, name) for name in re.findall(r"Distill\w+", " ".join(added)))


@pytest.mark.parametrize("config", [DistillConfig, OPSDConfig])
def test_documented_fields_and_defaults(config: type):
    """Every field of its own is in a table, and each table row's default is the config's."""
    start = README.index("| field of `DistillConfig`" if config is DistillConfig else "| field |")
    table = README[start:].split("\n\n")[0].splitlines()[2:]
    documented = {}
    for line in table:
        names, default, _ = (cell.strip() for cell in line.strip("|").split("|"))
        for name in re.findall(r"`(\w+)`", names):
            documented[name] = default.strip("`").strip('"')
    own = set(config.__annotations__) - {"remove_unused_columns"}
    if config is OPSDConfig:
        own -= set(DistillConfig.__annotations__)
    assert set(documented) == own
    assert len(own) <= 12
    made = config(output_dir="out", report_to="none")
    for name, default in documented.items():
        if default:
            assert str(getattr(made, name)) == str(WORDS.get(default, default)), name
        else:
            assert dataclasses.is_dataclass(getattr(made, name)), name


def test_documented_groups_and_defaults():
    optional = {"taid": {}, "divergence": "forward_kl"}  # groups that are off by default
    made = OPSDConfig(output_dir="out", report_to="none", **optional)
    expected = {
        f"{name}.{key}": str(value)
        for name in OPSDConfig.__annotations__ | DistillConfig.__annotations__
        if dataclasses.is_dataclass(group := getattr(made, name))
        for key, value in dataclasses.asdict(group).items()
    }
    table = README[README.index("| field of a group") :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    values = {name.strip("`"): value.strip('`"') for name, value, _ in cells}
    assert {name: str(WORDS.get(value, value)) for name, value in values.items()} == expected


def test_table_of_losses():
    section = README.split("## Losses and backends")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \| \S.* \|$", section, re.MULTILINE) == list(KINDS)


def test_backends_that_are_named_exist():
    assert "Metal kernels on Apple GPUs, Triton kernels" in README
    assert list(available_backends()) == ["metal", "triton", "chunked"]
    assert available_backends()["chunked"] is None


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([\w-]+)  ", README)) <= targets


def test_tests_that_are_named_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", README)
    assert len(named) >= 15
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), (path, name)
