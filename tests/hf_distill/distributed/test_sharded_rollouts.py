"""Rollouts of a model in pieces on two processes: the tokens of a whole one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from hf_distill.models.structure import is_sharded
from hf_distill.rollouts import generate
from hf_distill.rollouts.continuous_batching import continuous_batching_refusal
from tests.hf_distill.trainers import models
from tests.processes import run_two

pytestmark = pytest.mark.distributed

KINDS = ("fsdp1", "fsdp2")
PROMPTS = [[[5, 6, 7], [8], [9, 10, 11, 12, 13]], [[20, 21], [8], [5, 6, 7]]]
LENGTH = 10


def make() -> Any:
    """A model in which the end token is likely: the processes end after other numbers of steps."""
    model = models.llama()
    with torch.no_grad():
        model.lm_head.weight[models.EOS] = 0.5 * model.lm_head.weight[5:20].sum(0)
    return model


def shard(kind: str, model: Any) -> nn.Module:
    if kind == "fsdp1":
        policy = ModuleWrapPolicy({type(model.model.layers[0])})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
        )
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sample(model: nn.Module, prompts: Any, **changes: Any) -> list[list[int]]:
    settings = {"max_completion_length": LENGTH, "temperature": 0.0, "seed": 1} | changes
    return generate(model, prompts, pad_token_id=models.PAD, eos_token_id=models.EOS, **settings)


def step(model: nn.Module, row: list[int]) -> None:
    """Training goes on between rollouts."""
    ids = torch.tensor([row])
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
    model.zero_grad()


def run(kind: str, rank: int) -> dict[str, Any]:
    whole, model = make(), shard(kind, make())
    prompts = PROMPTS[rank]
    model.train()
    found: dict[str, Any] = {
        "sharded": is_sharded(model),
        "refusal": continuous_batching_refusal(model),
    }
    found["whole"] = sample(whole, prompts)
    found["all"] = sample(model, prompts)
    found["batches"] = sample(model, prompts, batch_size=2)
    found["in pieces"] = kind == "fsdp1" or all(isinstance(p, DTensor) for p in model.parameters())
    found["sampled"] = sample(model, prompts, temperature=1.0)
    found["sampled whole"] = sample(whole, prompts, temperature=1.0)
    for row in PROMPTS[0]:  # of every process, for the average is what is learnt
        step(model, row)
        step(whole, row)
    found["later"], found["later whole"] = sample(model, prompts), sample(whole, prompts)
    found["training"] = model.training
    for name, few in (("fewer calls", prompts[: 1 + rank]), ("none here", prompts[: 3 * rank])):
        of_both = [sample(each, few, batch_size=1, temperature=1.0) for each in (model, whole)]
        found[name] = (len(few), *of_both)
    return found


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found; they meet in a file and write to files of their own."""
    folder = tmp_path_factory.mktemp("sharded")
    run_two(folder, of_a_process, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_a_whole_model(two_processes: list, kind: str, rank: int) -> None:
    found = two_processes[rank][kind]
    assert found["sharded"]
    assert found["all"] == found["batches"] == found["whole"]
    assert found["sampled"] == found["sampled whole"] != found["whole"]
    assert found["later"] == found["later whole"] != found["whole"]
    assert found["training"]
    assert found["in pieces"]
    assert found["refusal"] == "its parameters are sharded"


def test_the_processes_end_after_other_numbers_of_steps(two_processes: list) -> None:
    longest = [max(map(len, results["fsdp2"]["whole"])) for results in two_processes]
    assert longest[0] != longest[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_with_fewer_prompts_takes_part(two_processes: list, kind: str) -> None:
    for rank, results in enumerate(two_processes):
        for name, count in (("fewer calls", 1 + rank), ("none here", 3 * rank)):
            given, in_pieces, whole = results[kind][name]
            assert given == len(in_pieces) == count
            assert in_pieces == whole


def of_a_process(folder: Path) -> None:
    rank = torch.distributed.get_rank()
    torch.save({kind: run(kind, rank) for kind in KINDS}, folder / f"{rank}.pt")
