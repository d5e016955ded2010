"""Caches of log-probabilities that a server gives, or has given earlier.

What a server says is the most probable tokens; the mass of the rest is 1 less theirs, and nothing
is known of how it is spread. So these caches are of the codec `topk`, at one temperature.

Shapes: N scored tokens of some rows, K entries.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hf_distill.cache.codecs import Arrays, TopK
from hf_distill.cache.codecs.selection import Selection
from hf_distill.cache.datasets import default_collator
from hf_distill.cache.encoder import RowEncoder
from hf_distill.cache.fingerprints import Collator, Data, SideRow
from hf_distill.cache.manifest import Manifest
from hf_distill.cache.recorded import RecordedLogProbs
from hf_distill.cache.writer import checked, process_state, write_all
from hf_distill.models.tokenizers import num_ids
from hf_distill.teachers import RemoteTeacher, remote, vllm_client
from hf_distill.teachers.server_requests import ask_all

MASS_TOLERANCE = 0.05  # of entries and the rest; what is stored may be off by 0.1


class LogProbs(Protocol):
    """Gives the log-probabilities of rows."""

    @property
    def name(self) -> str:
        """Return the teacher's name, for the manifest."""
        ...

    @property
    def top_k(self) -> int:
        """Return the number of entries of each token."""
        ...

    def start(self, vocab: int) -> None:
        """Check what can be checked; every process calls this once."""

    def top_log_probs(self, ids: Sequence[int]) -> Sequence[vllm_client.TopK | None]:
        """Return the top_k most probable tokens at positions 1 to len(ids) - 1, descending.

        Positions of which nothing is known are None; the data must not score them.
        """
        ...


@dataclass(frozen=True)
class KnownEncoder(RowEncoder):
    """Makes rows from log-probabilities that are known already.

    Attributes:
        source: where they come from.
        num_threads: rows that are asked for at a time.
    """

    source: LogProbs
    num_threads: int

    def probe(self) -> None:
        """Do nothing: the source has been started, to know what it is."""

    def _encode(self, rows: Sequence[SideRow], keys: Sequence[tuple[int, int]]) -> list[Arrays]:
        assert isinstance(self.codec, TopK)
        try:
            requests = self.source.requests if isinstance(self.source, RemoteTeacher) else None
            asked = [row.ids for row in rows]
            answers = ask_all(self.source.top_log_probs, asked, self.num_threads, requests)
        except ValueError as error:
            raise ValueError(f"rows {[row for _, row in keys]} of the data: {error}") from error
        tokens = []
        for (_, number), answer, row in zip(keys, answers, rows, strict=True):
            for at in row.positions:
                entries = answer[at - 1]
                if entries is None:
                    raise ValueError(
                        f"row {number} of the data: it must score positions that have "
                        f"log-probabilities only, {at} has none"
                    )
                tokens.append(entries)
        lengths = [len(row.positions) for row in rows]
        try:
            kept = _selection(tokens, self.codec.top_k, self.vocab)
        except ValueError as error:
            raise ValueError(f"rows {[row for _, row in keys]} of the data: {error}") from error
        return self.codec.pack(kept, lengths, self.vocab)


def _selection(tokens: Sequence[vllm_client.TopK], top_k: int, vocab: int) -> Selection:
    """Return what the codec keeps of N tokens.

    The entropy is that of the entries and of one for the rest, a lower bound of the teacher's.
    """
    ids, log_probs, log_tail = remote.top_k_columns(tokens, top_k, vocab)
    known = torch.cat([log_probs, log_tail[:, None]], dim=-1)
    total = known.exp().sum(-1)
    if len(total) and float((total - 1).abs().max()) > MASS_TOLERANCE:
        worst = float(total[(total - 1).abs().argmax()])
        raise ValueError(
            "entries and the rest, none of it more probable, must have the mass 1, got "
            f"{worst:.3g}: are these the log-probabilities of a softmax at temperature 1?"
        )
    entropy = -torch.special.xlogy(known.exp(), known.exp()).sum(-1)
    counts = (log_probs > -torch.inf).sum(-1).clamp_min(1)
    nothing = np.zeros((len(tokens), 0))
    return Selection(
        head_ids=ids.numpy(),
        head_log_probs=log_probs.float().numpy(),
        head_sizes=counts.numpy(),
        log_tail=log_tail.float().clamp_max(0).numpy(),
        log_sums=nothing.astype(np.float32),
        draw_ids=nothing.astype(np.int64),
        draw_log_probs=nothing.astype(np.float32),
        entropy=entropy.clamp_min(0).float().numpy(),
        num_entries=np.full(len(tokens), vocab),
    )


def cache_log_probs(
    source: RecordedLogProbs | RemoteTeacher,
    dataset: Data,
    path: str | os.PathLike[str],
    *,
    vocab_size: int | None = None,
    data_collator: Collator | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    batch_size: int = 32,
    num_threads: int = 8,
    shard_rows: int | None = None,
    overwrite: bool = False,
    verify: str = "size",
) -> Manifest:
    """Write a cache from a server's log-probabilities, or from answers that were kept.

    It can be interrupted and goes on like `cache_teacher`; a server is asked again only for what
    is missing. A file that has changed gives another cache.

    Args:
        source: a `RecordedLogProbs`, or a `RemoteTeacher`, of whose requests at most its own
            `num_threads` are under way.
        dataset: rows by number.
        path: the cache's folder, on this machine.
        vocab_size: logits per token of the students; None is the tokenizer's number of ids.
        data_collator: the one of the training; None chooses by the columns.
        processing_class: the tokenizer; None takes the collator's.
        batch_size: rows that are in memory at a time.
        num_threads: rows that are asked for at a time, >= 1.
        shard_rows: see `cache_teacher`.
        overwrite: see `cache_teacher`.
        verify: see `cache_teacher`.

    Raises:
        CacheError, ValueError: see `cache_teacher`; or the source lacks a row.
        RemoteTeacherError: the server fails.
    """
    cache = checked(path, dataset, batch_size, shard_rows, verify)
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}")
    tokenizer = processing_class or getattr(data_collator, "tokenizer", None)
    vocab = vocab_size or (0 if tokenizer is None else num_ids(tokenizer))
    if not vocab:
        raise ValueError("the logits per token must be known: give vocab_size or a tokenizer")
    if source.top_k > vocab:
        raise ValueError(f"top_k must be at most the vocabulary {vocab}, got {source.top_k}")
    encoder = KnownEncoder(
        data=dataset,
        collator=data_collator or default_collator(dataset, tokenizer),
        codec=TopK(top_k=source.top_k),
        seed=0,
        batch_size=batch_size,
        shard_rows=shard_rows or 0,
        vocab=vocab,
        real_vocab=vocab,
        source=source,
        num_threads=num_threads,
    )

    def about() -> dict[str, Any]:
        if isinstance(source, RemoteTeacher):
            source.compare_with(tokenizer)
        source.start(vocab)
        unknown = dict.fromkeys(("revision", "config_sha256", "weights_fingerprint"))
        says = isinstance(source, RecordedLogProbs | RemoteTeacher)
        known = source.identity() if says else {}
        return {"name_or_path": source.name, **unknown, "tail": "1 - entries", **known}

    return write_all(
        cache, encoder, about, tokenizer, process_state(), overwrite=overwrite, verify=verify
    )
