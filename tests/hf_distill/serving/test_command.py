"""python -m hf_distill serve: what it says, and what it refuses."""

from pathlib import Path

import pytest

from hf_distill.__main__ import main
from hf_distill.serving import HiddenStateServer
from hf_distill.serving.hidden_model import Busy, HiddenModel, ModelQueue
from hf_distill.teachers.hidden_protocol import Row
from tests.hf_distill.trainers import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("model")
    models.llama().save_pretrained(made)
    models.tokenizer().save_pretrained(made)
    return str(made)


def test_a_folder_is_served(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[HiddenStateServer] = []

    def interrupted(self: HiddenStateServer) -> None:
        seen.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(HiddenStateServer, "serve_forever", interrupted)
    (tmp_path / "token").write_text("secret\n")
    more = ["--port", "0", "--token_file", str(tmp_path / "token"), "--dtype", "bfloat16"]
    assert main(["serve", folder, *more, "--device", "cpu", "--max_length", "20"]) == 0
    printed = capsys.readouterr().out
    assert f"serving {folder} at http://127.0.0.1:" in printed
    assert "32 hidden units in bfloat16, 61 logits" in printed
    (server,) = seen
    assert server.allows("Bearer secret")
    assert not server.allows(None)
    assert server.about.limits.length == 20
    assert server.about.tokenizer_sha256 is not None


def test_what_is_refused(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_TOKEN", raising=False)
    for more, words in (
        (["--host", "0.0.0.0"], "a server that other machines reach needs a token"),
        (["--token_env", "NO_TOKEN"], "the environment variable NO_TOKEN must hold"),
        (["--token_file", str(tmp_path / "none")], "none must hold the server's token"),
        (["--max_tokens", "0"], "max_tokens must be at least 1, got 0"),
        (["--dtype", "int8"], "dtype must be a floating-point dtype"),
    ):
        assert main(["serve", folder, "--port", "0", "--device", "cpu", *more]) == 1
        assert words in capsys.readouterr().err


def test_a_closed_queue_takes_nothing() -> None:
    waiting = ModelQueue(HiddenModel(models.llama(), 100), 2)
    assert waiting.submit([Row([3, 4], [0])]).result(20).shape == (1, 32)
    waiting.close()
    with pytest.raises(Busy):
        waiting.submit([Row([3, 4], [0])])
