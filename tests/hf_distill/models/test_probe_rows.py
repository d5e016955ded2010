"""The part of a batch that a model is looked at with."""

from typing import Any

import torch

from hf_distill.models.probe_rows import PROBE_TOKENS, probe_row, rows_of

IDS = torch.arange(60).view(3, 20)
MASK = torch.zeros(3, 20, dtype=torch.long)
MASK[1, 8:] = 1
MASK[2, :3] = 1


def cut(**others: Any) -> dict[str, Any]:
    row = probe_row({"input_ids": IDS, "attention_mask": MASK, **others})
    assert row is not None
    assert row.is_cut
    return row.inputs


def test_it_is_the_longest_row_without_padding() -> None:
    inputs = cut()
    assert inputs["input_ids"].tolist() == [list(range(28, 28 + PROBE_TOKENS))]
    assert inputs["attention_mask"].tolist() == [[1] * PROBE_TOKENS]


def test_a_batch_of_padding_is_looked_at_as_if_it_were_tokens() -> None:
    row = probe_row({"input_ids": IDS, "attention_mask": torch.zeros_like(MASK)})
    assert row is not None
    assert row.ids.tolist() == [list(range(PROBE_TOKENS))]


def test_segment_numbers_stay() -> None:
    row = probe_row({"input_ids": IDS, "attention_mask": MASK * 3})
    assert row is not None
    assert row.inputs["attention_mask"].unique().tolist() == [3]


def test_other_inputs_of_rows_and_tokens_come_along() -> None:
    inputs = cut(
        task_ids=torch.tensor([7, 8, 9]),
        token_type_ids=IDS * 2,
        inputs_embeds=torch.zeros(3, 20, 4),
        adapter_names=["a", "b", "c"],
        use_cache=False,
        labels=None,
    )
    assert inputs["task_ids"].tolist() == [8]
    assert torch.equal(inputs["token_type_ids"], inputs["input_ids"] * 2)
    assert inputs["inputs_embeds"].shape == (1, PROBE_TOKENS, 4)
    assert inputs["adapter_names"] == ["b"]
    assert inputs["use_cache"] is False
    assert "labels" not in inputs


def test_inputs_that_are_of_no_row_keep_the_batch_whole() -> None:
    for other in (torch.zeros(2, 3, 4, 4), torch.zeros(3, 3, 20), torch.zeros(5), ["a"]):
        batch = {"input_ids": IDS, "attention_mask": MASK, "pixel_values": other}
        row = probe_row(batch)
        assert row is not None
        assert not row.is_cut
        assert row.inputs.keys() == batch.keys()
        assert rows_of(batch, slice(0, 1)) is None


def test_a_batch_without_ids_has_none() -> None:
    assert probe_row({"inputs_embeds": torch.zeros(2, 3, 4)}) is None
