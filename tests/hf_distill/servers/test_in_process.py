"""Models of other libraries in this process as sources of log-probabilities: the docs' examples."""

import json
import subprocess
from pathlib import Path
from typing import Any

import convert_gguf
import pytest

from tests.hf_distill.servers import venvs


def example(engine: str, title: str, folder: Path, *arguments: Path) -> dict[str, Any]:
    """What `examples` prints."""
    words = [venvs.python(engine), "-m", "tests.hf_distill.servers.examples", title, *arguments]
    done = subprocess.run(
        [str(word) for word in words],
        env=venvs.environment(engine),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.real_engine("mlx")
def test_an_mlx_model_says_what_transformers_says(smollm2: Path, tmp_path: Path) -> None:
    found = example("mlx", "mlx_source.py", tmp_path, smollm2)
    # float32, in products and orders of its own
    assert found["apart"] < 1e-3
    assert found["best"] == 1
    assert found["elsewhere"] > 1
    assert found["cached"] < 0.02  # the codec's 16 and 8 bits
    # as transformers saves it, mlx-lm takes another rotary base: the copy is needed
    assert found["as_saved"]["apart"] > 1


@pytest.mark.real_engine("llama_cpp")
def test_a_gguf_file_says_nearly_what_its_dequantised_weights_say(
    smollm2: Path, tmp_path: Path
) -> None:
    gguf = convert_gguf._find_gguf(convert_gguf.SMOLLM2)
    assert gguf is not None
    found = example("llama_cpp", "gguf_source.py", tmp_path, smollm2, gguf)
    # llama.cpp rounds hidden states to 8 bits before it multiplies
    assert abs(found["divergence"]) < 0.03
    assert found["best"] > 0.9
    assert found["elsewhere"] > 1
    assert found["cached"] < 0.02
