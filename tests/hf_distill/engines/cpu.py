"""Engines of accelerate on processes without a device: they are taken for ones that have one.

With `use_cpu` accelerate starts plain processes whatever engine is asked for. Here the device is
named "cpu" and the kind of the processes is that of GPUs; nothing else of an engine is changed.
"""

import importlib
import os
import sys
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel
from transformers import training_args


def _prepare_backend(*_: Any, **__: Any) -> tuple[str | None, DistributedType]:
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return (None, DistributedType.NO) if alone else ("gloo", DistributedType.MULTI_GPU)


def take_processes_for_devices() -> None:
    """Call it before anything asks accelerate for its state."""
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    PartialState._prepare_backend = _prepare_backend
    ddp_init = DistributedDataParallel.__init__

    def without_ids(self: Any, module: Any, *_: Any, **kwargs: Any) -> None:
        kwargs |= {"device_ids": None, "output_device": None}
        ddp_init(self, module, **kwargs)

    DistributedDataParallel.__init__ = without_ids
    torch.Tensor.pin_memory = lambda self, *_: self  # what is offloaded stays where it is
    training_args.is_torch_bf16_gpu_available = lambda: True


def without_compiled_ops() -> None:
    """DeepSpeed would build an operation in C++ for sums in shared memory; gloo adds as well."""
    importlib.import_module("deepspeed.comm.torch")
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # pyright: ignore
