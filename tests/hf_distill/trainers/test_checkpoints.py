"""Which checkpoint a run goes on from, and when a checkpoint counts as whole."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer

from hf_distill import DistillConfig, DistillTrainer, OPSDConfig, OPSDTrainer
from hf_distill.trainers import checkpoints
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

STATE = "trainer_state.json"


def trainer(folder: Path, **changes: Any) -> OPSDTrainer:
    settings = {
        "teacher": "ema",
        "max_completion_length": 2,
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    return OPSDTrainer(
        models.llama(),
        OPSDConfig(**models.options(folder, **settings | changes)),
        train_dataset=models.problems(),
        processing_class=models.tokenizer(),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    trainer(folder, rollout={"steps_per_rollout": 2}).train()
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """Checkpoints of steps 1, 2 and 3; the first and the last lie inside a rollout."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def tear(folder: Path, step: int) -> None:
    (folder / f"checkpoint-{step}" / STATE).unlink()


def test_torn_checkpoints_are_passed_over(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tear(folder, 3)
    (folder / "checkpoint-2" / STATE).write_text('{"best_metric": null, "epo')
    (folder / "checkpoint-10").mkdir()  # later than 9, though not by name
    (folder / "checkpoint-99-old").mkdir()
    assert checkpoints.last_whole_checkpoint(str(folder)) == str(folder / "checkpoint-1")
    passed = [r.getMessage() for r in caplog.records]
    assert [text.split(" is passed")[0][-2:] for text in passed] == ["10", "-3", "-2"]
    assert f"it has no {STATE}, which is written last; it may be removed" in passed[1]
    assert f"its {STATE}, which is written last, ends too early" in passed[2]
    run = trainer(folder, rollout={"steps_per_rollout": 2})
    run.train(resume_from_checkpoint=True)
    assert run.state.log_history[1]["step"] == 2
    assert run.state.global_step == 3


def test_no_whole_checkpoint_is_an_error(folder: Path) -> None:
    for step in (1, 2, 3):
        tear(folder, step)
    with pytest.raises(
        ValueError, match=r"written to the end: remove .*checkpoint-3, .*-1 and sta"
    ):
        trainer(folder).train(resume_from_checkpoint=True)
    empty = trainer(folder / "empty")
    with pytest.raises(ValueError, match="No valid checkpoint found"):  # the Trainer's own
        empty.train(resume_from_checkpoint=True)


def test_a_torn_checkpoint_that_is_named_is_an_error(folder: Path) -> None:
    tear(folder, 2)
    named = str(folder / "checkpoint-2")
    with pytest.raises(
        ValueError, match=r"checkpoint-2 was not written to the end: it has no trai"
    ):
        trainer(folder).train(resume_from_checkpoint=named)


@pytest.mark.parametrize(
    ("ranks", "rank", "world", "universal", "said"),
    [
        ((0, 1), 0, 2, False, None),
        ((0, 1), 2, 3, False, r"checkpoint-2 has parts of 2 and this run has 3: take as many"),
        ((0, 1, 2), 0, 2, False, r"checkpoint-2 has parts of 3 and this run has 2: take as many"),
        ((0, 1, 2), 0, 2, True, None),
        ((4, 5), 4, 8, False, None),  # one machine of several without a shared disk
        ((), 0, 2, False, None),
    ],
)
@pytest.mark.parametrize("prefix", ["", "bf16_"])
def test_deepspeed_goes_on_with_as_many_processes(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    ranks: tuple[int, ...],
    rank: int,
    world: int,
    universal: bool,
    said: str | None,
    prefix: str,
) -> None:
    inner = folder / "checkpoint-2" / "global_step2"
    inner.mkdir()
    (inner.parent / "latest").write_text("global_step2\n")
    for i in ranks:
        (inner / f"{prefix}zero_pp_rank_{i}_mp_rank_00_optim_states.pt").touch()
        (inner / f"zero_pp_rank_{i}_mp_rank_00_model_states.pt").touch()
    assert checkpoints.zero_ranks(str(inner.parent)) == set(ranks)
    run = trainer(folder)
    plugin = SimpleNamespace(get_value=lambda *_: universal)
    given = SimpleNamespace(process_index=rank, world_size=world)
    monkeypatch.setattr(
        run, "accelerator", SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    )
    monkeypatch.setattr(run, "args", given)
    if said is None:
        run._check_processes(str(inner.parent))
    else:
        with pytest.raises(ValueError, match=said):
            run._check_processes(str(inner.parent))


class Killed(BaseException):
    pass


def test_writing_over_a_checkpoint_first_takes_its_mark(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else new weights beside an old optimizer would pass for a whole one."""

    def stop(*_: Any) -> None:
        raise Killed

    run = trainer(folder)
    monkeypatch.setattr(run, "_save_optimizer_and_scheduler", stop)
    with pytest.raises(Killed):
        run.train()
    assert checkpoints.find_flaw(str(folder / "checkpoint-1")) is not None
    assert checkpoints.find_flaw(str(folder / "checkpoint-2")) is None


def test_a_checkpoint_is_whole_before_old_ones_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[set[str]] = []

    def noted(output_dir: str, **kwargs: Any) -> None:
        folder = max(Path(output_dir).glob("checkpoint-*"))
        assert checkpoints.find_flaw(str(folder)) is None
        found.append({path.name for path in folder.iterdir()})

    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", noted)
    trainer(tmp_path, rollout={"steps_per_rollout": 2}, save_total_limit=1).train()
    assert ["rollout-0.json" in names for names in found] == [True, False, True]
    assert all("teacher.safetensors" in names for names in found)


def test_every_process_has_written_before_the_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, max_steps=1)
    waited: list[bool] = []

    def wait() -> None:
        folder = tmp_path / "checkpoint-1"
        waited.append((folder / "teacher.safetensors").exists() and not (folder / STATE).exists())

    monkeypatch.setattr(run.accelerator, "wait_for_everyone", wait)
    run.train()
    assert waited == [True]


def test_a_rollout_of_an_older_run_is_removed(folder: Path) -> None:
    assert (folder / "checkpoint-1" / "rollout-0.json").exists()
    trainer(folder).train()
    assert not (folder / "checkpoint-1" / "rollout-0.json").exists()


def test_a_missing_rollout_is_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only where the next step would have used it."""
    for step, steps_per_rollout, logged in ((1, 2, True), (2, 2, False), (1, 1, False)):
        (folder / f"checkpoint-{step}" / "rollout-0.json").unlink(missing_ok=True)
        caplog.clear()
        run = trainer(folder, rollout={"steps_per_rollout": steps_per_rollout}, save_strategy="no")
        run.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        text = "no completions of this process, though step 1 is not the first on them: they are"
        assert (text in caplog.text) == logged


def test_model_only_checkpoints_have_no_state_of_the_teacher(tmp_path: Path) -> None:
    trainer(tmp_path, save_only_model=True).train()
    assert not list(tmp_path.glob("*/teacher.safetensors"))
    assert checkpoints.find_flaw(str(tmp_path / "checkpoint-3")) is None
    with pytest.raises(FileNotFoundError, match="the teacher's state must be in the checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_the_teachers_state_is_restored(folder: Path) -> None:
    run = trainer(folder)
    before = run.teacher.state_dict()["lm_head.weight"].clone()
    run.train(resume_from_checkpoint=True)  # the last step is done: nothing but restoring happens
    assert not torch.equal(run.teacher.state_dict()["lm_head.weight"], before)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere/checkpoint-500", "there is no such folder"),
        (".", "it holds checkpoints, of which one must be named, checkpoint-3 say"),
        ("empty", "it holds no weights"),
    ],
)
def test_a_path_that_is_no_checkpoint(folder: Path, name: str, reason: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=f"Can't find a valid checkpoint at .*: {reason}"):
        trainer(folder).train(resume_from_checkpoint=str(folder / name))


def other(folder: Path, teacher: str, model: Any) -> OPSDTrainer:
    settings = {"teacher": teacher, "max_completion_length": 2, "max_steps": 3}
    args = OPSDConfig(**models.options(folder, **settings))
    data, tokenizer = models.problems(), models.tokenizer()
    return OPSDTrainer(model, args, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            lambda: models.lora(models.llama()),
            r"it lacks \d+ of \d+ tensors \(.*lora_A.*\), and has \d+ that this run does not have",
        ),
        (
            lambda: models.llama(hidden_size=16),
            r"lm_head.weight has the shape \[61, 32\] there and \[61, 16\] here",
        ),
    ],
)
def test_an_average_of_another_run(folder: Path, model: Any, reason: str) -> None:
    run = other(folder, "ema", model())
    with pytest.raises(ValueError, match=rf"teacher.safetensors is of another run: {reason}"):
        run._load_extra(str(folder / "checkpoint-2"))


