"""The model that adapters were added to, found again in the model that has them.

With its adapters off, a model is the one before training if nothing else is trained and nothing was
taken out of its weights. Biases, and whatever else of the base is trained with adapters, are
therefore kept as they were. PiSSA, OLoRA, CorDA and LoRA-GA start with a product B A that they take
out of the base's weights: there the model before training has its adapters on, with their initial
values, which are kept.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

# values of LoRA's init_lora_weights that leave the base's weights as they are
KEEPING = (True, False, "gaussian", "eva", "orthogonal", "mica")

# Columns of B are orthogonal at the start of every initialisation that takes weights out of the
# base; rounding leaves 1e-6 in float32, a hundred steps of training 1e-2 and more
ORTHOGONAL = {torch.float32: 1e-4, torch.float64: 1e-4}
ORTHOGONAL_16_BIT = 2**-7
SAME_START = 1e-2  # of the largest entry of a product


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def has_adapters(model: nn.Module) -> bool:
    """Return whether a model has adapters of PEFT, in a `PeftModel` or injected into modules."""
    return isinstance(model, PeftModel) or any(
        isinstance(module, BaseTunerLayer) for module in model.modules()
    )


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switch the model's adapters off inside the block; afterwards all is as before.

    PEFT turns requires_grad on for all parameters of the active adapter when it comes back, also
    for those the user had frozen.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with _off(model):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _off(model: nn.Module) -> Iterator[None]:
    if isinstance(model, PeftModel):
        with ExitStack() as stack:
            with _without_warning_of_biases(model):
                stack.enter_context(model.disable_adapter())
            yield
        return
    kinds = BaseTunerLayer, AuxiliaryTrainingWrapper
    layers = [x for x in model.modules() if isinstance(x, kinds) and not x.disable_adapters]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def _without_warning_of_biases(model: PeftModel) -> Iterator[None]:
    """Hide PEFT's warning that biases stay as trained: they are put back."""
    if all(getattr(x, "bias", "none") == "none" for x in model.peft_config.values()):
        yield  # a filter would make Python show its other warnings again
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Careful, disabling adapter", UserWarning)
        yield


