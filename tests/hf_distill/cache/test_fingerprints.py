"""What tells rows, teachers, tokenizers and data apart, and what does not."""

import hashlib
import struct
from typing import Any

import numpy as np
import pytest
import torch

from hf_distill.cache import fingerprints
from hf_distill.cache.datasets import TokenCollator
from hf_distill.data import batches
from hf_distill.data.sides import Side
from tests.hf_distill.cache.caches import collator, side
from tests.hf_distill.trainers import models


def test_the_hash_of_a_row() -> None:
    ids = [3, 1, 151935]
    digest = hashlib.sha256(struct.pack("<3i", *ids)).digest()
    assert fingerprints.row_hash(ids) == struct.unpack("<Q", digest[:8])[0]
    assert fingerprints.row_hash(ids) != fingerprints.row_hash(ids[::-1])
    assert fingerprints.row_hash([]) == 0x141CFC9842C4B0E3  # of the empty string: e3b0c44298fc1c14


def test_rows_do_not_depend_on_padding() -> None:
    data = models.rows(6, ignored=1)
    expected = list(fingerprints.collated(models.Pad(), data))
    for padded in (models.Pad("left"), models.Pad("right", 40), models.Pad("left", 40)):
        found = fingerprints.side_rows(side(padded, data))
        assert [row.ids for row in found] == [row["input_ids"] for row in data]
        for got, want in zip(found, expected, strict=True):
            assert got.ids == want.ids
            assert got.positions.tolist() == want.positions.tolist()


def test_positions_are_those_of_the_labels() -> None:
    for row, made in zip(
        models.rows(6), fingerprints.collated(models.Pad(), models.rows(6)), strict=True
    ):
        labelled = [i for i, label in enumerate(row["labels"]) if label != -100]
        assert made.positions.tolist() == [i for i in labelled if i > 0]  # nothing predicts 0


def test_a_hinted_row_is_the_teachers() -> None:
    data = models.problems(4)
    hinted = list(fingerprints.collated(collator(hint="hint"), data))
    bare = list(fingerprints.collated(collator(), data))
    batch = collator(hint="hint")(data)
    real = batches.unpad(batch["teacher_input_ids"], batch["teacher_attention_mask"])
    assert [row.ids for row in hinted] == real
    for one, other in zip(hinted, bare, strict=True):
        assert len(one.ids) > len(other.ids)
        assert [one.ids[i] for i in one.positions] == [other.ids[i] for i in other.positions]
        assert one.hash != other.hash


