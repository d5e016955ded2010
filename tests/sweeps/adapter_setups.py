"""Adapters of every kind that the installed PEFT has, on tiny models, by name."""

import copy
import importlib
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners import lora as peft_lora
from peft.tuners.lora.config import CordaConfig
from peft.utils import PeftType
from torch import nn
from torch.utils.data import DataLoader

from tests.sweeps.reference import Pad, rows

TARGETS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "attention": ["q_proj", "v_proj"],
        "mlp": ["down_proj"],
        "norm": ["input_layernorm"],
        "head": "lm_head",
        "embeddings": "embed_tokens",
        "norm_name": "norm",
    },
    "gpt2": {
        "attention": ["c_attn"],
        "mlp": ["c_proj"],
        "norm": ["ln_1"],
        "head": "lm_head",
        "embeddings": "wte",
        "norm_name": "ln_f",
    },
}
TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
PROMPT: dict[str, Any] = {"num_virtual_tokens": 3}
PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "CARTRIDGE")

Make = Callable[[nn.Module, str], Any]


def batch(model: nn.Module) -> dict[str, Any]:
    """The sweep's rows, for initialisations that look at data."""
    return Pad(model)(rows())


# Arguments of a tuner's config beyond `target_modules`; PEFT's defaults are for larger models
TUNERS: Mapping[str, Mapping[str, Any]] = {
    "ADALORA": {"init_r": 6, "target_r": 4, "total_step": 10},
    "ADAMSS": {"r": 8, "num_subspaces": 2},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 20},
    "FROD": {"sparse_rate": 0.1, "progressbar": False},
    "GLORA": {"r": 4},
    "GRALORA": {"r": 4, "alpha": 8},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "LILY": {"r": 4},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "LORA": {"r": 4, "lora_alpha": 8},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "OSF": {"effective_rank": 8},
    "PEANUT": {"r": 4},
    "POLY": {"r": 4, "n_tasks": 2, "n_skills": 2},
    "PSOFT": {"r": 4, "psoft_alpha": 4},
    "PVERA": {"r": 8},
    "RANDLORA": {"r": 4, "randlora_alpha": 8},
    "ROAD": {"group_size": 8},
    "SHADOW": {"r": 4},
    "SHIRA": {"r": 2, "random_seed": 0},
    "SUPERTUNING": {"sparsity": 0.9},
    "TINYLORA": {"r": 2, "u": 8},
    "UNILORA": {"r": 4, "theta_d_length": 16},
    "VBLORA": {"r": 4, "num_vectors": 8, "vector_length": 8},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 20},
}


def _tuner(kind: str) -> Make:
    def make(model: nn.Module, base: str) -> Any:
        target = {"target_modules": TARGETS[base]["attention"]}
        given: dict[str, Any] = dict(TUNERS.get(kind, {}))
        if kind in PROMPTS:
            target, given = {}, dict(PROMPT)
        if kind == "P_TUNING":
            given["encoder_hidden_size"] = 16
        if kind == "MULTITASK_PROMPT_TUNING":
            target, given = {}, PROMPT | {"num_tasks": 2}
        if kind == "CPT":
            ids = {"cpt_token_ids": [5, 6, 7], "cpt_mask": [1, 1, 1]}
            target, given = {}, ids | {"cpt_tokens_type_mask": [1, 1, 2]}
        if kind == "ADAPTION_PROMPT":
            target, given = {}, {"adapter_len": 3, "adapter_layers": 2}
        if kind == "LN_TUNING":
            target = {"target_modules": TARGETS[base]["norm"]}
        if kind == "IA3":
            given = {"feedforward_modules": TARGETS[base]["mlp"]}
            target["target_modules"] = [*target["target_modules"], *TARGETS[base]["mlp"]]
        if kind == "TRAINABLE_TOKENS":
            target, given = {}, {"token_indices": [5, 6, 7]}
        config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]]
        return get_peft_model(model, config(**TASK, **target, **given))

    return make


def _xlora(model: Any, base: str) -> Any:
    adapters = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("0", "1"):  # PEFT numbers them, whatever their names
            adapters[name] = os.path.join(folder, name)
            config = LoraConfig(**TASK, r=4, target_modules=TARGETS[base]["attention"])
            get_peft_model(copy.deepcopy(model), config).save_pretrained(adapters[name])
        model.config.use_cache = False  # else it refuses the model
        config = peft.XLoraConfig(**TASK, hidden_size=32, xlora_size=8, adapters=adapters)
        return get_peft_model(model, config)


def lora_config(base: str, **changes: Any) -> LoraConfig:
    """A small LoRA config for a base model."""
    plain = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[base]["attention"]}
    return LoraConfig(**TASK, **plain | changes)


def _lora(**changes: Any) -> Make:
    """LoRA with other arguments; a value that is a function takes the base's name."""

    def make(model: nn.Module, base: str) -> Any:
        given = {k: v(base) if callable(v) else v for k, v in changes.items()}
        return get_peft_model(model, lora_config(base, **given))

    return make


def _named(*keys: str) -> Callable[[str], list[str]]:
    return lambda base: [TARGETS[base][key] for key in keys]


def _with_attention(key: str) -> Callable[[str], list[str]]:
    return lambda base: [*TARGETS[base]["attention"], TARGETS[base][key]]


