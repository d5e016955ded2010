"""Students of a teacher in miniature: what arms share, what they differ in, what is kept."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import distill
import distill_cached
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from helpers import comparison, math_tasks, word_problems
from helpers.heldout import even_batch_size, short_rows
from helpers.students import keep_layers
from hf_distill import CachedTeacher, DistillConfig, HintCollator
from hf_distill.cache import CachedCollator
from hf_distill.data.sides import student_side
from tests.processes import main_of, run_two

ROOT = Path(distill.__file__).parent.parent
FEW = [
    "--num_rows", 12, "--num_eval", 5, "--max_tokens", 40, "--max_steps", 3, "--measure_steps", 2,
    "--warmup_steps", 0, "--logging_steps", 1, "--per_device_train_batch_size", 4,
    "--disable_tqdm", "true", "--use_cpu",
]  # fmt: skip


@pytest.fixture
def run(checkpoint: Path, gsm8k: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a recipe on the tiny model and rows."""

    def call(recipe, out: Path, *arguments: object) -> dict:
        given = ["--teacher_name_or_path", checkpoint, "--dataset", gsm8k, "--output_dir", out]
        given = [recipe.__name__, *given, *FEW, *arguments]
        monkeypatch.setattr(sys, "argv", [str(word) for word in given])
        recipe.main()
        return json.loads((out / "results.json").read_text())

    return call


