"""From rows of the data to rows of a shard, through a server of hidden states."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_distill.cache.encoder import SignalEncoder
from hf_distill.cache.fingerprints import SideRow
from hf_distill.cache.hidden_encoder import HiddenSignalEncoder, head_to_store
from hf_distill.data.turn_ends import tell_end_tokens
from hf_distill.models.signals import Signal
from hf_distill.teachers import HiddenStateTeacher
from hf_distill.teachers.hidden_protocol import Row


@dataclass(frozen=True)
class ServerEncoder(SignalEncoder):
    """Makes rows by asking a server.

    Attributes:
        teacher: that is asked.
    """

    teacher: HiddenStateTeacher

    def probe(self) -> None:
        """Check the server."""
        self.teacher.start()

    def signal(self, rows: Sequence[SideRow]) -> Signal:
        """Return what the server says of the scored tokens of some rows."""
        asked = [
            Row([int(x) for x in row.ids[: row.positions[-1]]], (row.positions - 1).tolist())
            for row in rows
        ]
        return Signal(hidden=self.teacher.ask(asked), head=self.teacher.head())


@dataclass(frozen=True)
class HiddenServerEncoder(HiddenSignalEncoder, ServerEncoder):
    """Makes rows of hidden states by asking a server."""


def server_encoder(
    teacher: HiddenStateTeacher, tokenizer: Any, *, real_vocab: int, collator: Any, **given: Any
) -> ServerEncoder:
    """Return the encoder for a server and a codec.

    Args:
        teacher: that is asked.
        tokenizer: of the rows, or None.
        real_vocab: see `RowEncoder`; 0 is the whole vocabulary.
        collator: of the training.
        **given: the other fields of a `RowEncoder`, but `vocab`.

    Raises:
        ValueError: the tokenizer is not the server's, or see `hidden_encoder.head_to_store`.
        RemoteTeacherError: the server fails.
    """
    teacher.check_tokenizer(tokenizer)
    about = teacher.about
    given["vocab"] = vocab = about.shape[0]
    given["real_vocab"] = min(real_vocab or vocab, vocab)
    given["collator"] = tell_end_tokens(collator, about.end_ids)
    encoder = ServerEncoder(**given, teacher=teacher)
    if not encoder.codec.of_hidden:
        return encoder
    stored = head_to_store(encoder, teacher.head())
    return HiddenServerEncoder(**given, teacher=teacher, stored=stored)
