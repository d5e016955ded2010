"""Which heads are read by hidden states, which are refused and why, and that no trace is left."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from hf_distill.data.sides import Side
from hf_distill.models.forward import Reader
from hf_distill.models.head_probe import Post, probe_head
from hf_distill.models.structure import vocab_size
from tests.hf_distill.models.test_head_probe import KNOWN, llama_then
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
PREDICTS = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 0, 1, 0, 0, 0]]).bool()
SIDE = Side({"input_ids": IDS, "attention_mask": MASK}, PREDICTS)

POSTS = {
    "llama": (1.0, None),
    "tied": (1.0, None),
    "gemma2": (1.0, 1.5),
    "granite": (1 / 1.5, None),
    "cohere": (0.6, None),
    "phi": (1.0, None),
    "gpt2": (1.0, None),
}


class Doubled(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden)


def custom_head() -> nn.Module:
    model = models.llama()
    model.lm_head = Doubled(32, models.VOCAB, bias=False)
    return model


def hooked_head() -> nn.Module:
    model = models.llama()
    model.lm_head.register_forward_hook(lambda _module, _args, out: out + 1)
    return model


def scaled_logits() -> nn.Module:
    """A model that changes its logits in a way that no scale or softcap does."""
    model = models.llama()
    forward = model.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits + 1.1
        return out

    model.forward = changed
    return model


def headless() -> nn.Module:
    model = models.llama()
    model.get_output_embeddings = lambda: None
    return model


def half_integer() -> nn.Module:
    model = models.llama()
    model.lm_head.weight = nn.Parameter(
        torch.ones(models.VOCAB, 32, dtype=torch.int8), requires_grad=False
    )
    return model


REFUSED = {
    "LoRA on the head": (
        lambda: models.lora(models.llama(), target_modules=["lm_head"]).get_base_model(),
        "the head is a peft",
    ),
    "a trained copy of the head": (
        lambda: models.lora(models.llama(), modules_to_save=["lm_head"]).get_base_model(),
        "the head is a peft ModulesToSaveWrapper",
    ),
    "another class": (custom_head, "the head is a tests Doubled"),
    "a hook": (hooked_head, "the head does more than a linear map"),
    "logits changed": (scaled_logits, "the logits are not a scale and softcap"),
    "no head": (headless, "the model has no output embeddings"),
    "quantised": (half_integer, "the head's weight is torch.int8"),
}


@pytest.mark.parametrize("family", POSTS)
def test_the_probe_finds_what_follows_the_head(family: str) -> None:
    assert probe_head(models.FAMILIES[family](), IDS[:1]) == (*POSTS[family], None)


@pytest.mark.parametrize("case", REFUSED)
def test_the_probe_refuses_other_heads(case: str) -> None:
    make, message = REFUSED[case]
    found = probe_head(make(), IDS[:1])
    assert isinstance(found, str)
    assert message in found


@pytest.mark.parametrize("family", [*POSTS, "adapted"])
def test_the_signal_is_the_models_logits(family: str) -> None:
    adapted = family == "adapted"
    model = models.lora(models.llama()) if adapted else models.FAMILIES[family]()
    signal = Reader("student").signal(model, SIDE)
    assert signal.hidden is not None
    assert signal.hidden.shape == (PREDICTS.sum(), 32)
    with torch.no_grad():
        want = model(input_ids=IDS, attention_mask=MASK).logits[PREDICTS]
    # two sums of the head's 32 products, whose sizes add up to 4, in any orders: 2 * 31 * 2^-24 * 4
    torch.testing.assert_close(signal.dense(), want, rtol=0, atol=1.5e-5)


def test_a_reader_may_be_given_another_model() -> None:
    reader, one, other = Reader("student"), models.llama(seed=1), models.llama(seed=2)
    for model in (one, other, one):
        with torch.no_grad():
            want = model(input_ids=IDS, attention_mask=MASK).logits[PREDICTS]
        found = reader.signal(model, SIDE).dense()
        torch.testing.assert_close(found, want, rtol=0, atol=1.5e-5)  # likewise


@pytest.mark.parametrize("refusal", [None, "by its logits"])
@pytest.mark.parametrize("vocab", [40, models.VOCAB])
def test_the_vocabulary_ends_where_a_reader_or_its_model_ends_it(
    refusal: str | None, vocab: int
) -> None:
    after, (_, _, entries) = KNOWN["cut"]
    assert entries is not None
    assert 40 < entries < models.VOCAB
    model = llama_then(after)
    signal = Reader("student", refusal, vocab=vocab).signal(model, SIDE)
    with torch.no_grad():
        want = model(input_ids=IDS, attention_mask=MASK).logits[PREDICTS][:, :vocab]
    torch.testing.assert_close(signal.dense(), want, rtol=0, atol=1.5e-5)  # likewise


@pytest.mark.parametrize("case", ["LoRA on the head", "another class", "no head"])
def test_a_refused_model_is_read_by_its_logits(case: str) -> None:
    model = REFUSED[case][0]()
    signal = Reader("student").signal(model, SIDE)
    assert signal.hidden is None
    with torch.no_grad():
        want = model(input_ids=IDS, attention_mask=MASK).logits[PREDICTS]
    torch.testing.assert_close(signal.logits, want, rtol=0, atol=1.5e-5)  # likewise


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hf_distill")
    reader, other = Reader("student"), Reader("teacher")
    for _ in range(3):
        reader.signal(models.gemma2(), SIDE)
        other.signal(custom_head(), SIDE)
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2
    assert "student: read by its hidden states before the head, logit scale 1, softcap 1.5" in texts
    assert any(t.startswith("teacher: read by its logits") and "Doubled" in t for t in texts)


def test_a_refusal_from_outside_is_kept_without_a_probe() -> None:
    assert Reader("student", "sharded parameters").signal(models.llama(), SIDE).hidden is None


@pytest.mark.parametrize("wrap", [lambda m: m, models.lora], ids=["plain", "adapted"])
def test_the_forward_is_restored(wrap: Any) -> None:
    model = wrap(models.llama())
    lm = model.get_base_model() if wrap is models.lora else model
    before = set(lm.__dict__), set(lm.lm_head.__dict__)
    reader = Reader("student")
    reader.signal(model, SIDE)
    assert (set(lm.__dict__), set(lm.lm_head.__dict__)) == before

    def fails(hidden: torch.Tensor, head: Any) -> None:
        raise RuntimeError("in the head")

    with pytest.raises(RuntimeError, match="in the head"):
        reader.at_head(model, SIDE, fails)
    assert (set(lm.__dict__), set(lm.lm_head.__dict__)) == before
    assert lm(input_ids=IDS).logits.shape == (2, 6, models.VOCAB)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_forward_that_the_user_replaced_is_put_back() -> None:
    model = scaled_logits()
    mine = model.forward
    reader = Reader("student")
    reader._post, reader._is_known = Post(1.0, None), True
    reader.signal(model, SIDE)
    assert model.forward is mine


def test_the_probe_leaves_mode_and_hooks() -> None:
    model = models.llama(attention_dropout=0.5).train()
    state = torch.get_rng_state()
    assert probe_head(model, IDS[:1]) == (1.0, None, None)
    assert model.training
    assert model.model.layers[0].training
    assert not model.lm_head._forward_hooks
    assert torch.equal(state, torch.get_rng_state())


def test_vocab_size_is_the_heads() -> None:
    assert vocab_size(models.llama()) == models.VOCAB
    assert vocab_size(headless()) == models.VOCAB
    assert vocab_size(nn.Linear(2, 3)) is None
