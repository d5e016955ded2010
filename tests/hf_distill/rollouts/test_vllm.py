"""The engine "vllm" against a stand-in for TRL's VLLMGeneration: vLLM itself is not here."""

import inspect
import itertools
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from trl.generation import vllm_generation

from hf_distill import OPSDConfig, OPSDTrainer
from hf_distill.rollouts import Sampling, make_engine, vllm
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

PROMPTS = [[5, 6, 7], [8], [20, 21]]
REAL = vllm_generation.VLLMGeneration
CHECK_NEEDS = vllm.check_needs


class StandIn:
    """Takes what the real one takes, notes its calls, and answers from a script."""

    made: "list[StandIn]"
    script: list[list[int]] | None = None
    __signature__ = inspect.signature(REAL)

    def __init__(self, **kwargs: Any) -> None:
        self.__signature__.bind(**kwargs)  # every argument exists, none is missing
        self.kwargs, self.events = kwargs, []
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=kwargs["model"]))
        executor = SimpleNamespace(driver_worker=worker)
        self.llm = SimpleNamespace(llm_engine=SimpleNamespace(model_executor=executor))
        self.tensor_parallel_size = kwargs.get("tensor_parallel_size", 1)
        torch.manual_seed(0)  # as vLLM does
        StandIn.made.append(self)

    def sync_weights(self) -> None:
        model = self.kwargs["model"]
        if hasattr(model, "merge_adapter"):
            model.merge_adapter()
        merged = {n: p.detach().clone() for n, p in model.named_parameters()}
        if hasattr(model, "merge_adapter"):
            model.unmerge_adapter()
        self.events.append(("sync", merged))

    def generate(self, *args: Any, **kwargs: Any) -> tuple:
        inspect.signature(REAL.generate).bind(self, *args, **kwargs)
        prompts = args[0] if args else kwargs["prompts"]
        self.events.append(("generate", prompts, torch.initial_seed(), kwargs))
        if StandIn.script is not None:
            return prompts, StandIn.script, None, None
        noise = torch.randint(10, 50, (len(prompts), 3)).tolist()
        return prompts, [[*row, models.EOS, 4] for row in noise], None, None

    @property
    def names(self) -> str:
        return " ".join(event[0] for event in self.events)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    StandIn.made, StandIn.script = [], None
    monkeypatch.setattr(vllm_generation, "VLLMGeneration", StandIn)
    monkeypatch.setattr(vllm, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm, "check_needs", lambda *_: None)  # it is tested by itself


def sampling(**changes: Any) -> Sampling:
    settings = {
        "pad_token_id": models.PAD,
        "eos_token_id": models.EOS,
        "max_completion_length": 9,
        "temperature": 0.7,
    }
    return Sampling(**settings | changes)


def engine(model: nn.Module, options: Any = None, **changes: Any) -> Any:
    accelerator, tokenizer = Accelerator(cpu=True), models.tokenizer()
    return make_engine(
        "vllm",
        sampling(**changes),
        engine_kwargs=options,
        model=model,
        accelerator=accelerator,
        processing_class=tokenizer,
    )


def test_without_vllm_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ImportError, match=r"engine 'vllm' needs vLLM: pip install 'trl\[vllm\]'"):
        engine(models.llama())


@pytest.mark.parametrize(
    ("mode", "dtype", "device", "words"),
    [
        ("server", None, "cpu", "by NCCL, which needs a CUDA device for training, got 'cpu'"),
        ("server", "float32", "cuda", "dtype is for mode 'colocate', got 'float32': .*--dtype"),
    ],
)
def test_what_vllm_needs_is_said_before_it_starts(
    mode: str, dtype: str | None, device: str, words: str
) -> None:
    accelerator: Any = SimpleNamespace(device=torch.device(device), mixed_precision="no")
    with pytest.raises(ValueError, match=words):
        CHECK_NEEDS(mode, dtype, accelerator, models.llama())


