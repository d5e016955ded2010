"""Runs a recipe in a process that accelerate takes for a device: on_cpu.py RECIPE ARGUMENTS."""

import importlib
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

from tests.hf_distill.engines import cpu  # noqa: E402

if __name__ == "__main__":
    torch.set_num_threads(1)
    cpu.take_processes_for_devices()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        cpu.without_compiled_ops()
    recipe = Path(sys.argv[1])
    sys.argv = sys.argv[1:]
    importlib.import_module(recipe.stem).main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
