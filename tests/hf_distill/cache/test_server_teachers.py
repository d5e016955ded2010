"""A cache belongs to the model behind a server, wherever that is, and to no other."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_distill import RemoteTeacher
from hf_distill.cache import CacheConfigMismatch, CachedTeacher, CacheReader, cache_log_probs
from tests.hf_distill.teachers.serving import Server, each_entry, listening
from tests.hf_distill.trainers import models

GIVEN: dict[str, Any] = {"data_collator": models.Pad(), "shard_rows": 4, "vocab_size": 61}
TOP_K = 6
Change = Callable[[Server], Any]


def rows() -> list[dict[str, Any]]:
    return models.rows()[:8]


@contextmanager
def writing(seed: int = 1, change: Change = lambda _: None) -> Iterator[Callable[..., list[int]]]:
    """A server, and a function that writes a cache from it and returns the asked rows' lengths."""
    server = Server(models.llama(seed))
    with listening(server), ExitStack() as stack:
        change(server)
        teacher = RemoteTeacher(server.url, "tiny", TOP_K, backoff=0.01, max_wait=5.0)
        stack.callback(teacher.close)

        def write(folder: Path, **changes: Any) -> list[int]:
            server.requests.clear()
            cache_log_probs(teacher, rows(), folder, **GIVEN | changes)
            asked = [len(x["prompt"]) for x in server.requests if "prompt_logprobs" in x]
            return [x for x in asked if x != 32]  # without the probe

        write.__dict__["teacher"] = teacher
        yield write


def interrupted(folder: Path) -> None:
    """Take away the second shard and the manifest, as if the writing had ended before."""
    (folder / "manifest.json").unlink()
    sorted((folder / "shards").glob("*.json"))[1].unlink()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that was interrupted."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with writing() as write:
        assert len(write(tmp_path / "cache")) == len(rows())
    interrupted(tmp_path / "cache")
    return tmp_path / "cache"


def teacher_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["config"]["teacher"]


def noise(size: float) -> Change:
    def change(server: Server) -> None:
        server.change = each_entry(
            lambda entries: {k: x | {"logprob": x["logprob"] - size} for k, x in entries.items()}
        )

    return change


def card(**fields: Any) -> Change:
    return lambda server: server.card.update(fields)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "change",
    [lambda _: None, noise(0.01), card(root="/elsewhere/tiny", dtype="float32")],
    ids=["same", "rounding", "moved folder"],
)
def test_the_same_model_elsewhere_goes_on(cache: Path, change: Change) -> None:
    before = teacher_of(cache)
    with writing(change=change) as write:
        assert len(write(cache)) == 4  # what was missing
        assert write.__dict__["teacher"].identity()["address"] != before["address"]
    assert teacher_of(cache) == before
    assert CacheReader(cache, verify="full").manifest.config["teacher"] == before


def test_what_the_manifest_says_of_a_server(cache: Path) -> None:
    found = teacher_of(cache)
    fingerprint = found.pop("fingerprint")
    assert len(fingerprint["ids"]) == 32
    assert {len(x) for x in fingerprint["log_probs"]} == {5}
    address = found.pop("address")
    assert address.startswith("tiny at http://127.0.0.1:")
    assert found == {
        "name_or_path": "/models/tiny",
        "revision": None,
        "config_sha256": None,
        "weights_fingerprint": None,
        "tail": "1 - entries",
        "dtype": None,
    }


BOTH = r"\[\d+ at -\d.*logits in 32 bits\] and \[\d+ at -\d.*logits in .* bits\)?\]"
OTHERS = {
    "model": (2, lambda _: None, rf"must be 0.02 nats apart in the mean at most, got .*: {BOTH}"),
    "a little": (1, noise(0.05), rf"0.02 nats apart in the mean at most, got 0.05: {BOTH}"),
    "name": (1, card(root="/models/other"), rf"/models/other .*names must end alike; .* {BOTH}"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused(cache: Path, name: str) -> None:
    seed, change, message = OTHERS[name]
    with writing(seed, change) as write:
        with pytest.raises(CacheConfigMismatch, match=message):
            write(cache)
        assert len(write(cache, overwrite=True)) == len(rows())


def loud(dtype: torch.dtype) -> Change:
    """Logits as large as those of a trained model, of which 16 bits round more."""

    def change(server: Server) -> None:
        with torch.no_grad():
            server.model.lm_head.weight.mul_(8)
        server.model = server.model.to(dtype)

    return change


@pytest.mark.usefixtures("cache")
def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    with writing(change=loud(torch.float32)) as write:
        write(tmp_path / "loud")
    with writing(change=loud(torch.bfloat16)) as write:
        message = rf"must be 0.02 nats apart in the mean at most, got 0.0[2-9].*: {BOTH}"
        with pytest.raises(CacheConfigMismatch, match=message):
            write(tmp_path / "loud")
        write(tmp_path / "loud", overwrite=True)
    with writing(change=card(dtype="float32")) as write:
        write(tmp_path / "said")
    with writing(change=card(dtype="bfloat16")) as write:
        message = rf"the dtypes float32 and bfloat16 must be the same; .* {BOTH}"
        with pytest.raises(CacheConfigMismatch, match=message):
            write(tmp_path / "said")


def test_the_same_model_is_not_overwritten(cache: Path) -> None:
    with writing(change=noise(0.01)) as write:
        assert len(write(cache, overwrite=True)) == 4


def test_other_settings_differ_as_before(cache: Path) -> None:
    with writing() as write, pytest.raises(CacheConfigMismatch, match=r"shard_rows = '4'"):
        write(cache, shard_rows=2)


def test_caches_of_earlier_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Their teacher is a name and the address, and no more."""
    cache = tmp_path / "cache"
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with writing() as write:
        with monkeypatch.context() as patch:
            patch.setattr(RemoteTeacher, "identity", lambda _: {})
            write(cache)
        old = teacher_of(cache)
        assert old == {
            "name_or_path": write.__dict__["teacher"].name,
            "revision": None,
            "config_sha256": None,
            "weights_fingerprint": None,
            "tail": "1 - entries",
        }
        columns = CachedTeacher(cache).columns(models.Pad()(rows()))  # it is read
        interrupted(cache)
        caplog.set_level(logging.WARNING)
        assert len(write(cache)) == 4
        assert "has no fingerprint, as those of earlier versions" in caplog.text
    assert teacher_of(cache) == old
    again = CachedTeacher(cache).columns(models.Pad()(rows()))
    assert all(torch.equal(columns[name], again[name]) for name in columns)
    interrupted(cache)
    with writing() as write, pytest.raises(CacheConfigMismatch, match=r"teacher\.name_or_path"):
        write(cache)  # nothing says that it is the same at another address