@pytest.mark.parametrize(
    ("weights", "mode", "dtype", "mixed_precision", "warns"),
    [
        (torch.float32, "colocate", None, "no", r"rollout.engine_kwargs = {'dtype': 'float32'}"),
        (torch.float32, "server", None, "no", r"with --dtype float32 \(mode 'server'\)"),
        (torch.float32, "colocate", "float32", "no", None),
        (torch.float32, "colocate", None, "bf16", None),  # the student runs in it too
        (torch.bfloat16, "colocate", None, "no", None),
    ],
)
def test_a_float32_student_in_bfloat16_is_said(
    weights: torch.dtype,
    mode: str,
    dtype: str | None,
    mixed_precision: str,
    warns: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    accelerator: Any = SimpleNamespace(device=torch.device("cuda"), mixed_precision=mixed_precision)
    caplog.set_level(logging.INFO, "hf_distill")
    CHECK_NEEDS(mode, dtype, accelerator, models.llama().to(weights))
    *said, chosen = [record.getMessage() for record in caplog.records]
    assert f"mode {mode}, dtype {dtype or 'as vLLM chooses'}" in chosen
    assert len(said) == (warns is not None)
    assert warns is None or re.search(warns, said[0])


def test_the_dtype_is_given_to_vllm_and_not_to_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    plain = lambda **options: made.append(options)
    monkeypatch.setattr(vllm_generation, "LLM", plain, raising=False)

    class Starting(StandIn):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            vllm_generation.LLM(model="name")

    monkeypatch.setattr(vllm_generation, "VLLMGeneration", Starting)
    engine(models.llama(), {"dtype": "float32", "max_num_seqs": 3})
    assert made == [{"model": "name", "dtype": "float32"}]
    assert "dtype" not in StandIn.made[0].kwargs
    assert StandIn.made[0].kwargs["max_num_seqs"] == 3
    assert vllm_generation.LLM is plain


def test_packed_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.32 on a CPU leaves empty weights where it has packed them."""

    class Packing(StandIn):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            model = models.copied(kwargs["model"])
            model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.empty(0))
            self.llm.llm_engine.model_executor.driver_worker.model_runner.model = model

    monkeypatch.setattr(vllm_generation, "VLLMGeneration", Packing)
    message = "packed the weights of 1 layers for this device, such as 'model.layers.1.mlp.up_proj"
    with pytest.raises(ValueError, match=message):
        engine(models.llama())


def test_what_trl_is_given() -> None:
    model = models.llama()
    model.generation_config.eos_token_id = [9, 2]
    options = {"mode": "server", "server_port": 9, "repetition_penalty": 1.1}
    made = engine(model, options, generation_kwargs={"frequency_penalty": 0.5})
    (stand_in,) = StandIn.made
    given = dict(stand_in.kwargs)
    assert given.pop("model") is model
    assert given.pop("accelerator") is made._accelerator
    assert given.pop("processing_class").eos_token_id == models.EOS
    assert given == options | {
        "temperature": 0.7,
        "max_completion_length": 9,
        "generation_kwargs": {"frequency_penalty": 0.5, "stop_token_ids": [2, 9]},
    }


def test_ids_come_back_unchanged_and_end_at_the_first_end_token() -> None:
    model = models.llama()
    model.generation_config.eos_token_id = 9
    made = engine(model)
    StandIn.script = [[4, 9, 2], [0, 5, 0], [2]]
    assert made.sample(model, PROMPTS, 3) == [[4, 9], [0, 5, 0], [2]]
    _, prompts, _, kwargs = StandIn.made[0].events[-1]
    assert prompts == PROMPTS
    assert kwargs == {"images": None, "num_generations": 1}


def test_a_call_may_sample_fewer_tokens_than_the_run() -> None:
    """TRL reads the attribute in every call; see its `generate`."""
    assert "self.max_completion_length" in inspect.getsource(REAL.generate)
    made = engine(models.llama())
    for asked, told in ((None, 9), (4, 4), (12, 9), (None, 9)):
        made.sample(made._model, PROMPTS, 3, max_new_tokens=asked)
        assert vars(StandIn.made[0])["max_completion_length"] == told


def test_weights_are_sent_once_before_the_first_sample_after_they_changed() -> None:
    model = models.llama()
    made = engine(model)
    made.sample(model, PROMPTS, 3)
    made.sample(model, PROMPTS, 4)
    assert StandIn.made[0].names == "sync generate generate"
    made.weights_changed()
    made.weights_changed()
    made.sample(model, PROMPTS, 5)
    assert StandIn.made[0].names == "sync generate generate sync generate"


def test_the_seed_decides_and_the_callers_random_state_is_untouched() -> None:
    before = torch.get_rng_state()
    model = models.llama()
    torch.set_rng_state(before)
    made = engine(model)
    first = made.sample(model, PROMPTS, 3)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    assert made.sample(model, PROMPTS, 3) == first
    assert made.sample(model, PROMPTS, 4) != first
    assert [e[2] for e in StandIn.made[0].events if e[0] == "generate"] == [3, 3, 4]


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning")
def test_a_wrapped_model_is_the_model_and_another_is_not() -> None:
    model = models.llama()
    made = engine(model)
    assert len(made.sample(torch.compile(model), PROMPTS, 3)) == 3
    with pytest.raises(ValueError, match="from the model that it was made with only"):
        made.sample(models.copied(model), PROMPTS, 3)


def test_a_missing_completion_is_an_error() -> None:
    model = models.llama()
    made = engine(model)
    StandIn.script = [[4], [5]]
    with pytest.raises(RuntimeError, match="vLLM returned 2 completions of 3 prompts"):
        made.sample(model, PROMPTS, 3)


def test_merged_adapters_are_sent_and_the_base_keeps_every_bit() -> None:
    model: Any = models.lora(models.llama().to(torch.bfloat16))
    original, loose = models.weights(model), models.copied(model)
    made = engine(model)
    for step in range(5):
        made.weights_changed()
        made.sample(model, PROMPTS, step)
        loose.merge_adapter()
        loose.unmerge_adapter()
    assert models.difference(models.weights(loose), original) > 0  # what merging leaves behind
    assert models.difference(models.weights(model), original) == 0
    sent = StandIn.made[0].events[0][1]
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    assert (sent[name] - original[name]).abs().max() > 0.01
    assert model.base_model.model.model.layers[0].self_attn.q_proj.merged is False


def test_trained_adapters_are_not_put_back() -> None:
    model: Any = models.lora(models.llama())
    made = engine(model)
    made.sample(model, PROMPTS, 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(1.0)
    want = models.weights(model)
    made.weights_changed()
    made.sample(model, PROMPTS, 2)
    assert models.difference(models.weights(model), want) == 0


def test_adapters_on_sharded_parameters_are_refused() -> None:
    model: Any = models.lora(models.llama())
    made = engine(model)
    next(iter(model.parameters())).ds_id = 0
    with pytest.raises(ValueError, match="cannot merge adapters into sharded parameters"):
        made.sample(model, PROMPTS, 1)


@pytest.mark.parametrize(
    ("rank", "group", "seed"), [(0, 1, 100), (3, 1, 103), (1, 2, 100), (3, 2, 102)]
)
def test_processes_agree_on_the_number_of_rows_and_a_group_on_its_seed(
    monkeypatch: pytest.MonkeyPatch, rank: int, group: int, seed: int
) -> None:
    """TRL cuts the answers into equal shares: a process with fewer prompts would get another's."""
    model = models.llama()
    made = engine(model, {"tensor_parallel_size": group})
    others = [(2, 100), (5, 101), (3, 102), (3, 103)]
    monkeypatch.setattr(vllm, "gather_object", lambda own: others[:rank] + own + others[rank + 1 :])
    monkeypatch.setattr(type(made._accelerator), "process_index", rank)
    number, own_seed = others[rank]
    own = [[10 + i] for i in range(number)]
    found = made.sample(model, own, own_seed)
    _, prompts, used, _ = StandIn.made[0].events[-1]
    assert len(prompts) == 5
    assert prompts[:number] == own
    assert len(found) == number
    assert used == seed


def trained(folder: Path, **changes: Any) -> Any:
    rollout = {"engine": "vllm", "engine_kwargs": {"mode": "server"}} | changes.pop("rollout", {})
    args = OPSDConfig(**models.options(folder, rollout=rollout, **changes))
    trainer = OPSDTrainer(
        models.llama(), args, train_dataset=models.problems(), processing_class=models.tokenizer()
    )
    trainer.train()
    return trainer


def test_training_sends_the_weights_once_a_step(tmp_path: Path) -> None:
    trainer = trained(tmp_path, max_steps=3, gradient_accumulation_steps=2)
    (stand_in,) = StandIn.made
    assert stand_in.names == "sync generate sync generate sync generate"
    sent = [event[1] for event in stand_in.events if event[0] == "sync"]
    assert all(models.difference(a, b) > 0 for a, b in itertools.pairwise(sent))
    assert models.difference(sent[0], models.weights(models.llama())) == 0
    assert models.difference(sent[-1], models.weights(trainer.model)) > 0  # one step behind


def test_repeated_rollouts_send_them_once_a_rollout(tmp_path: Path) -> None:
    trained(tmp_path, max_steps=4, rollout={"steps_per_rollout": 2})
    assert StandIn.made[0].names == "sync generate sync generate"


def test_evaluation_uses_the_weights_of_its_step(tmp_path: Path) -> None:
    args = models.options(tmp_path, rollout={"engine": "vllm"}, max_steps=1)
    trainer = OPSDTrainer(
        models.llama(),
        OPSDConfig(**args),
        train_dataset=models.problems(),
        eval_dataset=models.problems(4),
        processing_class=models.tokenizer(),
    )
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    (stand_in,) = StandIn.made
    assert stand_in.names == "sync generate sync generate sync generate"
    last = [event[1] for event in stand_in.events if event[0] == "sync"][-1]
    assert models.difference(last, models.weights(trainer.model)) == 0
