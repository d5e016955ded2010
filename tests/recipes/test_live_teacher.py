"""The demonstration in miniature: both teachers from one start, the report, the figure."""

import json
import sys
from pathlib import Path

import live_teacher
import pytest
import torch

FEW = [
    "--warm_up_steps", "2", "--max_steps", "6", "--accuracy_steps", "2", "--num_eval", "6",
    "--per_device_train_batch_size", "4", "--max_completion_length", "8",
    "--disable_tqdm", "true", "--use_cpu",
]  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["live_teacher.py", *map(str, arguments)])
    live_teacher.main()


def test_both_teachers_from_one_start(tmp_path: Path, monkeypatch, capsys):
    starts = []
    original = live_teacher.Run.distil

    def spy(self):
        starts.append({k: v.clone() for k, v in self.model.state_dict().items()})
        return original(self)

    monkeypatch.setattr(live_teacher.Run, "distil", spy)
    # an untrained model's completions do not end; this limit makes each log a report
    limits = '{"window": 1, "entropy_collapse": 100.0}'
    run(monkeypatch, *FEW, "--watchdog", limits, "--output_dir", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["live", "base"]
    assert torch.equal(*(start["lm_head.weight"] for start in starts))
    for result in results.values():
        assert [step for step, _ in result["unaided"]] == [0, 2, 4, 6]
        assert [step for step, _ in result["ended"]] == [1, 2, 3, 4, 5, 6]
        assert result["first_report"] == {"step": 1, "fault": "entropy_collapse"}
    live, base = (results[name]["log_history"] for name in ("live", "base"))
    # One start, two teachers. A live one's logits come out of one product with the student's: in
    # another order of its sums they move by 1e-5, and a divergence of 0.003 by 0.08 of that.
    assert live[0]["soft"] == pytest.approx(base[0]["soft"], abs=1e-6)
    assert live[-1]["soft"] != pytest.approx(base[-1]["soft"], abs=1e-6)
    assert (tmp_path / "live_teacher.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "live_teacher.png").stat().st_size < 100_000
    printed = capsys.readouterr().out
    assert "live teacher: unaided 0.0% at the start, 0.0% at step 6; first report" in printed


def test_a_quiet_run_has_no_report():
    result = {"unaided": [(0, 0.25), (4, 0.5)], "first_report": live_teacher.first_report([{}])}
    assert live_teacher.describe("base", result) == (
        "base teacher: unaided 25.0% at the start, 50.0% at step 4; no report"
    )


def test_the_accuracy_named_is_the_last_before_the_report():
    report = {"step": 7, "fault": "endless"}
    result = {"unaided": [(0, 0.25), (5, 0.5), (10, 0.0)], "first_report": report}
    assert live_teacher.describe("live", result).endswith("endless at step 7, unaided 50.0% at 5")


def test_one_teacher_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="leave --teacher out"):
        run(monkeypatch, "--teacher=ema")
