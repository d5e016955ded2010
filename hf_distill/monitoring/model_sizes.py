"""What a model holds, from its config alone: parameters by the units that engines join.

The model is built on the meta device, so nothing is read but the config, and no memory is taken.
"""

import copy
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
)

from hf_distill.models.structure import causal_lm, input_embeddings, output_head

# The axis of a weight that a style of a tensor parallel plan cuts; biases of "rowwise" stay whole
CUT_AXES: Mapping[str, int] = {
    **dict.fromkeys(("colwise", "colwise_rep", "colwise_gather_output", "packed_colwise"), -2),
    **dict.fromkeys(("rowwise", "rowwise_rep", "rowwise_split_input", "packed_rowwise"), -1),
    "embedding_rowwise": 0,
    "embedding_colwise": 1,
}


@dataclass(frozen=True)
class Parameter:
    """Describes a parameter; tied ones are one.

    unit: the name of the block that it is part of, "embeddings", "head" or "rest"; a tied head is
    in "head". axis: that tensor parallelism cuts, or None.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    trained: bool
    unit: str
    axis: int | None

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    def cut(self, parts: int, axis: int) -> int:
        """Return the elements of the largest of `parts` pieces along an axis."""
        if not self.shape:
            return self.numel
        size = self.shape[axis]
        return -(-size // parts) * (self.numel // size) if size else 0


class ModelSizes:
    """Builds a causal LM on the meta device, and lists its parameters.

    Args:
        config: of the model.
        dtype: that its weights are loaded in.
        lora_rank: adapters of this rank on all linear layers but the head are trained, and nothing
            else; None trains the whole model.
        frozen: nothing is trained, as in a teacher.

    Attributes:
        model: on the meta device, with adapters if there are some.
        parameters: each once.
        hidden: the width of the head's input.
        vocab: the rows of the head.
        tied: whether the head and the input embeddings are one parameter.

    Raises:
        ValueError: it is no causal LM with an output head, or the rank is below 1.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        lora_rank: int | None = None,
        frozen: bool = False,
    ) -> None:
        if lora_rank is not None and lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {lora_rank}")
        _check_causal_lm(config)
        # a copy, because Transformers writes the dtype into it
        self.config, self.dtype = copy.deepcopy(config), dtype
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        _check_reads_no_later_tokens(cast(Any, model).config)
        self.plan = _expanded_plan(model)
        if lora_rank is not None:
            model = adapted(model, lora_rank)
        self.model = model.requires_grad_(False) if frozen else model
        lm = causal_lm(model)
        head, embeddings = output_head(lm), input_embeddings(lm)
        if not isinstance(getattr(head, "weight", None), nn.Parameter):
            raise ValueError(f"a plan needs a model with an output head, got {type(lm).__name__}")
        self.vocab, self.hidden = head.weight.shape
        self.tied = embeddings is not None and getattr(embeddings, "weight", 0) is head.weight
        self.blocks = _blocks(lm)
        self.parameters = tuple(self._listed(lm, {id(head): "head", id(embeddings): "embeddings"}))

    def _listed(self, lm: nn.Module, special: Mapping[int, str]) -> Iterator[Parameter]:
        """Yield each parameter; those of the head first, so that a tied one is the head's."""
        of_block = {id(p): name for name, block in self.blocks.items() for p in block.parameters()}
        seen: set[int] = set()
        named = [(name, module) for name, module in lm.named_modules()]
        named.sort(key=lambda item: special.get(id(item[1])) != "head")
        for path, module in named:
            for name, p in module.named_parameters(path, recurse=False):
                if id(p) in seen:
                    continue
                seen.add(id(p))
                unit = special.get(id(module)) or of_block.get(id(p), "rest")
                plain = name.replace(".base_layer.", ".")
                style = self.plan.get(plain) or self.plan.get(plain.rpartition(".")[0])
                axis = _axis(style, plain, p)
                yield Parameter(name, tuple(p.shape), p.itemsize, p.requires_grad, unit, axis)

    @property
    def trains_head(self) -> bool:
        """Return whether the head's weight is trained."""
        return any(p.trained for p in self.parameters if p.unit == "head")

    def unit_elements(self) -> dict[str, int]:
        """Return the elements of each unit."""
        found: dict[str, int] = {}
        for p in self.parameters:
            found[p.unit] = found.get(p.unit, 0) + p.numel
        return found

    def largest_block(self) -> int:
        """Return the elements of the largest block; of all others together if none is known."""
        units = self.unit_elements()
        sizes = [size for name, size in units.items() if name in self.blocks]
        return max(sizes, default=units.get("rest", 0))


def _check_causal_lm(config: PreTrainedConfig) -> None:
    """Check that Transformers has a causal LM for a config, and that it is not a classifier's."""
    named = [x for x in config.architectures or () if x.endswith("ForSequenceClassification")]
    if named or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        what = named[0] if named else f"model type {config.model_type!r}"
        raise ValueError(f"a plan needs a causal language model, got {what}")


def _check_reads_no_later_tokens(config: PreTrainedConfig) -> None:
    """Check that a built model's attention is causal: that of an encoder's types is if told so.

    Types that can be encoders have masked LMs too; the others' `is_decoder` may be False unread.
    """
    can_be_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    can_be_encoder = can_be_encoder or config.model_type == "bert-generation"
    if can_be_encoder and getattr(config, "is_decoder", None) is False:
        raise ValueError(
            f"a plan needs a causal language model, got model type {config.model_type!r} with "
            "is_decoder=False, which reads later tokens"
        )


def adapted(model: nn.Module, rank: int) -> nn.Module:
    """Return a model with LoRA adapters of a rank on all linear layers but the head."""
    config = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of patterns that fit no module, and of GPT-2's axes
        return get_peft_model(cast(Any, model), config)


def _blocks(lm: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that engines wrap, by name: the model's classes that are not split."""
    names = set(getattr(lm, "_no_split_modules", None) or ())
    return {path: m for path, m in lm.named_modules() if type(m).__name__ in names}


def _expanded_plan(model: nn.Module) -> dict[str, str]:
    """Return the tensor parallel style of each module and parameter, or none without a plan."""
    plan = getattr(model, "tp_plan", None)
    return cast(Any, model)._expand_parallel_plan(plan) if plan else {}


def _axis(style: str | None, name: str, p: nn.Parameter) -> int | None:
    """Return the axis of a parameter that a style cuts."""
    axis = CUT_AXES.get(style or "")
    if axis is None or "lora_" in name:
        return None
    if p.ndim == 1:  # a bias: cut with the outputs, whole where inputs are cut
        return 0 if axis == -2 else None
    return axis


def load_config(name: str) -> PreTrainedConfig:
    """Return the config of a model of the hub, or of a folder with config.json.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"a model's folder must have a config.json, got {name!r}")
    logging.getLogger("transformers.configuration_utils").setLevel(logging.ERROR)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        text = str(error).split("\n")[0]
        raise ValueError(
            f"a model must be a folder with config.json or a name of the hub, got {name!r}: {text}"
        ) from error


def parallel_sizes(config: PreTrainedConfig) -> dict[str, int]:
    """Return what tensor parallelism cuts into equal parts, by the config's names."""
    text = config.get_text_config()
    names = ("num_attention_heads", "num_key_value_heads")
    found = {name: getattr(text, name, None) for name in names}
    return {name: size for name, size in found.items() if isinstance(size, int)}
