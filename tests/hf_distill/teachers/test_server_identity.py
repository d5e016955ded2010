"""What a server is: it is asked at the start, compared with the student, and known again."""

import json
import logging
import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from hf_distill import RemoteTeacherError
from hf_distill.teachers.server_checks import MOST_IDS, count_ids
from hf_distill.teachers.server_identity import Fingerprint, same_name
from tests.hf_distill.teachers.asking import IDS, SIDE, prepared
from tests.hf_distill.teachers.conftest import Ask
from tests.hf_distill.teachers.serving import Server
from tests.hf_distill.teachers.test_remote_restart import Mortal, asking, mortal
from tests.hf_distill.trainers import models

__all__ = ["mortal"]  # a fixture

V = models.VOCAB


def test_one_line_says_what_the_server_is(
    server: Server, remote: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hf_distill")
    tokenizer = models.tokenizer()
    server.words = lambda i: tokenizer.decode([i])
    server.card = {**(server.card or {}), "dtype": "float32"}
    teacher = remote(4)
    teacher.compare_with(tokenizer)
    prepared(teacher, models.llama())
    (line,) = (x.message for x in caplog.records if x.name == "hf_distill.teachers.remote")
    url = server.url + "/completions"
    assert line.startswith(
        f"teacher tiny at {url} (/models/tiny, dtype float32, max_model_len 64): "
        f"top 4 of {V} ids (checked), logits in 32 bits, two equal requests are 0.0e+00 nats apart"
    )
    assert int(line.split(" tokens are the student's")[0].rsplit(" ", 1)[1]) > 20


def test_a_server_that_does_not_say(
    server: Server, remote: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hf_distill")
    server.card = None
    teacher = prepared(remote(4), models.llama())
    assert "it does not say what it has loaded, dtype not said, max_model_len not" in caplog.text
    assert "(not checked)" in caplog.text
    assert max(max(x["prompt"]) for x in server.requests) < V  # other servers may not refuse ids
    assert teacher.identity()["name_or_path"] == "tiny"


BAD_LISTS = {
    "other models": (
        {"data": [{"id": "a"}, {"id": "b"}]},
        "the server must have the model 'tiny', it has 'a', 'b'",
    ),
    "none": ({"data": []}, "must have the model 'tiny', it has none"),
    "no list": ({"data": 3}, "v1/models must list models, got TypeError"),
    "no ids": ({"data": [{}]}, r"v1/models must list models, got KeyError\('id'\)"),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_lists_of_models_without_it(server: Server, remote: Ask, name: str) -> None:
    content, message = BAD_LISTS[name]
    server.listed = lambda _: (200, json.dumps(content))  # type: ignore[method-assign]
    with pytest.raises(RemoteTeacherError, match=message):
        prepared(remote(4), models.llama())


def test_a_key_that_is_wrong(server: Server, remote: Ask) -> None:
    server.listed = lambda _: (401, '{"error": "Unauthorized"}')  # type: ignore[method-assign]
    message = "models must list models, .*must be 200.*; status 401, body .*Unauthorized"
    with pytest.raises(RemoteTeacherError, match=message):
        prepared(remote(4), models.llama())


@pytest.mark.parametrize("size", [1, 2, 60, 61, 62, 63, 121, 122, 123, 1000])
def test_ids_are_counted(size: int) -> None:
    asked: list[int] = []

    def knows(token: int) -> bool:
        asked.append(token)
        return token < size

    assert count_ids(knows, V) == size
    assert len(asked) == (2 if size == V else len(asked))
    assert min(asked) >= 0
    assert count_ids(lambda _: True, V) is None
    assert count_ids(lambda token: token <= MOST_IDS // 2, 7) == MOST_IDS // 2 + 1


@pytest.mark.parametrize("student", [V - 20, V + 3])
def test_another_vocabulary_is_seen_at_the_start(server: Server, remote: Ask, student: int) -> None:
    message = rf"must have the student's {student} ids, it knows {V}; .* pass vocab_size={V}"
    with pytest.raises(RemoteTeacherError, match=message):
        prepared(remote(4), models.llama(vocab_size=student))
    assert all("prompt_logprobs" not in x for x in server.requests)  # no row was scored
    prepared(remote(4, vocab_size=V), models.llama(vocab_size=student))
    message = rf"must have vocab_size's {V + 1} ids, it knows {V}"
    with pytest.raises(RemoteTeacherError, match=message):
        prepared(remote(4, vocab_size=V + 1), models.llama(vocab_size=student))
    message = rf"top_k must be .*, and vocab_size, got {V + 4} and"
    with pytest.raises(ValueError, match=message):
        prepared(remote(V + 4), models.llama(vocab_size=student))


def test_another_tokenizer(server: Server, remote: Ask) -> None:
    tokenizer = models.tokenizer()
    size = max(tokenizer.get_vocab().values()) + 1
    teacher = remote(4)
    teacher.compare_with(tokenizer)
    server.words = lambda i: tokenizer.decode([(i + 1) % size])
    with pytest.raises(RemoteTeacherError, match=r"the server's tokenizer must be the student's"):
        prepared(teacher, models.llama())
    server.words = lambda i: "other" if i == size - 1 else tokenizer.decode([i])
    mine = tokenizer.decode([size - 1])
    message = rf"1 of \d+ tokens that were compared differ: {size - 1} is 'other' there, '{mine}' h"
    tokenizer.add_tokens(["<added>"])
    with pytest.raises(RemoteTeacherError, match=message):
        prepared(teacher, models.llama())
    # spaces, parts of characters, and what is not said are not compared
    server.words = lambda i: ["", "\ufffd", f" {tokenizer.decode([i])} "][i % 3]
    prepared(teacher, models.llama())


def fingerprint(**changes: Any) -> Fingerprint:
    """What a model says of the probe of 8 ids, in a dtype or by a seed."""
    dtype = changes.pop("dtype", torch.float32)
    ids = list(range(3, 51, 6))
    model = models.llama(**{"seed": 1} | changes).to(dtype)
    with torch.no_grad():
        logits = 8 * model(input_ids=torch.tensor([ids[:-1]])).logits[0]
    values, best = logits.float().log_softmax(-1).topk(6)
    pairs = zip(best.tolist(), values.tolist(), strict=True)
    return Fingerprint.of(ids, [dict(zip(*each, strict=True)) for each in pairs])


def test_fingerprints_know_models_and_dtypes() -> None:
    whole, half = fingerprint(), fingerprint(dtype=torch.bfloat16)
    assert Fingerprint.from_json(json.loads(json.dumps(whole.to_json()))) == whole
    assert whole.step == 0.0
    assert half.step is not None
    assert 0 < half.step <= 0.125
    assert "(16 bits)" in str(half)
    assert whole.apart(whole) == half.apart(half) == 0
    other = fingerprint(seed=2)
    assert whole.apart(other) == other.apart(whole) > 1
    fault = whole.fault(other)
    assert fault is not None
    assert str(whole) in fault
    assert str(other) in fault
    # another dtype: within what 16 bits round, beyond what 32 do
    assert 0.02 < whole.apart(half) < 0.2
    assert whole.fault(half) is not None
    assert half.fault(whole) is not None
    moved = Fingerprint(half.ids, [{i: x - 0.0625 for i, x in e.items()} for e in half.entries])
    assert half.fault(moved) is None
    assert whole.fault(Fingerprint(whole.ids[:-1], whole.entries[:-1])) is not None
    near = Fingerprint(whole.ids, [{i: x + 1e-4 for i, x in e.items()} for e in whole.entries])
    assert whole.fault(near) is None


def test_entries_that_change_places_are_compared() -> None:
    one = Fingerprint([1, 2], [{5: -1.0, 6: -2.0}])
    assert one.apart(Fingerprint([1, 2], [{6: -2.0, 5: -1.0}])) == 0
    # 6 is at most -2.1 there, 7 at most -2 here
    two = Fingerprint([1, 2], [{5: -1.0, 7: -2.1}])
    assert one.apart(two) == two.apart(one) == pytest.approx(0.1 / 3)
    assert one.apart(Fingerprint([1, 3], [{5: -1.0, 6: -2.0}])) == math.inf
    assert Fingerprint([1, 2], [{5: -1.0}]).step is None
    assert same_name("/models/tiny", "org/tiny")
    assert not same_name("/models/tiny", "/models/tiny2")


def test_another_model_that_is_started_in_its_place(mortal: Mortal) -> None:
    with asking(mortal.state.url) as teacher:
        teacher.prepare(Accelerator(cpu=True), models.llama(), None)
        thread = mortal.die_in(1, model=models.llama(1))
        assert len(teacher.top_log_probs(IDS[0].tolist())) == 5
        thread.join()
        thread = mortal.die_in(1, model=models.llama(2))
        message = "a server that is started again must have the model that it had; .* nats apart"
        with pytest.raises(RemoteTeacherError, match=message):
            teacher.signal(models.llama(), SIDE)
        thread.join()


def test_a_bad_fingerprint_is_not_read() -> None:
    good = Fingerprint([1, 2], [{5: -1.0, 6: -2.0}]).to_json()
    for change in ({"ids": [1]}, {"log_probs": [[]]}, {"log_probs": 3}, {"ids": None}):
        with pytest.raises((ValueError, TypeError)):
            Fingerprint.from_json(good | change)
