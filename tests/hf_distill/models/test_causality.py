"""Models that read later tokens are told from those whose outputs only round differently."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from hf_distill.data.sides import Side
from hf_distill.models import causality
from hf_distill.models.causality import find_front
from hf_distill.models.forward import Reader
from hf_distill.models.probe_rows import ProbeRow, probe_row
from tests.hf_distill.trainers import models

pytestmark = [
    pytest.mark.filterwarnings(models.PEFT_WARNING),
    # of PEFT's prefix tuning
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
SIZES = {k: v for k, v in models.SIZES.items() if k != "num_key_value_heads"}
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DTYPES = (torch.float32, torch.bfloat16)


def row(model: nn.Module | None = None, ids: Tensor = IDS) -> ProbeRow:
    made = probe_row({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert made is not None
    return made


def mixtral() -> nn.Module:
    """Each expert computes what it is given at once, so other tokens change the rounding."""
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**models.SIZES, num_local_experts=4)).eval()


def bert(kind: type[nn.Module] = BertLMHeadModel, **changes: Any) -> nn.Module:
    """Its weights are so small that one token hardly moves the others: 1e-3 in float32."""
    torch.manual_seed(0)
    return kind(BertConfig(**SIZES, **CALM, **changes)).eval()


def roberta(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return RobertaForCausalLM(RobertaConfig(**SIZES, **CALM, **changes)).eval()


def xlnet() -> nn.Module:
    """Its embeddings are time-first."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "dropout": 0.0}
    return XLNetLMHeadModel(XLNetConfig(vocab_size=models.VOCAB, **sizes)).eval()


CAUSAL: dict[str, Callable[[], nn.Module]] = models.FAMILIES | {
    "mixtral": mixtral,
    "a decoder of BERT's kind": lambda: bert(is_decoder=True),
    "dropout": lambda: models.llama(attention_dropout=0.5).train(),
}

READERS: dict[str, Callable[[], nn.Module]] = {
    "a masked LM": lambda: bert(BertForMaskedLM),
    "BERT that is no decoder": bert,
    "RoBERTa that is no decoder": roberta,
    "XLNet": xlnet,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_pass(name: str, dtype: torch.dtype) -> None:
    for sharded in (False, True):
        found = find_front(CAUSAL[name]().to(dtype), row(), "student", sharded=sharded)
        assert found == (0, True)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", READERS)
def test_models_that_read_later_tokens_are_refused(
    name: str, dtype: torch.dtype, sharded: bool
) -> None:
    model = READERS[name]().to(dtype)
    if sharded:  # where no gradient tells, the move must be a large one, as in trained models
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(20)
    message = rf"the teacher must predict each token .* {type(model).__name__}'s logits before"
    with pytest.raises(ValueError, match=message):
        find_front(model, row(), "teacher", sharded=sharded)


class Noisy(LlamaForCausalLM):
    """Later tokens move earlier logits without a gradient, as scales of quantized inputs do."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        out = super().forward(input_ids, **kwargs)
        out.logits = out.logits + 0.01 * input_ids[:, -4:].sum()
        return out


class Sampling(LlamaForCausalLM):
    """Its forward draws, in eval mode too."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        out = super().forward(input_ids, **kwargs)
        out.logits = out.logits + torch.randn_like(out.logits)
        return out


@pytest.mark.parametrize("kind", [Noisy, Sampling])
def test_moves_without_a_gradient_are_no_reading(kind: type[LlamaForCausalLM]) -> None:
    model = kind(models.llama().config).eval()
    state = torch.get_rng_state()
    assert find_front(model, row(), "student") == (0, True)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("front", [0, 1, 3])
def test_outputs_of_virtual_tokens_are_counted(front: int, dtype: torch.dtype) -> None:
    kind = PromptTuningConfig if front else PrefixTuningConfig
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=front or 2)
    model = get_peft_model(models.llama(), config).to(dtype)
    assert find_front(model, row(), "teacher") == (front, True)


def test_a_prompt_tuned_masked_lm_is_refused() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="a BertLMHeadModel's logits before token 3"):
        find_front(get_peft_model(bert(), config), row(), "student")


def test_one_token_says_nothing() -> None:
    model = READERS["BERT that is no decoder"]()
    assert find_front(model, row(ids=IDS[:, :1]), "student") == (0, False)
    reader = Reader("student")
    short = Side({"input_ids": IDS[:, :1]}, torch.zeros(1, 1, dtype=torch.bool))
    for _ in range(2):
        reader.look(model, short)
    long = Side({"input_ids": IDS}, torch.ones_like(IDS).bool())
    with pytest.raises(ValueError, match="the student must predict each token"):
        reader.look(model, long)


def test_equal_tokens_are_exchanged_for_another() -> None:
    for token in (0, models.VOCAB - 1):
        ids = torch.full((1, 4), token)
        chosen = causality._exchange(row(ids=ids), None)
        assert chosen is not None
        at, position, changed = chosen
        assert (at, position) == (0, 2)
        assert changed[0, :2].tolist() == [token] * 2
        assert (changed[0, 2:] != token).all()
        assert changed.max() < models.VOCAB


def test_processes_with_pieces_of_a_model_call_it_as_often() -> None:
    """Whatever rows each of them has."""
    model, calls = models.llama(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    for ids in (IDS, IDS[:, :1]):
        calls.clear()
        assert find_front(model, row(ids=ids), "student", sharded=True) == (0, True)
        assert len(calls) == 2


def headless() -> nn.Module:
    return LlamaModel(models.llama().config).eval()


def seq2seq() -> nn.Module:
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
    config = T5Config(vocab_size=models.VOCAB, **sizes)
    return T5ForConditionalGeneration(config).get_encoder().eval()


class AsTuple(LlamaForCausalLM):
    """With return_dict=False."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs).to_tuple()


def as_tuple() -> nn.Module:
    return AsTuple(models.llama().config).eval()


@pytest.mark.parametrize("make", [headless, seq2seq, as_tuple])
def test_models_without_logits_are_refused(make: Callable[[], nn.Module]) -> None:
    model = make()
    message = f"the teacher must give logits of the next token, a {type(model).__name__} returns"
    with pytest.raises(ValueError, match=message):
        find_front(model, row(), "teacher")


def test_a_whole_batch_is_looked_at_with_few_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With images, say. What is exchanged is then a token that is scored: text for sure."""
    model, ids = models.llama(), torch.arange(5, 45).view(2, 20)
    inputs = {"input_ids": ids, "pixel_values": torch.zeros(3, 4)}
    whole = probe_row(inputs)
    assert whole is not None
    assert not whole.is_cut
    seen: list[Tensor] = []
    forward = model.forward

    def keep(input_ids: Tensor, pixel_values: Tensor) -> Any:
        seen.append(input_ids)
        out = forward(input_ids)
        assert out.logits.shape[-1] == 32  # hidden states in their place
        return out

    model.forward = keep
    scored = torch.zeros(2, 20, dtype=torch.bool)
    scored[1, [4, 9]] = True
    assert find_front(model, whole, "student", scored) == (0, True)
    assert (seen[0] != seen[1]).nonzero().tolist() == [[1, 10]]
    assert seen[1][1, 10] == seen[0][1, 5]
    monkeypatch.setattr(causality, "_moved", lambda *_: torch.ones(20))
    assert find_front(model, whole, "student", scored) == (0, True)  # the gradient says so
