"""A tied head whose rows stay on two processes: embeddings, their gradients, and what is put back.

Trainings are in `tests/hf_distill/engines`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import fsdp
from torch.distributed.fsdp import MixedPrecisionPolicy

from hf_distill.data.sides import Side
from hf_distill.models.forward import Reader
from hf_distill.models.heads_apart import around_head, heads_apart, is_apart
from tests.hf_distill.trainers import models
from tests.processes import run_two

PAD = models.PAD
# other numbers of tokens; the padding is attended, so that something of the loss depends on it
IDS = (torch.tensor([[5, 6, PAD, 60], [7, PAD, 5, 5]]), torch.tensor([[9, PAD, 3]]))


def make() -> Any:
    model = models.llama(tie_word_embeddings=True).float()
    assert model.model.embed_tokens.padding_idx == PAD
    return model


def cut(model: Any, dtype: torch.dtype | None = None) -> None:
    """As accelerate cuts a model by the classes of its layers."""
    options = {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype)}
    with heads_apart(model):
        for layer in model.model.layers:
            fsdp.fully_shard(layer, **options)
        last = [model.model.norm, model.model.embed_tokens, model.lm_head]
        fsdp.fully_shard(last, **options)
        fsdp.fully_shard(model, **options)


def hidden_of(model: Any, ids: Tensor) -> Tensor:
    """The input of the head."""
    found: list[Tensor] = []

    def tap(hidden: Tensor) -> Tensor:
        found.append(hidden)
        return hidden[..., :1].detach()

    if is_apart(model.lm_head):
        with around_head(model, model.lm_head, tap):
            model(input_ids=ids)
    else:
        hook = model.lm_head.register_forward_hook(lambda _, given, __: found.append(given[0]))
        model(input_ids=ids)
        hook.remove()
    (hidden,) = found
    return hidden


def takes_less_by_logits(model: Any, ids: Tensor) -> bool:
    scored = torch.ones_like(ids, dtype=torch.bool)
    side = Side({"input_ids": ids, "attention_mask": scored.long()}, scored)
    return Reader("student").takes_less_by_logits(model, side)


def of_a_process(folder: Path) -> None:
    rank, whole, model = dist.get_rank(), make(), make()
    heard: list[tuple[int, ...]] = []
    embeddings = model.model.embed_tokens
    embeddings.register_forward_hook(lambda _, ids, out: heard.append((*ids[0].shape, out.ndim)))
    cut(model)
    joined, places = make(), dict(model.named_modules())
    fsdp.fully_shard(joined)
    few = [takes_less_by_logits(x, IDS[rank]) for x in (model, joined)]  # a whole forward is first
    heard.clear()
    hidden = hidden_of(model, IDS[rank])
    found: dict[str, Any] = {"hidden": hidden.detach(), "wanted": hidden_of(whole, IDS[rank])}
    hidden.square().sum().backward()
    for ids in IDS:  # data parallelism has the average of both
        (hidden_of(whole, ids).square().sum() / 2).backward()
    found["gradient"] = model.lm_head.weight.grad.full_tensor()
    found["wanted gradient"] = whole.lm_head.weight.grad
    found |= {"heard": heard, "by logits": few}
    found["in place"] = dict(model.named_modules()) == places
    rounded = make()
    dtypes: list[torch.dtype] = []
    embeddings = rounded.model.embed_tokens
    embeddings.register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
    cut(rounded, torch.bfloat16)
    found["dtypes"] = {hidden_of(rounded, IDS[rank]).dtype, *dtypes}
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("apart")
    run_two(folder, of_a_process, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.distributed
def test_embeddings_are_those_of_the_whole_model(two_processes: list[dict[str, Any]]) -> None:
    for found in two_processes:
        assert torch.equal(found["hidden"], found["wanted"])
        torch.testing.assert_close(found["gradient"], found["wanted gradient"])
        assert not found["gradient"][PAD].any()
        assert found["gradient"][[5, 9]].any(-1).all()  # of both processes
        assert found["dtypes"] == {torch.bfloat16}


@pytest.mark.distributed
def test_few_tokens_are_read_by_logits_where_a_head_is_joined(
    two_processes: list[dict[str, Any]],
) -> None:
    """The processes would not agree: each has another number of tokens."""
    for found in two_processes:
        assert found["by logits"] == [False, True]


@pytest.mark.distributed
def test_hooks_of_users_are_called_and_modules_put_back(
    two_processes: list[dict[str, Any]],
) -> None:
    for found, ids in zip(two_processes, IDS, strict=True):
        assert found["heard"] == [(*ids.shape, 3)]
        assert found["in place"]


def test_fsdp_is_as_before() -> None:
    plain = fsdp.fully_shard

    def fail() -> None:
        with heads_apart(make()):
            assert fsdp.fully_shard is not plain
            raise KeyError("a policy's own")

    with pytest.raises(KeyError, match="own"):
        fail()
    assert fsdp.fully_shard is plain
