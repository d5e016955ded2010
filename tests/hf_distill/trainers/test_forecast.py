"""A forecast's measurements: what is sampled from, what both sides say; the command."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill import Feedback, HintCollator, OPSDConfig, OPSDTrainer
from hf_distill.__main__ import main
from hf_distill.trainers.forecast_command import last_number, number_score
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)


def trainer(folder: Path, data: Any = None, hint: Any = "hint", **changes: Any) -> OPSDTrainer:
    settings = {"max_completion_length": 5, "per_device_eval_batch_size": 2} | changes
    environment = settings.pop("environment", None)
    tokenizer = models.tokenizer()
    return OPSDTrainer(
        models.llama(),
        OPSDConfig(**models.options(folder, **settings)),
        HintCollator(tokenizer, hint),
        models.problems() if data is None else data,
        processing_class=tokenizer,
        environment=environment,
    )


def log_probs(model: Any, context: list[int], completion: list[int]) -> Tensor:
    """[n, V] of a completion's tokens, computed from one row alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + completion])).logits[0].double()
    return logits[len(context) - 1 : -1].log_softmax(-1)


def of_tokens(table: Tensor, tokens: list[int]) -> Tensor:
    return table.gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def jsd(one: Tensor, other: Tensor) -> Tensor:
    middle = torch.logaddexp(one, other) - torch.log(torch.tensor(2.0, dtype=torch.float64))
    return ((one.exp() * (one - middle)).sum(-1) + (other.exp() * (other - middle)).sum(-1)) / 2


@pytest.mark.parametrize("chat", [False, True])
def test_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: bool) -> None:
    data = [{**row, "hint": f"get {i + 1}"} for i, row in enumerate(models.problems(3, chat=chat))]
    run = trainer(tmp_path, data)
    assert run.rollouts is not None
    engine, calls = run.rollouts.engine, []
    sample = engine.sample

    def noted(model: Any, prompts: Any, seed: int) -> Any:
        calls.append(([list(x) for x in prompts], sample(model, prompts, seed), seed))
        return calls[-1][1]

    monkeypatch.setattr(engine, "sample", noted)
    found = run.forecast(num_rows=3, score=lambda row, text: float(len(text)))
    collator, model = run.hint_collator, run.model
    contexts = [x.student.ids for x in map(collator._contexts, data)]
    hinted = [x.teacher.ids for x in map(collator._contexts, data)]
    assert [x for call in calls[::2] for x in call[0]] == contexts
    assert [x for call in calls[1::2] for x in call[0]] == hinted
    assert [call[2] for call in calls[::2]] == [call[2] for call in calls[1::2]]
    assert len({call[2] for call in calls}) == 2
    own = [x for call in calls[::2] for x in call[1]]
    aided = [x for call in calls[1::2] for x in call[1]]
    for i, row in enumerate(found.rollouts):
        assert row.ids == own[i]
        assert row.lengths == (len(own[i]), len(aided[i]))
        assert row.scores == (len(collator.text(own[i])), len(collator.text(aided[i])))
        assert row.reference is None
        student = log_probs(model, contexts[i], own[i])
        teacher = log_probs(model, hinted[i], own[i])
        ratio = of_tokens(teacher, own[i]) - of_tokens(student, own[i])
        torch.testing.assert_close(torch.tensor(row.ratio).double(), ratio, rtol=0, atol=2e-5)
        signal = torch.tensor(row.signal).double()
        torch.testing.assert_close(signal, jsd(student, teacher), rtol=1e-4, atol=1e-6)
        assert float(signal.mean()) > 1e-3  # the hint says something
        hint = data[(i + 1) % 3]["hint"]  # of the next row, in this batch or not
        other = collator._contexts({**data[i], "hint": hint}).teacher.ids
        moved = of_tokens(log_probs(model, other, own[i]), own[i]) - of_tokens(student, own[i])
        assert row.wrong_ratio is not None
        torch.testing.assert_close(torch.tensor(row.wrong_ratio).double(), moved, rtol=0, atol=2e-5)
    assert found.step_seconds is not None
    assert found.seconds.keys() == {"sample", "student", "teacher"}


