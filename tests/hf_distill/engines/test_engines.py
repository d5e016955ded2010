"""Two processes of an engine do what one process of as many rows does; refused set-ups say why.

`python -m tests.hf_distill.engines.table` has all engines and set-ups.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from hf_distill import DistillConfig, DistillTrainer, ModelTeacher
from hf_distill.models.heads_apart import heads_apart
from hf_distill.models.structure import Kind
from hf_distill.trainers.checkpoints import check_are_parameters
from hf_distill.trainers.checks import check_setup, shard_loss
from tests.hf_distill.engines import cpu
from tests.hf_distill.engines.no_logits import in_chunks
from tests.hf_distill.engines.setups import Place, largest, llama, same_logs, train
from tests.hf_distill.engines.table import ROUNDING, result_file
from tests.hf_distill.trainers import models
from tests.processes import run_two

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

SHORT: dict[str, tuple[str, ...]] = {
    "fsdp2": (
        *("separate", "tied both", "base, lora", "live", "ema, full"),
        *("environment", "saved, projections, sharded"),
        *("projections, few on one process", "resumed, projections"),
        "resumed, projections, lora, sharded",
    ),
    "fsdp2-shard": ("tied", "live", "a process without tokens", "padded vocabulary"),
    "tp": (
        *("both in pieces, tied", "evaluation", "base, full", "entropy weights"),
        "padded vocabulary",
    ),
}


def of_a_process(engine: str, folder: Path) -> None:
    cpu.take_processes_for_devices()
    for name in SHORT[engine]:
        file = result_file(folder, engine, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        found = train(name, Place(file.parent, engine, 2))
        if torch.distributed.get_rank() == 0:
            torch.save(found, file)
    rank = torch.distributed.get_rank()
    torch.save(in_chunks(Place(folder, engine, 2)), folder / f"logits-{rank}.pt")


@pytest.fixture(scope="module", params=SHORT)
def engine(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    run_two(folder, of_a_process, request.param, folder)
    return request.param, folder


@pytest.mark.distributed
def test_two_processes_are_one(engine: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = engine
    start = llama().state_dict()
    for setup in SHORT[name]:
        many = torch.load(result_file(folder, name, setup), weights_only=False)
        assert not many.get("wrong"), setup
        if "straight" in many:
            assert largest(many["straight"], many["weights"]) == 0, setup
            continue
        one = train(setup, Place(tmp_path, "one", 1))
        assert largest(one["weights"], many["weights"]) < ROUNDING, setup
        assert same_logs(one["logs"], many["logs"]) == [], setup
        if one["weights"].keys() == start.keys():  # and training moves far more than rounding
            assert largest(start, one["weights"]) > 1e4 * ROUNDING, setup


@pytest.mark.distributed
def test_a_model_in_pieces_is_read_without_its_logits(engine: tuple[str, Path]) -> None:
    name, folder = engine
    for rank in range(2):
        fused, by_logits, own_loss = torch.load(folder / f"logits-{rank}.pt")
        assert fused == ""
        # so the check can fail; of the tied one the head is seen first
        assert ("whole head" if name == "fsdp2-shard" else "made logits") in by_logits
        # whose heads are joined for it
        assert ("whole head" in own_loss) == (name in ("tp", "fsdp2-shard"))


def run_of(**changes: Any) -> Any:
    """Enough of a run for the checks that come first."""
    args = {"n_gpu": 1, "use_cpu": False, "fsdp": None, "deepspeed": None}
    own = {"num_copies": 1, "num_parts": 1, "teachers": [], "kind": Kind.ROWS}
    own |= {"student": nn.Identity(), "teacher": None, "collator": None}
    given = {name: changes.pop(name) for name in tuple(changes) if name in args}
    kind = changes.pop("kind", DistributedType.MULTI_CPU)
    accelerator = SimpleNamespace(distributed_type=kind, num_processes=2, is_fsdp2=True)
    made = args | given
    return SimpleNamespace(args=SimpleNamespace(**made), accelerator=accelerator, **own | changes)


@pytest.mark.parametrize("asked", [{"fsdp": True}, {"deepspeed": {"zero_optimization": {}}}])
def test_an_engine_that_is_not_started_is_refused(asked: dict[str, Any]) -> None:
    (name,) = asked
    with pytest.raises(ValueError, match=f"{name} needs devices, and with use_cpu .* MULTI_CPU"):
        check_setup(run_of(**asked, use_cpu=True))
    kind = {"fsdp": DistributedType.FSDP, "deepspeed": DistributedType.DEEPSPEED}[name]
    check_setup(run_of(**asked, kind=kind))
    check_setup(run_of(use_cpu=True))


def test_an_engine_of_the_launcher_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp needs devices"):
        check_setup(run_of(use_cpu=True))


def test_an_engine_that_found_no_devices_is_said(caplog: pytest.LogCaptureFixture) -> None:
    said = "fsdp was asked for, but accelerate found no devices for it and made distributed_type"
    check_setup(run_of(fsdp=True))
    assert f"{said} MULTI_CPU: nothing is cut" in caplog.text
    caplog.clear()
    check_setup(run_of(fsdp=True, kind=DistributedType.FSDP))
    check_setup(run_of())
    assert said not in caplog.text


def test_rows_that_are_split_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have whole rows, .* split over 2 processes"):
        check_setup(run_of(num_parts=2))


def test_layers_that_fsdp_recomputes_are_refused() -> None:
    run = run_of(kind=DistributedType.FSDP)
    run.args.hidden_layers = "uniform"
    check_setup(run)
    run.accelerator.state = SimpleNamespace(
        fsdp_plugin=SimpleNamespace(activation_checkpointing=True)
    )
    with pytest.raises(
        ValueError, match="got fsdp_config activation_checkpointing=True and hidden"
    ):
        check_setup(run)
    run.args.hidden_layers = None
    check_setup(run)


def test_projections_that_fsdp_would_not_keep_are_refused() -> None:
    plugin = SimpleNamespace(use_orig_params=False)
    given: Any = {"distributed_type": DistributedType.FSDP, "is_fsdp2": False}
    fsdp1: Any = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), **given)
    layers: Any = SimpleNamespace(projections=nn.ModuleList([nn.Linear(2, 3)]))
    with pytest.raises(ValueError, match=r"with use_orig_params only: .* got False"):
        check_are_parameters(fsdp1, layers)
    check_are_parameters(fsdp1, SimpleNamespace(projections=None))  # type: ignore[arg-type]
    plugin.use_orig_params = True
    check_are_parameters(fsdp1, layers)
    plugin.use_orig_params, fsdp1.is_fsdp2 = False, True
    check_are_parameters(fsdp1, layers)


def test_adapters_that_would_not_be_loaded_are_refused() -> None:
    run = run_of(kind=DistributedType.FSDP, student=models.lora(models.llama()))
    run.accelerator.is_fsdp2 = False
    check_setup(run)
    run.args.load_best_model_at_end = True
    with pytest.raises(ValueError, match=r"not loaded under FSDP 1 .* got load_best_model_at_end"):
        check_setup(run)
    run.accelerator.is_fsdp2 = True
    check_setup(run)
    run.accelerator.is_fsdp2, run.student = False, models.llama()
    check_setup(run)


def test_a_teacher_whose_processes_have_other_rows_is_refused() -> None:
    teacher = ModelTeacher(llama())
    teacher.model._tp_size = 2
    with pytest.raises(ValueError, match="over 2 processes must be asked about the same rows"):
        check_setup(run_of(teachers=[teacher]))


class Fsdp:
    """What accelerate says of an engine."""

    def __init__(self, kind: DistributedType, is_fsdp2: bool) -> None:
        self.distributed_type, self.is_fsdp2 = kind, is_fsdp2


@pytest.mark.parametrize(
    ("accelerator", "got"),
    [
        (Fsdp(DistributedType.MULTI_GPU, False), "MULTI_GPU"),
        (Fsdp(DistributedType.FSDP, False), "FSDP of version 1"),
        (Fsdp(DistributedType.DEEPSPEED, False), "DEEPSPEED"),
    ],
)
def test_heads_stay_in_pieces_under_fsdp_2_only(accelerator: Any, got: str) -> None:
    with pytest.raises(ValueError, match=f"shard_loss needs FSDP 2, got {got}$"):
        shard_loss(accelerator, True)
    with pytest.raises(ValueError, match=r"shard_loss needs FSDP 2, got NO$"):
        DistillTrainer(
            llama(), DistillConfig("none", shard_loss=True, use_cpu=True), teacher=llama(1)
        )


def test_heads_in_pieces_need_a_teacher() -> None:
    accelerator: Any = Fsdp(DistributedType.FSDP, True)
    with pytest.raises(ValueError, match="shard_loss needs a teacher"):
        shard_loss(accelerator, False)


def test_what_cannot_stay_in_pieces_is_refused() -> None:
    tied = llama(tie_word_embeddings=True)
    tied.model.embed_tokens.max_norm = 1.0
    with (
        pytest.raises(ValueError, match=r"needs plain input embeddings .* got Embedding.*max_norm"),
        heads_apart(tied),
    ):
        pass
    wrapped = llama()
    wrapped.lm_head = nn.Sequential(wrapped.lm_head)
    with (
        pytest.raises(ValueError, match="needs a linear output head, got a Sequential"),
        heads_apart(wrapped),
    ):
        pass
    with (
        pytest.raises(ValueError, match="the wrap policy of FSDP has cut the Linear otherwise"),
        heads_apart(llama()),
    ):
        pass
