"""Says what this machine is, for messages and reports."""

import functools
import platform
import subprocess
from pathlib import Path

import torch


@functools.cache
def system() -> str:
    """Name the operating system with its version."""
    release = platform.mac_ver()[0]
    return f"macOS {release}" if release else f"{platform.system()} {platform.release()}"


@functools.cache
def chip() -> str:
    """Name the processor."""
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Name what the device's tensors live on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xpu":
        return torch.xpu.get_device_name(device)
    if device.type == "mps":
        return f"{torch.backends.mps.get_name()}, {torch.backends.mps.get_core_count()} GPU cores"
    return chip()


def describe(device: torch.device) -> str:
    """List the versions and names that a report needs."""
    return f"torch {torch.__version__}, {system()}, {device_name(device)}"
