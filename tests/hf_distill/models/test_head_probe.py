"""Scales, softcaps and cuts are found whatever they are called and whatever the dtype."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftMixedModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, RecurrentGemmaConfig
from transformers import RecurrentGemmaForCausalLM as RecurrentGemma

from hf_distill.data.sides import Side
from hf_distill.models.forward import Reader
from hf_distill.models.head_probe import adds_to_loss, fit_post, probe_head, ramp
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
PREDICTS = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 0, 1, 0, 0, 0]]).bool()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
After = Callable[[Tensor], Tensor]


def llama_then(after: After) -> LlamaForCausalLM:
    """A model with code of its own behind the head."""

    class Then(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = after(out.logits)
            return out

    torch.manual_seed(0)
    return Then(LlamaConfig(**models.SIZES)).eval()


def capped(cap: float, scale: float = 1.0) -> After:
    return lambda x: cap * torch.tanh(x * scale / cap)


KNOWN: dict[str, tuple[After, tuple[float, float | None, int | None]]] = {
    "nothing": (lambda x: x, (1.0, None, None)),
    "a softcap": (capped(30.0), (1.0, 30.0, None)),
    "a low softcap": (capped(1.5), (1.0, 1.5, None)),
    "a high softcap": (capped(5000.0), (1.0, 5000.0, None)),
    "a scale": (lambda x: x * 1.02, (1.02, None, None)),
    "a divisor": (lambda x: x / 8, (0.125, None, None)),
    "both": (capped(20.0, 0.7), (0.7, 20.0, None)),
    "float32": (lambda x: capped(15.0)(x.float()), (1.0, 15.0, None)),
    "rounded before": (lambda x: capped(30.0)(x.bfloat16()), (1.0, 30.0, None)),
    "rounded after": (lambda x: (x * 1.02).bfloat16(), (1.02, None, None)),
    "cut": (lambda x: x[..., :50], (1.0, None, 50)),
    "cut and capped": (lambda x: capped(30.0)(x)[..., :50], (1.0, 30.0, 50)),
}

UNKNOWN: dict[str, After] = {
    "log-probabilities": lambda x: x.log_softmax(-1),
    "clamped": lambda x: x.clamp(-50, 50),
    "a masked entry": lambda x: x.index_fill(-1, torch.tensor([3]), -torch.inf),
    "a bias": lambda x: x + 0.01,
    "a scale of each position": lambda x: x * torch.arange(1, x.shape[1] + 1)[:, None],
    "another order": lambda x: x.flip(-1),
    "a soft clamp": lambda x: 30 * x / (30 + x.abs()),
}


def is_near(found: float | None, want: float | None, rel: float = 1e-6) -> bool:
    return found is want if want is None else found == pytest.approx(want, rel=rel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", KNOWN)
def test_what_follows_the_head_is_found(case: str, dtype: torch.dtype) -> None:
    after, want = KNOWN[case]
    found = probe_head(llama_then(after).to(dtype), IDS)
    assert not isinstance(found, str)
    # logits in 8 bits of mantissa tell a scale to half of the last one
    rel = 2.0**-8 if case == "rounded after" else 1e-6
    assert [is_near(*pair, rel) for pair in zip(found, want, strict=True)] == [True] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_no_scale_or_softcap_is_refused(case: str, dtype: torch.dtype) -> None:
    found = probe_head(llama_then(UNKNOWN[case]).to(dtype), IDS)
    assert found == "the logits are not a scale and softcap of the head's output"


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_softcap_by_another_name(dtype: torch.dtype) -> None:
    """The logits are too small to show it in 16 bits; later ones would not be."""
    torch.manual_seed(0)
    sizes = {"head_dim": 8, "lru_width": 32, "num_hidden_layers": 3, "logits_soft_cap": 30.0}
    model = RecurrentGemma(RecurrentGemmaConfig(**models.SIZES | sizes)).eval().to(dtype)
    reader, side = Reader("student"), Side({"input_ids": IDS}, PREDICTS)
    assert reader.reads_hidden(model, side.inputs)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(200)
        own = model(input_ids=IDS).logits[PREDICTS].float()
        read = reader.signal(model, side).dense().float()
    assert own.abs().max() > 20
    # a softcap's derivative is at most 1: roundings of raw logits of some hundred, once each
    eps = torch.finfo(dtype).eps
    assert (own - read).abs().max() <= 8 * eps * 100


@pytest.mark.parametrize("head", ["hidden", "logits"])
def test_cut_logits_are_read_alike_on_both_paths(head: str) -> None:
    model = llama_then(KNOWN["cut and capped"][0])
    reader = Reader("student", "told so" if head == "logits" else None)
    signal = reader.signal(model, Side({"input_ids": IDS}, PREDICTS))
    assert (signal.hidden is not None) == (head == "hidden")
    assert signal.vocab == 50
    with torch.no_grad():
        want = model(input_ids=IDS).logits[PREDICTS]
    # 32 products of a head whose logits are below 1, in any order
    torch.testing.assert_close(signal.dense(), want, rtol=0, atol=4e-6)


class TrainedScale(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * self.scale
        return out


def test_a_scale_that_is_trained_is_not_taken_for_a_number() -> None:
    model = TrainedScale(LlamaConfig(**models.SIZES)).eval()
    assert probe_head(model, IDS) == "what follows the head is trained"
    model.requires_grad_(False)
    assert probe_head(model, IDS) == (1.3, None, None)


class Quantized(Tensor):
    """A weight whose type only its own functions know, like those of torchao."""


def subclass_head() -> nn.Module:
    model = models.llama()
    weight = model.lm_head.weight.detach().as_subclass(Quantized)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    return model


def offloaded_head() -> nn.Module:
    model = models.llama()
    model.lm_head.to("meta")
    return model


def wrapped_head() -> nn.Module:
    """A forward of the head's own, as hooks for offloading set it, that is not linear."""
    model = models.llama()
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: forward(x) * 1.003  # lost in the rounding of bfloat16
    return model.bfloat16()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (subclass_head, "the head's weight is a tests Quantized"),
        (offloaded_head, "the head's weight is not kept on a device"),
        (wrapped_head, "the head does more than a linear map"),
    ],
)
def test_heads_that_the_op_must_not_get(make: Any, reason: str) -> None:
    found = probe_head(make(), IDS)
    assert isinstance(found, str)
    assert found.startswith(reason)


