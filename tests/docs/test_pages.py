"""Every Python block of README and docs runs, in the order of its page, with tiny models."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.docs import tiny
from tests.docs.fields import PAGES, ROOT

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# PEFT 0.21 reads a property that Transformers 5.23 has renamed
PEFT_WARNING = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
STEPS = 2


def examples(page: Path) -> list[tuple[int, str]]:
    """(number of lines before it, code) of each Python block."""
    text = page.read_text(encoding="utf-8")
    return [(text[: found.start(1)].count("\n"), found[1]) for found in BLOCK.finditer(text)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    tiny.save_all(folder)
    return folder


@pytest.fixture
def small_runs(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """Runs take two steps on the CPU and report nowhere; the trainers that have run."""
    check, train, ran = TrainingArguments.__post_init__, Trainer.train, []

    def small(self: Any) -> None:
        self.max_steps, self.use_cpu, self.report_to, self.disable_tqdm = STEPS, True, "none", True
        check(self)

    def counted(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        ran.append(self)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(TrainingArguments, "__post_init__", small)
    monkeypatch.setattr(Trainer, "train", counted)
    return ran


PAGES_WITH_EXAMPLES = [page for page in PAGES if examples(page)]


@pytest.mark.filterwarnings(PEFT_WARNING)
@pytest.mark.parametrize("page", PAGES_WITH_EXAMPLES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run(
    page: Path,
    hub: Path,
    small_runs: list[Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for folder in hub.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page"}
    calls = 0
    for lines, code in examples(page):
        exec(compile("\n" * lines + code, str(page), "exec"), names)
        calls += len(re.findall(r"^trainer\.train\(\)$|^train\(", code, re.MULTILINE))
    assert len(small_runs) == calls
    assert all(trainer.state.global_step == STEPS for trainer in small_runs)


def test_blocks_have_a_language() -> None:
    """A block without one would be code that nobody runs."""
    for page in PAGES:
        fences = re.findall(r"^\s*```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert all(fences[::2]), page
        assert not any(fences[1::2]), page
        # those with a title need an engine, and are run by tests/hf_distill/servers
        titled = {'python title="mlx_source.py"', 'python title="gguf_source.py"'}
        languages = {"python", "bash", "text", "yaml", "diff"}
        assert set(fences[::2]) <= languages | titled, page