def test_an_average_that_is_not_read_is_logged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other(folder, "base", models.llama())._load_extra(str(folder / "checkpoint-2"))
    assert "teacher.safetensors is not read: this run's teacher has no state" in caplog.text


def test_projections_of_another_run(tmp_path: Path) -> None:
    def run(width: int, layers: Any) -> DistillTrainer:
        settings = {"hidden_layers": layers, "max_steps": 1, "save_strategy": "steps"}
        args = DistillConfig(**models.options(tmp_path, **settings | {"save_steps": 1}))
        teacher = models.llama(1, hidden_size=width)
        return DistillTrainer(models.llama(), args, models.Pad(), models.rows(), teacher=teacher)

    run(48, [1, 2]).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"hidden_projection.safetensors is of another run: 0.wei"):
        run(16, [1, 2]).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"it lacks 0 of 1 tensors, and has 1 that this run does"):
        run(48, "last").train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("kind", "in_checkpoint", "whole"),
    [
        ("SHARDED_STATE_DICT", False, True),
        ("SHARDED_STATE_DICT", True, False),  # a checkpoint is in pieces, as it was asked for
        ("FULL_STATE_DICT", False, False),  # the Trainer writes it
        (None, False, False),
    ],
)
def test_a_model_that_fsdp_writes_in_pieces_is_saved_whole(
    kind: str | None, in_checkpoint: bool, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    plain = lambda self, folder, internal: written.append(("plain", folder, internal))
    monkeypatch.setattr(transformers.Trainer, "save_model", plain)
    made: Any = checkpoints.StatefulTrainer.__new__(checkpoints.StatefulTrainer)
    made.is_fsdp_enabled, made.model = kind is not None, "a model"
    made._save = lambda *given: written.append(given)
    made.accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(state_dict_type=f"StateDictType.{kind}")),
        get_state_dict=lambda model: f"the weights of {model}",
    )
    made.save_model("out", _internal_call=in_checkpoint)
    gathered = [("out", "the weights of a model")] * whole
    assert written == [*gathered, ("plain", "out", in_checkpoint)]