def shape_of(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 100_000


def test_every_arm_from_one_start(run, tmp_path: Path, capsys):
    out = tmp_path / "out"
    found = run(distill, out, "--config", ROOT / "recipes" / "distill.yaml", "--seeds", 1)
    arms = {name: seeds["1"] for name, seeds in found["arms"].items()}
    assert list(arms) == ["sft", "kd", "hidden", "hidden_mse", "cache", "taid"]
    starts = {tuple(arm["heldout"][0]) for arm in arms.values()}
    assert len(starts) == 1
    assert all([point[0] for point in arm["heldout"]] == [0, 2, 3] for arm in arms.values())
    ends = {name: arm["heldout"][-1] for name, arm in arms.items()}
    assert len({tuple(end) for end in ends.values()}) == len(arms)
    assert all(end[1] < next(iter(starts))[1] for end in ends.values())  # all learn the text
    assert ends["cache"][2] == pytest.approx(ends["kd"][2], rel=0.02)
    for name, arm in arms.items():
        logs = arm["log_history"]
        assert [log["step"] for log in logs] == [1, 2, 3]
        assert all(("soft" in log) == (name != "sft") for log in logs)
        assert all(("hidden" in log) == name.startswith("hidden") for log in logs)
        assert all(("taid_t" in log) == (name == "taid") for log in logs)
        assert arm["settings"]["learning_rate"] == 1e-3  # of the YAML file
        assert arm["settings"]["lr_scheduler_type"] == "cosine"
        own = json.loads((out / "seed1" / name / "results.json").read_text())
        assert own == arm
        assert not (out / "seed1" / name / "model.safetensors").exists()
    shape_of(out / "distill.png")
    printed = capsys.readouterr().out
    loss, kl = ends["taid"][1:]
    assert f"seed 1 taid: step 3, held-out loss {loss:.4f}, KL {kl:.4f}" in printed
    row = next(line for line in printed.splitlines() if line.startswith("| taid"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["taid", f"{loss:.4f}", f"{loss:.4f}", f"{kl:.4f}", f"{kl:.4f}"]


def test_the_control_is_a_plain_trainer_and_the_measures_are_their_definitions(
    run, tmp_path: Path, checkpoint: Path, gsm8k: Path
):
    out = tmp_path / "out"
    found = run(distill, out, "--arms", "sft", "--save_students", "--seeds", 3)["arms"]["sft"]["3"]
    teacher = AutoModelForCausalLM.from_pretrained(checkpoint)
    collator = HintCollator(AutoTokenizer.from_pretrained(checkpoint), [])
    task = math_tasks.gsm8k(str(gsm8k), 100)
    train, test = task.train[:12], task.test[:5]
    args = TrainingArguments(
        str(tmp_path / "plain"), max_steps=3, warmup_steps=0, logging_steps=1, seed=3,
        per_device_train_batch_size=4, per_device_eval_batch_size=5, disable_tqdm=True,
        use_cpu=True, report_to="none", save_strategy="no", remove_unused_columns=False,
        dataloader_pin_memory=False,
    )  # fmt: skip

    def rows(batch):
        made = collator(batch)
        return {k: made[k] for k in ("input_ids", "attention_mask", "labels")}

    plain = Trainer(keep_layers(teacher, 3), args, rows, train, test)
    before = plain.evaluate()["eval_loss"]
    plain.train()
    losses = [log["loss"] for log in plain.state.log_history if "loss" in log]
    assert [log["loss"] for log in found["log_history"]] == pytest.approx(losses, rel=1e-6)
    assert found["seconds"] > 0
    assert abs(losses[0] - losses[-1]) > 1e-3
    assert found["heldout"][0][1] == pytest.approx(before, rel=1e-6)
    assert found["heldout"][-1][1] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)

    student = AutoModelForCausalLM.from_pretrained(out / "seed3" / "sft").eval()
    total, count = 0.0, 0
    for row in test:
        side = student_side(collator([row]))
        with torch.no_grad():
            p, q = (m(**side.inputs).logits[side.predicts] for m in (teacher.eval(), student))
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total, count = total + float((p.exp() * (p - q)).sum()), count + len(p)
    assert found["heldout"][-1][2] == pytest.approx(total / count, rel=1e-4)
    assert found["heldout"][0][2] != pytest.approx(total / count, rel=1e-2)


def test_finished_arms_are_kept_and_others_trained(run, tmp_path: Path, monkeypatch):
    out = tmp_path / "out"
    first = run(distill, out, "--arms", "sft", "kd", "--seeds", 0, 1)
    kept = out / "seed0" / "kd" / "results.json"
    marked = json.loads(kept.read_text()) | {"seconds": 1234.0}
    del marked["settings"]  # results without them are taken as they are
    kept.write_text(json.dumps(marked))
    (out / "seed1" / "sft" / "results.json").unlink()
    (out / "distill.png").unlink()
    trained = []

    class Spy(comparison.DistillTrainer):
        def train(self):
            trained.append((Path(self.args.output_dir).parts[-2:], self.args.alpha, self.args.seed))
            return super().train()

    monkeypatch.setattr(comparison, "DistillTrainer", Spy)
    second = run(distill, out, "--arms", "sft", "kd", "--seeds", 0, 1)
    assert trained == [(("seed1", "sft"), 0.0, 1)]
    assert second["arms"]["kd"]["0"] == marked
    assert second["arms"]["sft"]["1"]["heldout"] == first["arms"]["sft"]["1"]["heldout"]
    assert second["arms"]["sft"]["0"] == first["arms"]["sft"]["0"]
    assert second["summary"]["kd"]["seconds"]["seeds"]["0"] == 1234.0

    def refuse(*_: object):
        raise AssertionError("nothing is left to load a model for")

    (out / "distill.png").unlink()
    monkeypatch.setattr(comparison, "load_material", refuse)
    assert run(distill, out, "--arms", "sft", "kd", "--seeds", 0, 1) == second
    shape_of(out / "distill.png")
    with pytest.raises(ValueError, match=r"results.json is of a run with max_steps 3, not 4: rem"):
        run(distill, out, "--arms", "sft", "--max_steps", 4)
    with pytest.raises(ValueError, match=r"is of a run with num_rows 12, not 11"):
        run(distill, out, "--arms", "sft", "--num_rows", 11)


def test_a_student_by_name_with_dropout_is_not_disturbed_by_measuring(
    run, tmp_path: Path, checkpoint: Path
):
    """Its width is another one, so its states are projected."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = word_problems.build_model(tokenizer, seed=0).config
    config.hidden_size, config.num_hidden_layers, config.attention_dropout = 48, 2, 0.3
    config.head_dim = 12
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    given = ["--student_name_or_path", tmp_path / "student", "--arms", "hidden", "--measure_steps"]
    often = run(distill, tmp_path / "often", *given, 1)["arms"]["hidden"]["0"]
    seldom = run(distill, tmp_path / "seldom", *given, 3)["arms"]["hidden"]["0"]
    assert [point[0] for point in often["heldout"]] == [0, 1, 2, 3]
    assert [point[0] for point in seldom["heldout"]] == [0, 3]
    assert often["heldout"][-1] == seldom["heldout"][-1]
    assert often["log_history"][-1]["hidden"] > 0


def test_the_student_of_a_16_bit_teacher_has_32_bits(checkpoint: Path, gsm8k: Path, tmp_path: Path):
    folder = tmp_path / "teacher"
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    given = {"dataset": str(gsm8k), "num_rows": 1, "num_eval": 1, "keep_every": 2}
    made = comparison.load_material(comparison.ComparisonArguments(str(folder), **given))
    assert made.teacher.dtype == torch.bfloat16
    assert made.start.dtype == torch.float32
    assert (len(made.start.model.layers), len(made.teacher.model.layers)) == (2, 3)
    assert (len(made.train), len(made.test)) == (1, 1)


def test_another_tokenizer_is_refused(run, tmp_path: Path, checkpoint: Path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens(["hello"])
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match=r"must share a tokenizer, got those of '.*student' and"):
        run(distill, tmp_path / "out", "--student_name_or_path", tmp_path / "student")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "kd", "sgd"], r"arms must be among \['sft', .*\], got \['sgd'\]"),
        (["--seed", 3], "set seeds, not seed, got 3"),
        (["--resume_from_checkpoint", "true"], "must be None, got 'true'"),
        (["--hidden_layers", "last"], "hidden_layers is what arms differ in .* got 'last'"),
        (["--hidden", '{"loss": "l1"}'], "hidden is what arms differ in"),
        (["--taid", "{}"], "taid is what arms differ in"),
        (["--keep_every", 2, "--student_name_or_path", "x"], "keep_every 2 makes a student"),
        (["--measure_steps", 0], "measure_steps must be at least 1, got 0"),
        (["--num_rows", 31], "31 rows of at most 40 tokens are needed, got 30 of 30"),
        (["--num_eval", 0], "number of rows must be at least 1, got 0"),
        (["--keep_every", 4], r"every must be in \[1, 3\], got 4"),
    ],
)
def test_what_cannot_be_is_an_error(run, tmp_path: Path, arguments: list, message: str):
    with pytest.raises(ValueError, match=message):
        run(distill, tmp_path / "out", *arguments)


def test_rows_are_the_first_that_are_short_enough(gsm8k: Path):
    collator = HintCollator(word_problems.build_tokenizer(), [])
    rows = math_tasks.gsm8k(str(gsm8k), 8).train
    lengths = [collator([row])["input_ids"].shape[1] for row in rows]
    limit = min(lengths)
    short = [row for row, length in zip(rows, lengths, strict=True) if length <= limit]
    assert 0 < len(short) < len(rows)  # numbers have one digit or two
    assert short_rows(rows, collator, len(short), limit) == short
    assert short_rows(rows, collator, 20, max(lengths)) == rows[:20]


def test_no_held_out_row_is_counted_twice():
    assert even_batch_size(5, 1, 8) == 8  # a single process fills nothing up
    assert even_batch_size(6, 2, 8) == 3
    assert even_batch_size(24, 2, 8) == 6
    assert even_batch_size(14, 2, 4) == 1
    with pytest.raises(ValueError, match="a multiple of the 2 processes, got 5"):
        even_batch_size(5, 2, 8)


def test_summary_and_figure_are_means_over_seeds_and_their_range(tmp_path: Path, monkeypatch):
    def result(shift: float) -> dict:
        return {
            "heldout": [[0, 4.0, 3.0], [5, 2.0 + shift, 1.0 + 2 * shift]],
            "seconds": 10 * shift,
        }

    results = {"kd": {0: result(0.0), 4: result(0.25), 7: result(0.5)}}
    found = comparison.summary(results)["kd"]
    assert found["loss"] == {"mean": 2.25, "seeds": {"0": 2.0, "4": 2.25, "7": 2.5}}
    assert found["kl"] == {"mean": 1.5, "seeds": {"0": 1.0, "4": 1.5, "7": 2.0}}
    assert found["seconds"]["mean"] == 2.5
    closed = []
    monkeypatch.setattr(comparison.plt, "close", closed.append)
    comparison.draw(tmp_path / "x.png", results)
    monkeypatch.undo()
    for axis, mean, (low, high) in zip(
        closed[0].axes, ([4.0, 2.25], [3.0, 1.5]), ((2.0, 2.5), (1.0, 2.0)), strict=True
    ):
        (line,), (band,) = axis.lines, axis.collections
        assert line.get_xydata().tolist() == [[0, mean[0]], [5, mean[1]]]
        heights = {y for x, y in band.get_paths()[0].vertices.tolist() if x == 5}
        assert heights == {low, high}
    comparison.plt.close(closed[0])


def test_cached_teachers_and_the_control(run, tmp_path: Path):
    out, config = tmp_path / "out", ROOT / "recipes" / "distill_cached.yaml"
    default = run(distill_cached, out, "--config", config)
    assert list(default["arms"]) == ["sft", "live", "cache", "renorm"]
    arms = run(distill_cached, out, "--config", config, "--arms", *distill_cached.ARMS)["arms"]
    ends = {name: seeds["0"]["heldout"][-1] for name, seeds in arms.items()}
    assert list(ends) == ["sft", "live", "cache", "renorm", "renorm_both"]
    assert len({tuple(seeds["0"]["heldout"][0]) for seeds in arms.values()}) == 1
    assert len({tuple(end) for end in ends.values()}) == len(ends)
    gap = {name: abs(end[2] - ends["live"][2]) for name, end in ends.items()}
    assert gap["cache"] < 0.5 * min(gap["sft"], gap["renorm"])
    assert all("soft" not in log for log in arms["sft"]["0"]["log_history"])
    assert all(log["loss"] == pytest.approx(log["soft"], rel=1e-3)
               for log in arms["live"]["0"]["log_history"])  # alpha 1, temperature 1  # fmt: skip
    assert sorted(path.name for path in out.glob("cache_*")) == ["cache_cache", "cache_renorm"]
    shape_of(out / "distill_cached.png")


def test_renormalised_entries_are_all_there_is(checkpoint: Path, gsm8k: Path, tmp_path: Path):
    teacher = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    collator = HintCollator(AutoTokenizer.from_pretrained(checkpoint), [])
    rows = math_tasks.gsm8k(str(gsm8k), 8).train[:2]
    config = DistillConfig(str(tmp_path), use_cpu=True, report_to="none", temperature=1.0)
    given = {"dataset": str(gsm8k), "num_rows": 2, "num_eval": 2}
    recipe = distill_cached.RecipeArguments(str(checkpoint), **given)
    run = distill_cached.CachedDistillation(recipe, config)
    renormalised = run.teacher("renorm")
    assert isinstance(renormalised, distill_cached.Renormalised)
    plain = CachedTeacher(tmp_path / "cache_renorm", teacher=teacher)
    batch = collator(rows)
    signals = []
    for cached in (plain, renormalised):
        cached.check_spec(config.divergence_spec(), collator.tokenizer)
        side = student_side(CachedCollator(collator, cached)(rows))
        signals.append(cached.signal(teacher, side).sparse)
    whole, alone = signals
    assert len(whole.ids) == int((batch["labels"] != -100).sum())
    torch.testing.assert_close(alone.log_probs.exp().sum(-1), torch.ones(len(alone.ids)))
    kept = whole.log_probs.exp().sum(-1, keepdim=True)
    assert 0 < float(kept.max()) < 0.95  # 50 of 63 entries
    torch.testing.assert_close(alone.log_probs.exp(), whole.log_probs.exp() / kept)
    assert alone.log_tail.tolist() == [-torch.inf] * len(alone.ids)


def test_schedules_and_weights_of_tokens_are_left_to_the_arms_with_a_teacher(run, tmp_path: Path):
    given = ["--arms", "sft", "cache", "--temperature", "linear:3.0->1.0@3"]
    weights = ["--token_weights", '{"number": 2.0}']
    moved = run(distill, tmp_path / "moved", *given, *weights)["arms"]
    plain = run(distill, tmp_path / "plain", "--arms", "sft")["arms"]
    assert moved["sft"]["0"]["heldout"] == plain["sft"]["0"]["heldout"]
    settings = moved["cache"]["0"]["settings"]
    assert settings["temperature"] == "linear:3.0->1.0@3"
    assert settings["token_weights"]["number"] == 2.0


def torchrun(folder: Path, *arguments: object) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2]
    command += ["--master_port", 29533, distill.__file__, *arguments]
    done = subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=900,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", [None, pytest.param(torchrun, marks=pytest.mark.slow)])
def test_two_processes_train_and_write_what_one_does(
    run, tmp_path: Path, checkpoint: Path, gsm8k: Path, launcher: Any
):
    given = ["--arms", "sft", "cache", "--max_steps", 2, "--num_eval", 6]
    one = run(distill, tmp_path / "one", *given)["arms"]
    two = tmp_path / "two"
    source = ["--teacher_name_or_path", checkpoint, "--dataset", gsm8k, "--output_dir", two]
    words = [*source, *FEW, *given, "--per_device_train_batch_size", 2]
    if launcher is None:
        printed = run_two(tmp_path / "processes", main_of, "distill", *words)
    else:
        printed = launcher(tmp_path, *words)
    assert printed.count("| sft ") == 1  # the table is printed once
    found = json.loads((two / "results.json").read_text())["arms"]
    for name in ("sft", "cache"):
        points = found[name]["0"]["heldout"]
        assert points[0] == pytest.approx(one[name]["0"]["heldout"][0], rel=1e-5)
        assert points[-1] == pytest.approx(one[name]["0"]["heldout"][-1], rel=1e-5)
        assert points[-1] != pytest.approx(points[0], rel=1e-3)
    shape_of(two / "distill.png")
