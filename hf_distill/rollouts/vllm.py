"""The engine "vllm": vLLM on the training devices or on a server, through TRL."""

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel, gather_object
from peft import PeftModel
from torch import nn
from trl.import_utils import is_vllm_available

from hf_distill.models.modes import kept_rng
from hf_distill.models.structure import is_sharded
from hf_distill.rollouts.generate import manual_seed
from hf_distill.rollouts.sampling import Sampling, cut_at_end_token, end_token_ids

# What the engine itself gives to TRL
GIVEN = (
    "model",
    "accelerator",
    "processing_class",
    "temperature",
    "max_completion_length",
    "logprobs",
    "generation_kwargs",
)


def _trl() -> Any:
    # imported here: it reads vLLM's client code, which no other engine needs
    return importlib.import_module("trl.generation.vllm_generation").VLLMGeneration


def _plain(model: nn.Module) -> nn.Module:
    """Return the model without parallel wrapper and compiler; adapters stay."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def engine_options() -> list[str]:
    """Return the keys of engine_kwargs: what TRL's `VLLMGeneration` takes besides GIVEN."""
    return [name for name in inspect.signature(_trl()).parameters if name not in GIVEN]


@contextmanager
def _kept_frozen(model: nn.Module, copies: dict[str, torch.Tensor]) -> Iterator[None]:
    """Keep the frozen weights of a model with adapters, bit for bit, as they were.

    Merging adapters into them and taking them out again leaves a rounding error at every step, and
    the base model is a teacher.
    """
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    if not isinstance(model, PeftModel):
        frozen = {}
    for name, parameter in frozen.items():
        if name not in copies:
            copies[name] = parameter.detach().to("cpu", copy=True)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in frozen.items():
                parameter.copy_(copies[name])


class VLLMEngine:
    """Samples with vLLM, which gets the weights before the first sample after they have changed.

    Args:
        sampling: its settings; generation_kwargs are fields of vLLM's `SamplingParams`.
        engine_kwargs: arguments of TRL's `VLLMGeneration`: mode ("colocate" or "server"), ...
        model: the student, not wrapped; for "colocate" its `name_or_path` must be loadable.
        accelerator: the trainer's.
        processing_class: the tokenizer.

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(
        self,
        sampling: Sampling,
        engine_kwargs: Mapping[str, Any],
        model: nn.Module,
        accelerator: Accelerator,
        processing_class: Any,
    ) -> None:
        if not is_vllm_available():
            raise ImportError("engine 'vllm' needs vLLM: pip install 'trl[vllm]'")
        self._accelerator, self._model = accelerator, _plain(model)
        self._end_ids = end_token_ids(self._model, sampling.eos_token_id)
        self._stale = True
        self._copies: dict[str, torch.Tensor] = {}
        with kept_rng(accelerator.device):  # vLLM seeds torch when it starts
            self._vllm = _trl()(
                model=self._model,
                accelerator=accelerator,
                processing_class=processing_class,
                temperature=sampling.temperature,
                max_completion_length=sampling.max_completion_length,
                generation_kwargs={**sampling.generation_kwargs, "stop_token_ids": self._end_ids},
                **engine_kwargs,
            )

    def weights_changed(self) -> None:
        """Let the next sample send the weights first."""
        self._stale = True

    def _sync(self) -> None:
        if isinstance(self._model, PeftModel) and is_sharded(self._model):
            raise ValueError("engine 'vllm' cannot merge adapters into sharded parameters")
        with _kept_frozen(self._model, self._copies):
            self._vllm.sync_weights()
        self._stale = False

    def _agreed(self, number: int, seed: int) -> tuple[int, int]:
        """Return the largest number of prompts of any process, and the seed of this group of them.

        TRL cuts the completions of a group or of all processes into equal shares. The processes of
        one tensor-parallel group sample the same completions, so they need one seed.
        """
        pairs = gather_object([(number, seed)])
        group = getattr(self._vllm, "tensor_parallel_size", 1)
        first = self._accelerator.process_index // group * group
        return max(n for n, _ in pairs), pairs[first][1]

    def sample(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], seed: int
    ) -> list[list[int]]:
        """Return one list of ids per prompt. Every process must call it.

        Args:
            model: the model that this engine was made with, wrapped or not.
            prompts: lists of token ids.
            seed: of torch while vLLM samples, which decides on the training devices ("colocate");
                a server draws from a state of its own.

        Raises:
            ValueError: it is another model, or adapters on sharded parameters.
            RuntimeError: vLLM returned another number of completions.
        """
        if _plain(model) is not self._model:
            raise ValueError("engine 'vllm' samples from the model that it was made with only")
        if self._stale:
            self._sync()
        number, seed = self._agreed(len(prompts), seed)
        rows = [list(prompt) for prompt in prompts]
        rows += [rows[0]] * (number - len(rows))
        with kept_rng(self._accelerator.device):
            manual_seed(seed)
            _, completions, *_ = self._vllm.generate(rows, images=None, num_generations=1)
        if len(completions) != number:
            raise RuntimeError(f"vLLM returned {len(completions)} completions of {number} prompts")
        return [
            cut_at_end_token(completion, self._end_ids)
            for completion in completions[: len(prompts)]
        ]
