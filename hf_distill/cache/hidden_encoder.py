"""From rows of the data to stored hidden states, with the head beside the shards."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_distill.cache.codecs import Arrays, HiddenStates
from hf_distill.cache.encoder import Encoder, SignalEncoder
from hf_distill.cache.fingerprints import PROBED_ROWS, SideRow, collated
from hf_distill.cache.stored_head import StoredHead, extra_of, head_on_cpu
from metal_ops import Head


@dataclass(frozen=True)
class HiddenSignalEncoder(SignalEncoder):
    """Makes rows of hidden states, of a codec that stores them.

    Attributes:
        stored: the head that they go with.
    """

    stored: StoredHead = field(kw_only=True)

    @property
    def width(self) -> int:
        """Return how many values of a token the codec is given."""
        return self.stored.width

    def codec_notes(self) -> dict[str, Any]:
        """Return what the manifest says of the head."""
        return {"head": self.stored.notes()}

    def lay_down(self, cache: Path, is_new: bool, verify: str) -> None:
        """Write the head; see `RowEncoder`."""
        self.stored.write(cache, is_new, verify)

    def pick_up(self, cache: Path) -> None:
        """Read what the stored form is made with."""
        self.stored.read_extra(cache)

    def _encode(self, rows: Sequence[SideRow], keys: Sequence[tuple[int, int]]) -> list[Arrays]:
        hidden = self.signal(rows).hidden
        assert hidden is not None
        lengths = [len(row.positions) for row in rows]
        try:
            return self.codec.encode(
                self.stored.stored_form(hidden), lengths, keys, self.real_vocab
            )
        except ValueError as error:
            raise ValueError(f"rows {[row for _, row in keys]} of the data: {error}") from error


@dataclass(frozen=True)
class HiddenEncoder(HiddenSignalEncoder, Encoder):
    """Makes rows of hidden states by running a model."""


def head_to_store(encoder: SignalEncoder, head: Head) -> StoredHead:
    """Return what is stored of a teacher's head. All processes must call it.

    Where the codec needs a sample of hidden states, the teacher is asked for some rows, evenly
    spread over the data.

    Raises:
        ValueError: it makes other logits than the model says that it has, or the codec's rank is
            too large.
    """
    codec = encoder.codec
    assert isinstance(codec, HiddenStates)
    if head.vocab != encoder.vocab:
        raise ValueError(
            f"the teacher's head must make the {encoder.vocab} logits of its vocabulary, got "
            f'{head.vocab}: cache with the codec "full"'
        )
    sample = None if extra_of(codec) is None else _sample(encoder)
    return StoredHead(head_on_cpu(head), codec, sample)


def _sample(encoder: SignalEncoder) -> Tensor:
    """Return [n, H] hidden states of some rows."""
    count = min(PROBED_ROWS, len(encoder.data))
    given = [encoder.data[i * len(encoder.data) // count] for i in range(count)]
    rows = [row for row in collated(encoder.collator, given) if len(row.positions)]
    rows.sort(key=lambda row: -int(row.positions[-1]))
    found = []
    for start in range(0, len(rows), encoder.batch_size):
        hidden = encoder.signal(rows[start : start + encoder.batch_size]).hidden
        assert hidden is not None
        found.append(hidden.float().cpu())
    if not found:
        raise ValueError(f"{count} rows of the data, evenly spread, must score a token, got none")
    return torch.cat(found)


def with_head(encoder: Encoder) -> HiddenEncoder:
    """Return an encoder of hidden states in place of one of logits. All processes must call it.

    Raises:
        ValueError: the teacher cannot be read by its hidden states, or see `head_to_store`.
    """
    said = encoder.ask_probe()
    if said.hidden is None or said.head is None:
        raise ValueError(
            f"the codec {encoder.codec.name!r} needs a teacher that is read by its hidden states, "
            f"and this one is read by its logits: {encoder.reader.refusal}; cache with the codec "
            '"full"'
        )
    given = {each.name: getattr(encoder, each.name) for each in fields(encoder)}
    return HiddenEncoder(**given, stored=head_to_store(encoder, said.head))