def _two(active: str | list[str], **of_second: Any) -> Make:
    def make(model: nn.Module, base: str) -> PeftModel:
        adapted: Any = get_peft_model(model, lora_config(base))
        given = {k: v(base) if callable(v) else v for k, v in of_second.items()}
        adapted.add_adapter("second", lora_config(base, **given))
        if isinstance(active, list):
            adapted.base_model.set_adapter(active)
        else:
            adapted.set_adapter(active)
        return adapted

    return make


def _merged(model: nn.Module, base: str) -> Any:
    adapted: Any = get_peft_model(model, lora_config(base, init_lora_weights=False))
    adapted.merge_adapter()
    return adapted


def _eva(model: nn.Module, base: str) -> Any:
    config = lora_config(base, init_lora_weights="eva", eva_config=peft_lora.EvaConfig(rho=1.0))
    data: Any = [batch(model)]
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(adapted, DataLoader(data, batch_size=None))
    return adapted


def _lora_ga(model: nn.Module, base: str) -> Any:
    config = lora_config(base, init_lora_weights="lora_ga", lora_ga_config=peft_lora.LoraGAConfig())
    data = batch(model)
    peft_lora.preprocess_loraga(model, config, lambda: model(**data).loss.backward())
    model.zero_grad()
    return get_peft_model(model, config)


def _corda(model: nn.Module, base: str) -> Any:
    corda = importlib.import_module(
        "peft.tuners.lora.corda"
    )  # it needs a package that PEFT does not
    config = lora_config(base, init_lora_weights="corda", corda_config=CordaConfig())
    data = batch(model)
    corda.preprocess_corda(model, config, lambda: model(**data))
    return get_peft_model(model, config)


def _mixed(model: nn.Module, base: str) -> Any:
    adapted = get_peft_model(model, lora_config(base), mixed=True)
    target = TARGETS[base]["attention"]
    adapted.add_adapter("second", peft.LoHaConfig(**TASK, r=4, target_modules=target))
    adapted.set_adapter(["default", "second"])
    return adapted


def _library(model: Any, base: str) -> Any:
    model.add_adapter(lora_config(base))
    return model


def _replicated(model: nn.Module, base: str) -> Any:
    return get_peft_model(model, lora_config(base, layer_replication=[[0, 2], [0, 2]]))


VARIANTS: Mapping[str, Make] = {
    "lora all-linear": _lora(target_modules="all-linear"),
    "lora bias all": _lora(bias="all"),
    "lora bias lora_only": _lora(bias="lora_only"),
    "lora_bias": _lora(lora_bias=True),
    "lora dropout": _lora(lora_dropout=0.1),
    "rslora": _lora(use_rslora=True),
    "lora patterns": _lora(rank_pattern={"layers.0": 2}, alpha_pattern={"layers.0": 3}),
    "dora": _lora(use_dora=True),
    "lora gaussian": _lora(init_lora_weights="gaussian"),
    "lora orthogonal": _lora(init_lora_weights="orthogonal"),
    "lora not zero": _lora(init_lora_weights=False),
    "lora pissa": _lora(init_lora_weights="pissa"),
    "lora pissa_niter_4": _lora(init_lora_weights="pissa_niter_4"),
    "lora olora": _lora(init_lora_weights="olora"),
    "lora mica": _lora(init_lora_weights="mica"),
    "lora eva": _eva,
    "lora ga": _lora_ga,
    "lora corda": _corda,
    "lora kasa": _lora(kasa_config=peft_lora.KasaConfig()),
    "lora velora": _lora(velora_config=peft_lora.VeloraConfig(num_groups=4)),
    "lora monteclora": _lora(monteclora_config=peft_lora.MontecloraConfig()),
    "lora bd": _lora(
        use_bdlora=peft_lora.BdLoraConfig(["q_proj", "c_attn"], ["v_proj"], nblocks=2)
    ),
    "alora": _lora(alora_invocation_tokens=[1]),
    "lora save head": _lora(modules_to_save=_named("head")),
    "lora save embeddings": _lora(modules_to_save=_named("embeddings")),
    "lora save both": _lora(modules_to_save=_named("head", "embeddings")),
    "lora save norm": _lora(modules_to_save=_named("norm_name")),
    "lora on head": _lora(target_modules=_with_attention("head")),
    "lora on embeddings": _lora(target_modules=_with_attention("embeddings")),
    "lora tied": _lora(modules_to_save=_named("embeddings"), ensure_weight_tying=True),
    "lora tokens": _lora(trainable_token_indices=[5, 6, 7]),
    "lora parameters": _lora(
        target_modules=lambda base: TARGETS[base]["attention"][:1],
        target_parameters=lambda base: [f"{TARGETS[base]['mlp'][0]}.weight"],
    ),
    "lora replication": _replicated,
    "lora merged": _merged,
    "two loras": _two("second"),
    "two loras active": _two(["default", "second"]),
    "two loras, one saves the head": _two("second", modules_to_save=_named("head")),
    "mixed": _mixed,
    "add_adapter": _library,
    "inject_adapter_in_model": lambda model, base: inject_adapter_in_model(
        lora_config(base), model
    ),
}


def setups() -> dict[str, Make]:
    """Every tuner of the installed PEFT, and LoRA's variants, by name."""
    tuners = {kind.name.lower(): _tuner(kind.name) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    return dict(sorted(tuners.items())) | {"xlora": _xlora} | dict(VARIANTS)


def adapted(model: nn.Module, name: str, base: str) -> Any:
    """A model with the adapter of that name; random numbers depend on nothing else."""
    torch.manual_seed(7)
    return setups()[name](model, base)
