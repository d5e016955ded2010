"""What follows a head is found under tensor parallelism as it is of a whole model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from hf_distill.models.head_probe import Post, probe_head
from hf_distill.models.structure import in_pieces
from tests.hf_distill.trainers import models
from tests.processes import run_two

pytestmark = pytest.mark.distributed

IDS = torch.arange(6)[None]
VOCAB = 64


class CutsLogits(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits[..., : VOCAB - 3]
        return out


def make(name: str) -> Any:
    kind, like = {
        "phi": (None, models.phi),  # its head has a bias
        "gemma2": (None, models.gemma2),
        "cut": (CutsLogits, models.llama),
    }[name]
    found = like()
    found.config.vocab_size = VOCAB
    torch.manual_seed(0)
    model = (kind or type(found))(found.config)
    with torch.no_grad():
        for parameter in model.lm_head.parameters():
            parameter.normal_()
    return model


WANTED = {"phi": Post(1.0, None), "gemma2": Post(1.0, 1.5), "cut": Post(1.0, None, VOCAB - 3)}


def of_a_process(folder: Path) -> None:
    found: dict[str, Any] = {}
    for name in WANTED:
        whole = make(name)
        if dist.get_rank() == 0:
            whole.save_pretrained(folder / name)
        dist.barrier()
        given = {"dtype": torch.float32, "distributed_config": DistributedConfig(tp_size=2)}
        model = type(whole).from_pretrained(folder / name, **given)
        head = model.lm_head
        assert in_pieces(head.weight)
        assert name != "phi" or in_pieces(head.bias)
        found[name] = probe_head(whole, IDS), probe_head(model, IDS)
    torch.save(found, folder / f"{dist.get_rank()}.pt")


def test_what_follows_is_what_follows_a_whole_head(tmp_path: Path) -> None:
    run_two(tmp_path, of_a_process, tmp_path)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert found == {name: (post, post) for name, post in WANTED.items()}