def test_a_head_of_torchao_is_read_by_logits() -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = models.llama()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert "the head's weight is a torchao" in str(probe_head(model, IDS))


def adalora(model: nn.Module) -> nn.Module:
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=6, target_r=4, total_step=10, target_modules=["q_proj"]
    )
    return get_peft_model(model, config)


def test_adapters_that_add_to_the_loss_are_told_from_others() -> None:
    mixed = PeftMixedModel(models.llama(), LoraConfig(target_modules=["q_proj"]), "default")
    inputs = {"input_ids": IDS}
    for model, adds in (
        (models.llama(), False),
        (models.lora(models.llama()), False),
        (mixed, False),
        (adalora(models.llama()), True),
    ):
        assert adds_to_loss(model, inputs) is adds
        assert probe_head(model, inputs) == (1.0, None, None)


def test_what_an_adapter_adds_to_the_loss_may_be_0_at_its_start() -> None:
    """It has a gradient as soon as the adapter is trained."""
    model = models.lora(models.llama())
    own = [p for name, p in model.named_parameters() if "lora_B" in name]
    forward = model.forward

    def with_penalty(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + sum(p.square().sum() for p in own)
        return outputs

    model.forward = with_penalty
    for parameter in own:
        nn.init.zeros_(parameter)
    assert adds_to_loss(model, {"input_ids": IDS})


class Twice(nn.Module):
    """A wrapper as X-LoRA's, whose first run makes something for the second."""

    def __init__(self, tuner: nn.Module) -> None:
        super().__init__()
        self.tuner = tuner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.tuner, name)

    def forward(self, **kwargs: Any) -> Any:
        asked = kwargs | {"output_hidden_states": True}
        assert self.model.forward(**asked).hidden_states
        return self.model(**kwargs)


class Kept(Twice):
    """A wrapper as that of adaption prompts: it has taken the model's forward before."""

    def __init__(self, tuner: nn.Module) -> None:
        super().__init__(tuner)
        self.forward = self.model.forward


class Changing(Twice):
    def forward(self, **kwargs: Any) -> Any:
        out = self.model(**kwargs)
        return type(out)(logits=out.logits * 2)


@pytest.mark.parametrize(
    ("wrapper", "reason"),
    [
        (Twice, "its wrapper Twice runs the model 2 times a call"),
        (Kept, "its wrapper Kept has kept the model's forward, which cannot be replaced there"),
        (Changing, "its wrapper Changing changes the model's logits"),
    ],
)
def test_wrappers_that_do_not_pass_on_what_is_read_inside(wrapper: Any, reason: str) -> None:
    model = models.lora(models.llama())
    model.base_model = wrapper(model.base_model)
    assert probe_head(model, IDS) == reason


def test_the_probe_of_a_batch_with_images_makes_few_logits() -> None:
    model, sizes = models.llama(), []
    rows = IDS.repeat(2, 40)
    model.lm_head.register_forward_hook(lambda _, __, out: sizes.append(out.shape[:-1].numel()))
    assert probe_head(model, {"input_ids": rows}) == (1.0, None, None)
    assert max(sizes) <= 8


def test_no_graph_is_left_in_what_a_model_keeps() -> None:
    """Some keep the states of their last call, and could not be copied with a graph in them."""
    torch.manual_seed(0)
    sizes = {"head_dim": 8, "lru_width": 32, "num_hidden_layers": 3}
    model = RecurrentGemma(RecurrentGemmaConfig(**models.SIZES | sizes)).eval()
    probe_head(model, IDS)
    copy.deepcopy(model)


def test_numbers_of_the_config_come_first() -> None:
    x = ramp((1, 4, 61), torch.device("cpu"))
    config = models.cohere().config
    assert fit_post(x, x * torch.tensor(0.6), config) == (0.6, None)
    scale, softcap = fit_post(x, x / 3, None) or (0.0, 0.0)
    assert is_near(scale, 1 / 3, 1e-7)
    assert softcap is None
    assert fit_post(x, torch.full_like(x, torch.nan), config) is None