@contextmanager
def holding(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give the parameters these values inside the block, in their own dtype."""
    kept = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameters[name].data = value.to(kept[name].dtype)
        yield
    finally:
        for name, data in kept.items():
            parameters[name].data = data


def _of_adapters(model: nn.Module) -> set[int]:
    """Return ids of the parameters that adapters brought; without effect while these are off."""
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for name in module.adapter_layer_names:
                part = getattr(module, name, None)
                if isinstance(part, nn.Module):
                    found |= {id(p) for p in part.parameters()}
        elif isinstance(module, AuxiliaryTrainingWrapper):
            own = {id(p) for p in module.original_module.parameters()}
            found |= {id(p) for p in module.parameters()} - own
    return found


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """Return the config of each adapter by name, wherever in the model it was injected."""
    found: dict[str, Any] = {}
    for module in model.modules():
        configs = vars(module).get("peft_config")
        if isinstance(configs, Mapping):
            found |= configs
    return found


def check_not_merged(model: nn.Module) -> None:
    """Check that adapters are not merged into the weights.

    Raises:
        ValueError: one is.
    """
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ValueError(
                "the student's adapters must not be merged into its weights, where they are not "
                f"trained; {path} is merged: call unmerge_adapter() first"
            )


class _Product(NamedTuple):
    """Names a product B A that was taken out of a base weight."""

    path: str
    layer: Any
    adapter: str

    def factors(self) -> dict[str, nn.Parameter]:
        """Return A and B, by their names in the model."""
        found = {"A": self.layer.lora_A, "B": self.layer.lora_B}
        return {
            f"{self.path}.lora_{which}.{self.adapter}.weight": layers[self.adapter].weight
            for which, layers in found.items()
        }


def _products(model: nn.Module, adapters: Mapping[str, str]) -> list[_Product]:
    return [
        _Product(path, module, name)
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
        for name in adapters
        if name in module.lora_A
    ]


INSTEAD = "give the model before training as a teacher of its own"


def _taken_out(configs: Mapping[str, Any]) -> dict[str, str]:
    """Return the adapters that took their start out of the base's weights, and how.

    Raises:
        ValueError: the weights before cannot be had again.
    """
    found = {}
    for name, config in configs.items():
        how = getattr(config, "init_lora_weights", True)
        lost = None
        if getattr(config, "layer_replication", None):
            lost = f"layer_replication {config.layer_replication} has repeated its layers"
        elif getattr(config, "kasa_config", None) is not None:
            lost = "KaSA has cut its weights' smallest singular values off"
        elif how == "loftq":
            lost = "LoftQ has quantized its weights"
        if lost:
            raise ValueError(
                f"the model before adapter {name!r} cannot be had again: {lost}; {INSTEAD}"
            )
        if how not in KEEPING:
            found[name] = str(how)
    return found


def _check_initial(products: list[_Product], taken: Mapping[str, str]) -> None:
    """Check that the adapters are active, and as they were initialised.

    Raises:
        ValueError: they are not; the message says why that must be.
    """
    for path, layer, name in products:
        why = (
            f"adapter {name!r} ({taken[name]}) was taken out of the base's weights, so the model "
            "before training has it on, with its initial values"
        )
        if name not in layer.active_adapters or layer.disable_adapters:
            raise ValueError(f"{why}; it must be active, and is not in {path}: {INSTEAD}")
        for other in layer.active_adapters:
            if other not in taken and other in layer.lora_A and _has_effect(layer, other):
                raise ValueError(
                    f"{why}; {other!r}, which is active too, must not change {path}: {INSTEAD}"
                )
        if not _is_initial(layer, name):
            raise ValueError(
                f"{why}; {path} was trained before, and its initial values are not known: "
                f"{INSTEAD}, or resume with a new adapter and train(resume_from_checkpoint=...)"
            )


@torch.no_grad()
def _has_effect(layer: Any, name: str) -> bool:
    factors = layer.lora_A[name].weight, layer.lora_B[name].weight
    return all(bool(factor.any()) for factor in factors)


@torch.no_grad()
def _is_initial(layer: Any, name: str) -> bool:
    b = layer.lora_B[name].weight
    dtypes = b.dtype, layer.get_base_layer().weight.dtype
    limit = max(ORTHOGONAL.get(dtype, ORTHOGONAL_16_BIT) for dtype in dtypes)
    wide = b.flatten(1).to(torch.promote_types(b.dtype, torch.float32))
    gram = wide.T @ wide
    beside = gram - gram.diagonal().diag()
    return bool(beside.abs().max() <= limit * gram.diagonal().max())


class BaseOfAdapters:
    """Makes a model with adapters the one before training, for as long as it is asked.

    Args:
        model: the student, before training, not wrapped.

    Attributes:
        initial: by name, copies of what is trained and is not switched off with the adapters.

    Raises:
        ValueError: the model before training cannot be had; the message says why.
    """

    def __init__(self, model: nn.Module) -> None:
        self._taken = _taken_out(adapter_configs(model))
        products = _products(model, self._taken)
        _check_initial(products, self._taken)
        kept: dict[str, nn.Parameter] = trainable(model)
        if not products:
            switched_off = _of_adapters(model)
            with adapters_off(model):
                there = {id(p) for p in model.parameters()}  # adaption prompts are taken out
            kept = {n: p for n, p in kept.items() if id(p) in there - switched_off}
        self.initial = {name: p.detach().clone() for name, p in kept.items()}
        self._stays_on = bool(products)

    def __str__(self) -> str:
        """Say what it is, for the log."""
        size = sum(x.numel() * x.element_size() for x in self.initial.values()) / 2**20
        copied = f"a copy of {len(self.initial)} tensors, {size:,.1f} MiB"
        if self._stays_on:
            return (
                f"the student with its adapters' initial values, which {self._taken} took out of "
                f"the base's weights: {copied}"
            )
        if self.initial:
            return (
                f"the student with its adapters off, and what else is trained as it was: {copied}"
            )
        return "the student with its adapters off, no extra weights"

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """Make the model the one before training inside the block."""
        with nullcontext() if self._stays_on else adapters_off(model):
            if not self.initial:
                yield
                return
            with holding(dict(model.named_parameters()), self.initial):
                yield

    @contextmanager
    def scaled(self, model: nn.Module, share: float) -> Iterator[None]:
        """Make the model the one before training, with this share of its LoRA adapters' changes.

        A product that was taken out of the base is there at its start: the weight is
        base + scaling * (share * B A + (1 - share) * B0 A0), one product of twice the rank.
        """
        products = _products(model, self._taken)
        if not products:
            with rescale_adapter_scale(model, share):
                yield
            return
        parameters, values = {}, {}
        for product in products:
            factors = product.factors()
            parameters |= factors
            (name_a, a), (name_b, b) = ((name, x.detach()) for name, x in factors.items())
            starts = self.initial.get(name_a, a), self.initial.get(name_b, b)
            values[name_a] = torch.cat([a, starts[0]])
            values[name_b] = torch.cat([share * b, (1 - share) * starts[1]], dim=1)
        with holding(parameters, values):
            yield

    @torch.no_grad()
    def load(self, model: nn.Module, initial: Mapping[str, Tensor]) -> None:
        """Take the initial values of a checkpoint.

        Raises:
            ValueError: adapters that were taken out of the base started elsewhere there.
        """
        for product in _products(model, self._taken):
            a, b = product.factors()
            if a in self.initial and b in self.initial:
                self._check_start(product, *((x[b], x[a]) for x in (self.initial, initial)))
        for name, value in self.initial.items():
            value.copy_(initial[name])

    def _check_start(
        self, product: _Product, own: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]
    ) -> None:
        device = own[0].device
        mine, theirs = (
            b.to(device).flatten(1).float() @ a.to(device).flatten(1).float()
            for b, a in (own, other)
        )
        if (mine - theirs).abs().max() > SAME_START * mine.abs().max():
            raise ValueError(
                f"adapter {product.adapter!r} ({self._taken[product.adapter]}) must be taken out "
                "of the base's weights as in the run that wrote the checkpoint, but "
                f"{product.path} starts elsewhere: make it with the same seed and data"
            )
