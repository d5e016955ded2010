"""Rows as long as a server takes, and refusals: each is an error with its own cause."""

import json

import pytest
import torch

from hf_distill import RemoteTeacherError
from hf_distill.data.sides import Side
from tests.hf_distill.teachers.asking import prepared
from tests.hf_distill.teachers.conftest import Ask
from tests.hf_distill.teachers.serving import Server, edit
from tests.hf_distill.trainers import models

V = models.VOCAB
ROW = [(7 * i) % 50 + 3 for i in range(16)]


@torch.no_grad()
def expected(ids: list[int], top_k: int) -> list[dict[int, float]]:
    """What the server's model says at positions 1 to the last."""
    logits = models.llama(1)(input_ids=torch.tensor([ids[:-1]])).logits[0]
    values, best = logits.log_softmax(-1).topk(top_k)
    pairs = zip(best.tolist(), values.tolist(), strict=True)
    return [dict(zip(*each, strict=True)) for each in pairs]


@pytest.mark.parametrize("top_k", [1, 5, V])
@pytest.mark.parametrize("known", [True, False])
def test_a_row_of_max_model_len(server: Server, remote: Ask, known: bool, top_k: int) -> None:
    teacher = remote(top_k)
    teacher._vocab = V
    server.max_model_len = len(ROW)
    teacher._server.max_model_len = len(ROW) if known else None
    got = teacher.top_log_probs(ROW)
    assert got == expected(ROW, top_k)  # the same sums: to the bit
    assert len(server.requests) == (1 if known else 2)
    asked = server.requests[-1]
    assert asked["prompt"] == ROW[:-1]
    # nothing of a server's defaults changes the distribution that it draws from
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert plain.items() <= asked.items()
    assert teacher.top_log_probs(ROW[:-1]) == got[:-1]


def test_the_whole_row_is_scored(server: Server, remote: Ask) -> None:
    teacher = prepared(remote(4), models.llama())
    server.max_model_len = len(ROW)
    predicts = torch.zeros(1, len(ROW), dtype=torch.bool)
    predicts[0, [3, len(ROW) - 2]] = True
    signal = teacher.signal(models.llama(), Side({"input_ids": torch.tensor([ROW])}, predicts))
    want = expected(ROW, 4)
    assert signal.sparse.ids.tolist() == [list(want[3]), list(want[-1])]


def test_rows_that_are_too_long(server: Server, remote: Ask) -> None:
    teacher = prepared(remote(4), models.llama())
    server.max_model_len = 14
    teacher._server.max_model_len = None
    message = "context length is 14 tokens.*; the row of 16 tokens is longer than the server takes"
    with pytest.raises(RemoteTeacherError, match=message) as caught:
        teacher.top_log_probs(ROW)
    assert "--max-logprobs" not in str(caught.value)
    teacher._server.max_model_len = 14
    server.requests.clear()
    message = r"at most the server's max_model_len of 14 tokens, got 16: cut rows, or start it"
    with pytest.raises(RemoteTeacherError, match=message):
        teacher.top_log_probs(ROW)
    assert server.requests == []


def test_ids_that_the_server_does_not_know(server: Server, remote: Ask) -> None:
    teacher = prepared(remote(4), models.llama())
    server.vocab_size = 40
    message = r"'Token id 45 is out of vocabulary'; the row has an id .* its largest is 45: the tok"
    with pytest.raises(RemoteTeacherError, match=message) as caught:
        teacher.top_log_probs([3, 45, 6])
    assert "--max-logprobs" not in str(caught.value)


def test_more_entries_than_the_server_allows(server: Server, remote: Ask) -> None:
    server.max_logprobs = 3
    message = r"max allowed: 3 .*; the server must allow --max-logprobs 4; the status must be 200"
    with pytest.raises(RemoteTeacherError, match=message):
        prepared(remote(4), models.llama())


BAD_LAST = {
    "no logprobs": ({"logprobs": None}, "must be JSON with prompt_logprobs, got TypeError"),
    "two tokens": (
        {"logprobs": {"top_logprobs": [{"token_id:1": -1.0}, {"token_id:1": -1.0}]}},
        "must be JSON with prompt_logprobs, got ValueError",
    ),
    "words": (
        {"logprobs": {"top_logprobs": [{"word": -1.0}]}},
        "must be JSON with prompt_logprobs, got ValueError",
    ),
    "logits": (
        {"logprobs": {"top_logprobs": [{"token_id:1": 3.0}]}},
        "the generated token: a log-probability must not be positive, got 3",
    ),
    "few": (
        {"logprobs": {"top_logprobs": [{"token_id:1": -3.0}]}},
        "each token must have 4 entries, got 1",
    ),
}


@pytest.mark.parametrize("name", BAD_LAST)
def test_a_last_position_that_is_none(server: Server, remote: Ask, name: str) -> None:
    teacher = prepared(remote(4), models.llama())
    server.max_model_len = len(ROW)
    fields, message = BAD_LAST[name]
    server.change = edit(**json.loads(json.dumps(fields)))
    with pytest.raises(RemoteTeacherError, match=message):
        teacher.top_log_probs(ROW)
