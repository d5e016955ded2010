"""Where the Triton tests run: on the GPU if there is one, else in Triton's interpreter.

Triton decides as it is imported whether it interprets, so this is imported before anything else
that may import Triton (tests/conftest.py does). It leaves no trace in the environment: with
TRITON_INTERPRET set, "auto" would choose the interpreter for every tensor of every other test.
"""

import importlib
import importlib.util
import os
from typing import Any

import numpy as np
import torch

NAME = "TRITON_INTERPRET"
KERNELS = ("terms", "rows", "hidden")  # modules, in order of import
DEVICE = next((d for d in ("cuda", "xpu") if getattr(torch, d).is_available()), "cpu")
MISSING = importlib.util.find_spec("triton") is None


def _convert(convert: Any, tl: Any) -> Any:
    """`convert` of the interpreter with bfloat16 rounded by PyTorch.

    Its own rounding loses the carry out of the significand: 1.999 becomes 1.
    """

    def converted(x: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) == (tl.bfloat16, tl.float32):
            return (x.astype(np.uint32) << 16).reshape(x.shape)
        if (source, target) == (tl.float32, tl.bfloat16):
            narrow = torch.from_numpy(np.ascontiguousarray(x)).bfloat16()
            return narrow.view(torch.int16).numpy().view(np.uint16).reshape(x.shape)
        return convert(x, source, target, rounding)

    return converted


def _typed(operate: Any, tl: Any) -> Any:
    """`binary_op` of the interpreter whose comparisons are of type bool.

    Its own have the type of what they compare: a scalar one cannot be joined with a block's.
    """

    def operated(self: Any, left: Any, right: Any, op: Any) -> Any:
        result = operate(self, left, right, op)
        if result.data.dtype == np.bool_:
            result.dtype = tl.int1
        return result

    return operated


def interpret() -> None:
    """Import Triton and the kernels to be interpreted."""
    before = os.environ.get(NAME)
    os.environ[NAME] = "1"
    try:
        interpreter: Any = importlib.import_module("triton.runtime.interpreter")
        standard: Any = importlib.import_module("triton.language.standard")
        modules = [importlib.import_module(f"metal_ops.backends.triton.{name}") for name in KERNELS]
    finally:
        if before is None:
            del os.environ[NAME]
        else:
            os.environ[NAME] = before
    function = interpreter.InterpretedFunction
    assert isinstance(standard.sum, function), (
        "import tests.metal_ops.triton.interpreter before Triton"
    )
    language: Any = importlib.import_module("triton.language")
    builder = interpreter.InterpreterBuilder
    builder.binary_op = _typed(builder.binary_op, language)
    interpreter._convert_float = _convert(interpreter._convert_float, language)
    # nothing to bring back to a device: the interpreter would copy each storage onto itself
    interpreter.GridExecutor._restore_args_dev = lambda *_: None
    # patch the language once, where the interpreter would at each call of each function
    patch, scope = interpreter._patch_lang, interpreter._LangPatchScope()
    for called in (standard.sum, modules[0].terms):
        patch(called.fn)
    interpreter._patch_lang = lambda _: scope


if not MISSING and DEVICE == "cpu":
    interpret()