def bad_side(**changes: Any) -> Side:
    ids = torch.tensor([[5, 6, 7, 8]])
    predicts = torch.tensor([[False, True, False, False]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Side(inputs | changes.pop("inputs", {}), **{"predicts": predicts} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": {"pixel_values": torch.ones(1)}}, "it has 'pixel_values' too"),
        ({"route": torch.zeros(1)}, "holds one teacher"),
        ({"inputs": {"attention_mask": torch.ones(1, 3)}}, r"must be \(1, 4\), got \(1, 3\)"),
        (
            {"inputs": {"attention_mask": torch.tensor([[1, 1, 0, 0]])}},
            "must not be padding: row 0, position 2",
        ),
        (
            {"inputs": {"attention_mask": torch.tensor([[0, 0, 1, 1]])}},
            "must not be padding: row 0, position 2",
        ),
    ],
)
def test_sides_that_ids_do_not_determine(changes: dict[str, Any], message: str) -> None:
    assert fingerprints.side_rows(bad_side())[0].positions.tolist() == [2]
    with pytest.raises(ValueError, match=message):
        fingerprints.side_rows(bad_side(**changes))


def test_packed_rows_are_refused() -> None:
    def packed(rows: Any) -> Any:
        return TokenCollator()([*rows, *rows])

    with pytest.raises(ValueError, match=r"row 5 of the data: .* one row of one, it made 2"):
        list(fingerprints.collated(packed, models.rows(1), 5))
    with pytest.raises(ValueError, match=r"row 1 of the data: .*there is no 'prompt'"):
        list(fingerprints.collated(collator(), [*models.problems(1), {"completion": "no"}]))


def test_data_are_their_rows() -> None:
    data = models.problems(5)
    found = fingerprints.dataset_identity(data)
    assert found["num_rows"] == 5
    assert found == fingerprints.dataset_identity([dict(reversed(row.items())) for row in data])
    others = [data[::-1], data[:4], [*data[:4], data[4] | {"hint": "x"}]]
    assert len({fingerprints.dataset_identity(x)["sha256"] for x in [data, *others]}) == 4


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_arrays_are_all_of_their_values(make: Any) -> None:
    """Their text leaves out the middle of a long one."""
    long = list(range(2000))
    made = [
        fingerprints.dataset_identity([{"x": make(x)}])
        for x in (long, [*long[:999], 0, *long[1000:]])
    ]
    assert made[0] != made[1]


def test_a_collator_is_what_it_makes() -> None:
    data = models.problems(40)
    found = fingerprints.collator_identity(collator(), data)
    assert found == fingerprints.collator_identity(collator(max_prompt_length=50), data)
    hinted = fingerprints.collator_identity(collator(hint="hint"), data)
    assert found["probe_sha256"] != hinted["probe_sha256"]
    messages = models.problems(4, chat=True)
    plain, thinking = (
        fingerprints.collator_identity(collator(chat_template_kwargs=x), messages)
        for x in ({}, {"think": True})
    )
    assert plain != thinking


def test_a_tokenizer_is_its_ids_and_template() -> None:
    tokenizer = models.tokenizer()
    found = fingerprints.tokenizer_identity(tokenizer)
    assert found is not None
    assert found["num_ids"] == len(models.WORDS)
    tokenizer(["What", "is 1"], padding=True, truncation=True, max_length=3)  # leaves its settings
    assert fingerprints.tokenizer_identity(tokenizer) == found
    tokenizer.chat_template = models.TEMPLATE + " "
    other = fingerprints.tokenizer_identity(tokenizer)
    assert other is not None
    assert other["chat_template_sha256"] != found["chat_template_sha256"]
    assert other["sha256"] == found["sha256"]
    tokenizer.add_tokens(["more"])
    more = fingerprints.tokenizer_identity(tokenizer)
    assert more is not None
    assert more["sha256"] != found["sha256"]
    assert more["num_ids"] == found["num_ids"] + 1
    assert fingerprints.tokenizer_identity(None) is None


def test_a_teacher_is_its_weights_and_config() -> None:
    found = fingerprints.teacher_identity(models.llama())
    assert found == fingerprints.teacher_identity(models.llama())
    assert found["dtype"] == "float32"
    tuned = models.llama()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1 + 1e-3)
    assert found | {"weights_fingerprint": 0} == fingerprints.teacher_identity(tuned) | {
        "weights_fingerprint": 0
    }
    assert found["weights_fingerprint"] != fingerprints.weights_fingerprint(tuned)
    eps = fingerprints.teacher_identity(models.llama(rms_norm_eps=1e-3))
    assert eps["config_sha256"] != found["config_sha256"]
    half = fingerprints.teacher_identity(models.llama().bfloat16())
    assert half["dtype"] == "bfloat16"
    assert half["config_sha256"] == found["config_sha256"]
    assert fingerprints.teacher_identity(models.llama(), "abc")["revision"] == "abc"


@pytest.mark.filterwarnings(models.PEFT_WARNING)
def test_a_teacher_with_adapters_is_another() -> None:
    adapted = fingerprints.teacher_identity(models.lora(models.llama()))
    assert adapted["adapters"]["default"]["type"].endswith("LORA")
    base = fingerprints.teacher_identity(models.llama())
    assert adapted["weights_fingerprint"] != base["weights_fingerprint"]
    assert adapted["config_sha256"] == base["config_sha256"]


def test_the_first_difference() -> None:
    one = {"a": 1, "b": {"c": [1], "d": 2}}
    assert fingerprints.first_difference(one, {"b": {"d": 2, "c": [1]}, "a": 1}) is None
    assert fingerprints.first_difference(one, {"a": 1, "b": {"c": [1], "d": 3}}) == ("b.d", 2, 3)
    assert fingerprints.first_difference(one, one | {"e": 5}) == ("e", None, 5)
    assert fingerprints.first_difference(one, {"a": 1, "b": 4})[0] == "b"
