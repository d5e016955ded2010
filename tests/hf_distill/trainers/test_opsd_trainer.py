"""OPSDTrainer: what is generated from, what is trained on, how often, and in which order."""

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_distill import HintCollator, OPSDConfig, OPSDTrainer
from hf_distill.trainers.opsd_trainer import RepeatSampler
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)


class Watched(OPSDTrainer):
    """Notes the batches that reach the loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.trained: list[dict[str, torch.Tensor]] = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.trained.append(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list, list, int]]:
    """(prompts, completions, seed) of every call of `generate`."""
    calls: list[tuple[list, list, int]] = []
    module = importlib.import_module("hf_distill.rollouts.generate")  # its function has its name
    original = module.generate

    def noted(model: Any, prompts: Any, **settings: Any) -> Any:
        completions = original(model, prompts, **settings)
        calls.append((prompts, completions, settings["seed"]))
        return completions

    monkeypatch.setattr(module, "generate", noted)
    return calls


def watched(folder: Path, model: nn.Module | None = None, **changes: Any) -> Watched:
    settings = {"max_completion_length": 8, "per_device_train_batch_size": 2} | changes
    chat, eval_rows = settings.pop("chat", False), settings.pop("eval_rows", None)
    tokenizer = settings.pop("tokenizer", None) or models.tokenizer()
    return Watched(
        models.llama() if model is None else model,
        OPSDConfig(**models.options(folder, **settings)),
        train_dataset=models.problems(chat=chat),
        eval_dataset=eval_rows,
        processing_class=tokenizer,
    )


def rows_of(batch: dict, side: str = "") -> list[list[int]]:
    ids, mask = batch[f"{side}input_ids"], batch[f"{side}attention_mask"].bool()
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]


def longest_first(rows: list[list[int]], start: int) -> list[int]:
    """Return the numbers of a step's four rows in the order of its micro-batches."""
    return sorted(range(start, start + 4), key=lambda i: -len(rows[i]))


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_trained_rows_are_the_prompts_generated_from_and_the_completions(
    tmp_path: Path, generated: list, chat: bool, pad_is_eos: bool
) -> None:
    trainer = watched(
        tmp_path,
        chat=chat,
        gradient_accumulation_steps=2,
        tokenizer=models.tokenizer(pad_is_eos),
        rollout={"temperature": 2.0},
    )
    collator, data = trainer.hint_collator, models.problems(chat=chat)
    trainer.train()
    assert len(generated) == 3
    prompts = [p for call in generated for p in call[0]]
    completions = [c for call in generated for c in call[1]]
    assert prompts == [collator.context_ids(row["prompt"]) for row in data[:12]]
    hinted = [collator.hints[0].insert(row["prompt"], row["hint"]) for row in data[:12]]
    students = [p + c for p, c in zip(prompts, completions, strict=True)]
    order = [i for start in (0, 4, 8) for i in longest_first(students, start)]
    trained = [row for batch in trainer.trained for row in rows_of(batch)]
    assert trained == [students[i] for i in order]
    teachers = [row for batch in trainer.trained for row in rows_of(batch, "teacher_")]
    assert teachers == [collator.context_ids(hinted[i]) + completions[i] for i in order]
    scored = [row[row != -100].tolist() for batch in trainer.trained for row in batch["labels"]]
    assert scored == [completions[i] for i in order]
    steps = [logs["tokens"] for logs in trainer.state.log_history if "loss" in logs]
    assert steps == [sum(map(len, call[1])) for call in generated]


