"""From rows of the data to stored hidden states, with the head beside the shards."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_distill.cache.codecs import Arrays, HiddenStates
from hf_distill.cache.encoder import Encoder, RowEncoder
from hf_distill.cache.fingerprints import SideRow
from hf_distill.cache.stored_head import StoredHead, head_on_cpu
from metal_ops import Head


@dataclass(frozen=True)
class HiddenRowEncoder(RowEncoder):
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
        """Read the basis that hidden states are projected on."""
        self.stored.read_basis(cache)


@dataclass(frozen=True)
class HiddenEncoder(HiddenRowEncoder, Encoder):
    """Makes rows of hidden states by running a model."""

    def _encode(self, rows: Sequence[SideRow], keys: Sequence[tuple[int, int]]) -> list[Arrays]:
        hidden = self._signal(rows).hidden
        assert hidden is not None
        lengths = [len(row.positions) for row in rows]
        try:
            return self.codec.encode(self.stored.project(hidden), lengths, keys, self.real_vocab)
        except ValueError as error:
            raise ValueError(f"rows {[row for _, row in keys]} of the data: {error}") from error


def head_to_store(head: Head, codec: Any, vocab: int) -> StoredHead:
    """Return what is stored of a teacher's head.

    Raises:
        ValueError: it makes other logits than the model says that it has, or the codec's rank is
            too large.
    """
    assert isinstance(codec, HiddenStates)
    if head.vocab != vocab:
        raise ValueError(
            f"the teacher's head must make the {vocab} logits of its vocabulary, got {head.vocab}: "
            'cache with the codec "full"'
        )
    return StoredHead(head_on_cpu(head), codec.rank)


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
    return HiddenEncoder(**given, stored=head_to_store(said.head, encoder.codec, encoder.vocab))
