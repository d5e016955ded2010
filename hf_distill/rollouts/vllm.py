"""The engine "vllm": vLLM on the training devices or on a server, through TRL."""

import importlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
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

logger = logging.getLogger(__name__)

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


DTYPE = "dtype"  # of colocated vLLM, which TRL does not pass on


def _module() -> Any:
    # imported here: it reads vLLM's client code, which no other engine needs
    return importlib.import_module("trl.generation.vllm_generation")


def _plain(model: nn.Module) -> nn.Module:
    """Return the model without parallel wrapper and compiler; adapters stay."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def engine_options() -> list[str]:
    """Return the keys of engine_kwargs: dtype, and what TRL takes besides GIVEN."""
    taken = inspect.signature(_module().VLLMGeneration).parameters
    return [*(name for name in taken if name not in GIVEN), DTYPE]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(no version)"


def check_needs(mode: str, dtype: str | None, accelerator: Accelerator, model: nn.Module) -> None:
    """Check what vLLM needs before it is started, and log in which dtype it samples.

    Args:
        mode: "colocate" or "server".
        dtype: that colocated vLLM is told, or None.
        accelerator: the trainer's.
        model: the student.

    Raises:
        ValueError: a server without a CUDA device here to send weights from, or with a dtype.
    """
    if mode == "server" and accelerator.device.type != "cuda":
        raise ValueError(
            "engine 'vllm' with mode 'server' sends the weights by NCCL, which needs a CUDA device "
            f"for training, got {accelerator.device.type!r}: take engine 'generate' or 'continuous'"
        )
    if mode == "server" and dtype is not None:
        raise ValueError(
            f"engine_kwargs dtype is for mode 'colocate', got {dtype!r}: a server is started with "
            "vllm serve --dtype"
        )
    floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    told = f"with --dtype float32 (mode {mode!r})"
    if mode == "colocate":
        told = "by rollout.engine_kwargs = {'dtype': 'float32'}"
    if torch.float32 in floats and dtype is None and accelerator.mixed_precision != "bf16":
        logger.warning(
            "vLLM samples a float32 model in bfloat16 unless it is told otherwise, so completions "
            "are not quite the student's: tell it %s, or load the student in bfloat16",
            told,
        )
    logger.info(
        "engine vllm: vLLM %s through TRL %s, mode %s, dtype %s",
        _version("vllm"),
        _version("trl"),
        mode,
        dtype or "as vLLM chooses",
    )


@contextmanager
def _told(options: Mapping[str, Any]) -> Iterator[None]:
    """Let TRL start vLLM with more options than it has arguments for."""
    module = _module()
    if not options:
        yield
        return
    plain = module.LLM
    module.LLM = partial(plain, **options)
    try:
        yield
    finally:
        module.LLM = plain


def _check_loadable(llm: Any) -> None:
    """Check that new weights can be loaded into a colocated vLLM.

    On a CPU, vLLM packs the weights of linear layers when it loads them, and leaves empty ones
    behind, which the first sync would fail at with a shape. Seen in vLLM 0.32.

    Raises:
        ValueError: naming the first of them.
    """
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    empty = [name for name, parameter in model.named_parameters() if not parameter.numel()]
    if empty:
        raise ValueError(
            f"vLLM has packed the weights of {len(empty)} layers for this device, such as "
            f"{empty[0]!r}, and cannot be sent new ones: take engine 'generate' or 'continuous'"
        )


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
        engine_kwargs: arguments of TRL's `VLLMGeneration`: mode ("colocate" or "server"), ...; and
            dtype, such as "float32", of colocated vLLM.
        model: the student, not wrapped; for "colocate" its `name_or_path` must be loadable.
        accelerator: the trainer's.
        processing_class: the tokenizer.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: as `check_needs`; or vLLM cannot be sent weights on this device.
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
        self._sampling = sampling
        self._end_ids = end_token_ids(self._model, sampling.eos_token_id)
        self._stale = True
        self._copies: dict[str, torch.Tensor] = {}
        options = dict(engine_kwargs)
        told = {DTYPE: options.pop(DTYPE)} if DTYPE in options else {}
        mode = options.get("mode", "colocate")
        check_needs(mode, told.get(DTYPE), accelerator, self._model)
        with kept_rng(accelerator.device), _told(told):  # vLLM seeds torch when it starts
            self._vllm = _module().VLLMGeneration(
                model=self._model,
                accelerator=accelerator,
                processing_class=processing_class,
                temperature=sampling.temperature,
                max_completion_length=sampling.max_completion_length,
                generation_kwargs={**sampling.generation_kwargs, "stop_token_ids": self._end_ids},
                **options,
            )
        if mode == "colocate":
            _check_loadable(self._vllm.llm)

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
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        seed: int,
        max_new_tokens: int | None = None,
    ) -> list[list[int]]:
        """Return one list of ids per prompt. Every process must call it.

        Args:
            model: the model that this engine was made with, wrapped or not.
            prompts: lists of token ids.
            seed: of torch while vLLM samples, which decides on the training devices ("colocate");
                a server draws from a state of its own.
            max_new_tokens: as in `Engine.sample`.

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
        # TRL reads it anew in every call
        longest = self._sampling.at_most(max_new_tokens).max_completion_length
        self._vllm.max_completion_length = longest
        with kept_rng(self._accelerator.device):
            manual_seed(seed)
            _, completions, *_ = self._vllm.generate(rows, images=None, num_generations=1)
        if len(completions) != number:
            raise RuntimeError(f"vLLM returned {len(completions)} completions of {number} prompts")
        return [
            cut_at_end_token(completion, self._end_ids)
            for completion in completions[: len(prompts)]
        ]