def test_completion_metrics_are_those_of_the_samples(tmp_path: Path, generated: list) -> None:
    model = models.phi()
    with torch.no_grad():  # the end token is likely, so that some completions end
        model.lm_head.bias[models.EOS] = 2.0
    trainer = watched(tmp_path, model, logging_steps=3, eval_rows=models.problems(4))
    trainer.train()
    metrics = trainer.state.log_history[0]
    completions = [c for call in generated for c in call[1]]
    ended = [c[-1] == models.EOS for c in completions]
    assert 0 < sum(ended) < len(ended)
    assert metrics["completion_ended"] == sum(ended) / len(ended)
    assert metrics["completion_length"] == sum(map(len, completions)) / len(completions)
    evaluated = trainer.evaluate()
    lengths = [len(c) for call in generated[3:] for c in call[1]]
    assert evaluated["eval_completion_length"] == sum(lengths) / 4


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_one_generate_call_per_rollout(tmp_path: Path, generated: list, repeats: int) -> None:
    trainer = watched(
        tmp_path,
        rollout={"steps_per_rollout": repeats},
        gradient_accumulation_steps=2,
        max_steps=6,
    )
    trainer.train()
    assert len(generated) == 6 // repeats
    assert all(len(call[0]) == 4 for call in generated)
    assert len({call[2] for call in generated}) == len(generated)
    windows = [trainer.trained[2 * i : 2 * i + 2] for i in range(6)]
    for i, window in enumerate(windows):
        want = [p + c for p, c in zip(*generated[i // repeats][:2], strict=True)]
        want = [want[i] for i in longest_first(want, 0)]
        assert [row for batch in window for row in rows_of(batch)] == want


def test_the_teacher_follows_every_optimizer_step(tmp_path: Path) -> None:
    trainer = watched(
        tmp_path, teacher="ema", self_teacher={"ema_decay": 0.0}, gradient_accumulation_steps=2
    )
    before = trainer.teacher.state_dict()["lm_head.weight"].clone()
    trainer.train()
    for name, average in trainer.teacher.state_dict().items():  # decay 0: the last step's weights
        assert torch.equal(average, trainer.model.get_parameter(name))
    assert not torch.equal(before, trainer.teacher.state_dict()["lm_head.weight"])


def test_off_policy_generates_nothing(tmp_path: Path, generated: list) -> None:
    trainer = watched(tmp_path, on_policy=False)
    trainer.train()
    assert generated == []
    want = HintCollator(models.tokenizer())(models.problems()[:2])
    assert all(torch.equal(trainer.trained[0][name], want[name]) for name in want)


def test_seeds_differ_between_runs_and_steps(tmp_path: Path, generated: list) -> None:
    for seed in (0, 1, 2):
        watched(tmp_path, seed=seed).train()
    assert len({call[2] for call in generated}) == 9


def test_evaluations_sample_the_same(tmp_path: Path, generated: list) -> None:
    trainer = watched(tmp_path, eval_rows=models.problems(6), per_device_eval_batch_size=4)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert [call[1] for call in generated[:2]] == [call[1] for call in generated[2:]]
    assert generated[0][2] != generated[1][2]
    names = {"eval_loss", "eval_soft", "eval_top1_agreement", "eval_tokens"}
    assert names <= first.keys()
    assert all(first[name] == second[name] for name in names)
    assert "eval_hard" not in first
    assert first["eval_tokens"] == sum(len(c) for call in generated[:2] for c in call[1])


def test_rollouts_do_not_disturb_the_training_noise(tmp_path: Path) -> None:
    """However much is sampled, the random state of the training is where it would have been."""

    def run(length: int) -> torch.Tensor:
        trainer = watched(tmp_path, rollout={"temperature": 1.0}, max_completion_length=length)
        torch.manual_seed(0)
        trainer.train()
        return torch.get_rng_state()

    assert torch.equal(run(4), run(8))


def test_the_student_is_sampled_not_the_teacher(tmp_path: Path, generated: list) -> None:
    trainer = watched(
        tmp_path, models.lora(models.llama()), rollout={"temperature": 0.0}, max_steps=1
    )
    trainer.train()
    student = models.lora(models.llama())
    for prompt, completion in zip(*generated[0][:2], strict=True):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            said = student(input_ids=ids).logits[0].argmax(-1)
        assert said[len(prompt) - 1 : -1].tolist() == completion


def test_clip_reaches_the_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = watched(tmp_path, max_steps=1, on_policy=False)
    clipped = watched(tmp_path, max_steps=1, on_policy=False, clip={"bound": 1e-4})
    assert "clip bound 0.0001 at vocab_entry can lower tokens" in caplog.text
    for trainer in (plain, clipped):
        trainer.train()
    one, other = plain.state.log_history[0], clipped.state.log_history[0]
    assert other["clipped"] > 0.5
    assert "clipped" not in one
    assert other["loss"] < 0.5 * one["loss"]


def test_generation_kwargs_from_the_command_line(tmp_path: Path, generated: list) -> None:
    for settings in (
        {"rollout": '{"generation_kwargs": {"top_k": 1}}'},
        {"rollout": {"temperature": 0.0}},
    ):
        watched(tmp_path, max_steps=1, **settings).train()
    assert generated[0][1] == generated[1][1]


def windows(sampler: RepeatSampler, size: int) -> list[list[int]]:
    order = list(sampler)
    assert len(order) == len(sampler)
    return [order[i : i + size] for i in range(0, len(order), size)]


def test_repeat_sampler_in_order() -> None:
    sampler = RepeatSampler(7, window=3, repeats=2, seed=0, shuffle=False)
    assert windows(sampler, 3) == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
    exact = RepeatSampler(6, window=3, repeats=1, seed=0, shuffle=False)
    assert windows(exact, 3) == [[0, 1, 2], [3, 4, 5]]
    copied = RepeatSampler(5, window=4, repeats=2, seed=0, shuffle=False, copies=2)
    assert windows(copied, 4) == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2


def test_repeat_sampler_shuffles_anew_each_epoch() -> None:
    sampler = RepeatSampler(12, window=4, repeats=3, seed=5, shuffle=True)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(windows(sampler, 4))
        for start in range(0, 9, 3):
            first, *others = epochs[-1][start : start + 3]
            assert all(window == first for window in others)
        assert Counter(i for w in epochs[-1] for i in w) == dict.fromkeys(range(12), 3)
    assert epochs[0] == epochs[2] != epochs[1]
    assert sorted(epochs[0]) != [w for w in epochs[0] if w == sorted(w)]
    other = RepeatSampler(12, window=4, repeats=3, seed=6, shuffle=True)
    assert windows(other, 4) != epochs[0]


def test_repeat_sampler_needs_a_window() -> None:
    with pytest.raises(ValueError, match=r"at least one optimizer step of rows \(8\), got 7"):
        RepeatSampler(7, window=8, repeats=2, seed=0, shuffle=True)


def test_epochs_of_repeated_rollouts_are_shuffled_differently(tmp_path: Path) -> None:
    trainer = watched(
        tmp_path,
        rollout={"steps_per_rollout": 2},
        max_steps=32,
        train_sampling_strategy="random",
        max_completion_length=1,
    )
    trainer.train()
    assert trainer.state.epoch == 2.0
    first = [rows_of(batch)[0][:-1] for batch in trainer.trained[:16]]
    second = [rows_of(batch)[0][:-1] for batch in trainer.trained[16:]]
    assert first != second
