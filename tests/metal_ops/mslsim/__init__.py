"""Metal kernels on a CPU: `compile_shader` takes the place of torch.mps.compile_shader."""

from tests.metal_ops.mslsim.library import GpuError, Library, Run, Stats, Traffic, compile_shader

__all__ = ["GpuError", "Library", "Run", "Stats", "Traffic", "compile_shader"]
