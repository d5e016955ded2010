"""python -m hf_distill: caches on the command line, in one process and in two."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_distill import __main__, __version__
from hf_distill.__main__ import main
from hf_distill.cache import CacheReader, fingerprints
from tests.hf_distill.cache import caches
from tests.hf_distill.trainers import models
from tests.processes import run_two

ROOT = Path(__file__).parents[3]
SETTINGS = ["--codec", "topk", "--codec_settings", '{"top_k": 5}', "--shard_rows", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its tokenizer, and rows."""
    made = tmp_path_factory.mktemp("made")
    models.llama().save_pretrained(made / "model")
    models.tokenizer().save_pretrained(made / "model")
    lines = [json.dumps(row) + "\n" for row in models.problems(10)]
    (made / "rows.jsonl").write_text("".join(lines))
    return made


def arguments(folder: Path, path: Path, *more: str) -> list[str]:
    where = [str(folder / "model"), str(folder / "rows.jsonl"), str(path)]
    return ["cache", "write", *where, *SETTINGS, *more]


def test_a_cache_is_written_and_inspected(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cache"
    assert main(arguments(folder, path, "--seed", "3", "--batch_size", "2")) == 0
    config = CacheReader(path).manifest.config
    assert config["codec"]["name"] == "topk"
    assert (config["codec"]["settings"]["top_k"], config["codec"]["seed"]) == (5, 3)
    assert config["teacher"]["name_or_path"] == str(folder / "model")
    assert main(["cache", "inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "10 rows in 3 shards: sizes and sha256 are right" in printed
    assert "'top_k': 5" in printed
    shard = path / "shards/shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    assert main(["cache", "inspect", str(path), "--verify", "lazy"]) == 0
    assert main(["cache", "inspect", str(path)]) == 1
    assert "CacheCorrupt: " in capsys.readouterr().err


def test_another_cache_is_refused_or_overwritten(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, tmp_path)) == 0
    assert main(arguments(folder, tmp_path, "--hint", "Hint : {hint}")) == 1
    assert "CacheConfigMismatch: " in capsys.readouterr().err
    assert main(arguments(folder, tmp_path, "--hint", "Hint : {hint}", "--overwrite")) == 0
    hinted = caches.side(caches.collator(hint="Hint : {hint}"), models.problems(1))
    ids = hinted.inputs["input_ids"][0].tolist()
    assert CacheReader(tmp_path).match(fingerprints.side_rows(hinted)[0])[0].row == 0
    assert len(ids) > 10


def test_a_dtype_and_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    models.tokenizer(pad_is_eos=True).save_pretrained(tmp_path / "other")
    other = ["--tokenizer", str(tmp_path / "other"), "--dtype", "bfloat16"]
    assert main(arguments(folder, tmp_path / "cache", *other)) == 0
    config = CacheReader(tmp_path / "cache").manifest.config
    assert config["teacher"]["dtype"] == "bfloat16"
    assert config["tokenizer"]["name_or_path"] == str(tmp_path / "other")


def test_a_cache_is_measured_with_the_dtype_and_the_tokenizer_of_the_writing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = models.tokenizer()
    words.chat_template = words.chat_template.replace("<|im_end|>", "so")
    words.save_pretrained(tmp_path / "other")
    other = ["--tokenizer", str(tmp_path / "other"), "--dtype", "bfloat16"]
    assert main(arguments(folder, tmp_path / "cache", *other)) == 0
    dtypes, load = [], __main__.ModelTeacher

    def loaded(*given: Any, **more: Any) -> Any:
        made = load(*given, **more)
        dtypes.append(made.model.dtype)
        return made

    monkeypatch.setattr(__main__, "ModelTeacher", loaded)
    measured = ["--dataset", str(folder / "rows.jsonl")]
    assert main(["cache", "inspect", str(tmp_path / "cache"), *measured]) == 0
    assert dtypes == [torch.bfloat16]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--codec", "none"], "argument --codec: invalid choice: 'none'"),
        (["--codec_settings", "{"], "argument --codec_settings: must be JSON, got '{'"),
        (["--codec_settings", "3"], "must be a JSON object, got '3'"),
        (["--verify", "lazy"], "argument --verify: invalid choice: 'lazy'"),
    ],
)
def test_bad_arguments(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments(folder, tmp_path, *more))
    assert message in capsys.readouterr().err


def test_without_a_command_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert f"hf_distill {__version__}" in printed
    assert "cache" in printed


def launch(arguments: list[str]) -> str:
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    port = ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", *launch, *port, "-m", "hf_distill"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done.stderr


@pytest.mark.distributed
@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_write_the_same_bytes(folder: Path, tmp_path: Path, launched: bool) -> None:
    """Of a process group, and of `accelerate launch`."""
    words = arguments(folder, tmp_path / "two")
    printed = launch(words) if launched else run_two(tmp_path / "processes", main, words)
    assert "tokens/s" in printed
    assert "bytes/token" in printed
    main(arguments(folder, tmp_path / "one"))
    assert caches.contents(tmp_path / "two") == caches.contents(tmp_path / "one")
    sidecars = [path.read_text() for path in sorted((tmp_path / "two").glob("shards/*.json"))]
    assert [json.loads(text)["written_by"]["rank"] for text in sidecars] == [0, 1, 0]
