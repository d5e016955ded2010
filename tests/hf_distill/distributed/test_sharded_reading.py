"""A model in pieces on two processes is looked at, and read, as a whole one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from hf_distill.data.sides import Side
from hf_distill.models.forward import Reader
from tests.hf_distill.distributed.test_sharded_rollouts import KINDS, shard
from tests.hf_distill.trainers import models
from tests.processes import run_two

pytestmark = pytest.mark.distributed

# the second process has a row of one token only, from which nothing can be learnt
ROWS = (torch.tensor([[5, 6, 7, 8, 9], [5, 6, 1, 1, 1]]), torch.tensor([[9]]))
ADAPTERS: dict[str, Any] = {
    "none": None,
    "lora": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
}


def make(adapter: str) -> Any:
    model, config = models.llama(), ADAPTERS[adapter]
    torch.manual_seed(0)
    return model if config is None else get_peft_model(model, config)


def pieces(kind: str, model: Any) -> nn.Module:
    """Of the model inside adapters too; FSDP 1 wraps what it is given."""
    if kind == "fsdp2" and hasattr(model, "get_base_model"):
        shard(kind, model.get_base_model())
        return model
    return shard(kind, model)


def read(model: nn.Module, ids: Tensor, refusal: str | None) -> Tensor:
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    predicts[0, :3] = True
    reader = Reader("student", refusal)
    side = Side({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, predicts)
    with torch.no_grad():
        first = reader.logits(model, side)
        assert torch.equal(reader.logits(model, side), first)  # nothing is looked for again
    return first


class ReadsAll(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + out.logits.mean(1, keepdim=True)
        return out


def reads_later_tokens(kind: str) -> str:
    model = ReadsAll(models.llama().config)
    model.load_state_dict(models.llama().state_dict())
    sharded = shard(kind, model)
    try:
        read(sharded, ROWS[0], "sharded parameters")
    except ValueError as error:
        return str(error)
    return ""


def of_a_process(folder: Path) -> None:
    rank = torch.distributed.get_rank()
    found: dict[str, Any] = {}
    for kind in KINDS:
        for adapter in ("none",) if kind == "fsdp1" else tuple(ADAPTERS):
            got = read(pieces(kind, make(adapter)), ROWS[rank], "sharded parameters")
            found[f"{kind} {adapter}"] = got, read(make(adapter).eval(), ROWS[rank], "told so")
        found[f"{kind} error"] = reads_later_tokens(kind)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found; they meet in a file and write to files of their own."""
    folder = tmp_path_factory.mktemp("reading")
    run_two(folder, of_a_process, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("rank", [0, 1])
def test_logits_are_those_of_a_whole_model(two_processes: list, rank: int) -> None:
    """The processes have other rows, and call the model as often."""
    pairs = [x for name, x in two_processes[rank].items() if "error" not in name]
    assert len(pairs) == 3
    for got, want in pairs:
        # two sums of the head's 32 products, whose sizes add up to 4, in any orders
        torch.testing.assert_close(got, want, rtol=0, atol=1.5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_reads_later_tokens_is_refused_by_each(two_processes: list, kind: str) -> None:
    for found in two_processes:
        assert "the student must predict each token" in found[f"{kind} error"]