def test_without_a_judge_the_reference_is_read(tmp_path: Path) -> None:
    data = [{**row, "completion": "1 2 done"} for row in models.problems(2)]
    run = trainer(tmp_path, data)
    found = run.forecast(num_rows=2)
    collator = run.hint_collator
    for row, measured in zip(data, found.rollouts, strict=True):
        ids = collator(data[:1])["labels"][0]
        ids = ids[ids != -100].tolist()
        sides = collator._contexts(row)
        want = [
            float(of_tokens(log_probs(run.model, x.ids, ids), ids).mean())
            for x in (sides.student, sides.teacher)
        ]
        assert measured.reference == pytest.approx(want, abs=2e-5)
    assert found.gap is None
    assert found.reference_gap is not None


def test_an_environment_judges_both(tmp_path: Path) -> None:
    seen: list[str] = []

    def environment(attempts: Any) -> list[Feedback]:
        seen.extend(x.text for x in attempts)
        return [Feedback(columns={"score": len(x.text) / 100}) for x in attempts]

    run = trainer(tmp_path, models.problems(2, chat=True), environment=environment)
    found = run.forecast(num_rows=2)
    assert len(seen) == 4
    assert found.unaided == pytest.approx(sum(map(len, seen[:2])) / 200)
    assert found.hinted == pytest.approx(sum(map(len, seen[2:])) / 200)


def test_rows_of_a_dict_of_evaluations(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.eval_dataset = {"first": models.problems(3), "second": models.problems(1)}
    assert run.forecast(num_rows=9).rows == 3


def test_one_hint_for_all_rows_has_no_content_share(tmp_path: Path) -> None:
    run = trainer(tmp_path, models.problems(2), hint=lambda row: "think first")
    found = run.forecast(num_rows=2)
    assert found.hinted_rows == 2
    assert found.content_share is None


def test_a_run_logs_it_and_is_the_same_run(tmp_path: Path) -> None:
    given = {"forecast_rows": 2, "forecast_steps": 2, "rollout": {"temperature": 1.0}}
    plain = trainer(tmp_path / "a", rollout=given["rollout"])
    plain.train()
    run = trainer(tmp_path / "b", **given)
    run.train()
    logged = [x for x in run.state.log_history if "forecast_signal" in x]
    assert [x["step"] for x in logged] == [0, 2]
    assert models.difference(models.weights(plain.model), models.weights(run.model)) == 0.0
    losses = [[x["loss"] for x in r.state.log_history if "loss" in x] for r in (plain, run)]
    assert losses[0] == losses[1]


def test_what_cannot_be_forecast_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs at least one row, got num_rows 0"):
        trainer(tmp_path).forecast(num_rows=0)
    rows = [{**row, "completion": "1 2"} for row in models.problems(2)]
    with pytest.raises(ValueError, match="needs on_policy=True, got False"):
        trainer(tmp_path, rows, on_policy=False).forecast()
    for name, value in (("forecast_rows", -1), ("forecast_steps", 0)):
        with pytest.raises(ValueError, match=f"{name} must be at least"):
            OPSDConfig(**models.options(tmp_path, **{name: value}))
    with pytest.raises(ValueError, match="forecast_steps 2 needs forecast_rows of at least 1"):
        OPSDConfig(**models.options(tmp_path, forecast_steps=2))
    with pytest.raises(ValueError, match="forecast_rows 2 > 0 needs on_policy"):
        OPSDConfig(**models.options(tmp_path, forecast_rows=2, on_policy=False))


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 1,200.50 then", "1200.5"), ("#### 7.", "7"), ("-3 = x", "-3"), ("none", None)],
)
def test_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


def test_scores_by_number() -> None:
    score = number_score("answer")
    assert score({"answer": "so #### 7"}, "it is 7.0") == 1.0
    assert score({"answer": "so #### 7"}, "7 or 8") == 0.0
    with pytest.raises(ValueError, match=r"must have the column 'answer', got \['prompt'\]"):
        score({"prompt": "1"}, "1")
    with pytest.raises(ValueError, match="must have a number, got 'no'"):
        score({"answer": "no"}, "1")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.llama().save_pretrained(tmp_path / "model")
    models.tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    lines = ['{"prompt": "What is 1 + 2 ?", "hint": "get 3", "answer": "3"}'] * 2
    data.write_text("\n".join(lines))
    given = ["forecast", str(tmp_path / "model"), str(data), "--answer_column", "answer"]
    given += ["--json", str(tmp_path / "f.json"), "--png", str(tmp_path / "f.png")]
    assert main([*given, "--num_rows", "2", "--max_completion_length", "4"]) == 0
    printed = capsys.readouterr().out
    assert "| rows, with a hint | 2, 2 |" in printed
    assert '"sentence": "Expect' in (tmp_path / "f.json").read_text()
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
