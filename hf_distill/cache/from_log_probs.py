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

from hf_distill.cache.arrays import ArrayLogProbs, TopKRow
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
    """Gives the log-probabilities of rows: what `cache_log_probs` wants of its source.

    Any object with these members is one, such as a model of another library in this process.
    """

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
        numbers = [row for _, row in keys]
        try:
            requests = self.source.requests if isinstance(self.source, RemoteTeacher) else None
            found = ask_all(self._known, rows, self.num_threads, requests)
            joined = TopKRow(
                np.concatenate([x.ids for x in found]),
                np.concatenate([x.log_probs for x in found]),
                np.concatenate([_log_tail(x, self.vocab) for x in found]),
            )
            kept = _selection(joined, self.vocab)
        except ValueError as error:
            raise ValueError(f"rows {numbers} of the data: {error}") from error
        return self.codec.pack(kept, [len(row.positions) for row in rows], self.vocab)

    def _known(self, row: SideRow) -> TopKRow:
        """Return the entries of a row's scored tokens."""
        if isinstance(self.source, ArrayLogProbs):
            return self.source.top_columns(row.ids, row.positions)
        answer = self.source.top_log_probs(row.ids)
        tokens = []
        for at in row.positions:
            entries = answer[at - 1]
            if entries is None:
                raise ValueError(
                    f"only positions that have log-probabilities must be scored, {at} has none"
                )
            tokens.append(entries)
        ids, log_probs, tail = remote.top_k_columns(tokens, self.source.top_k, self.vocab)
        return TopKRow(ids.numpy(), log_probs.numpy(), tail.numpy())


def _log_tail(found: TopKRow, vocab: int) -> np.ndarray:
    """Return the log of the mass of all other entries [m]: what is said, or what is left."""
    if found.log_tail is not None:
        return found.log_tail
    return remote.log_rest(torch.from_numpy(found.log_probs), vocab).numpy()


def _selection(found: TopKRow, vocab: int) -> Selection:
    """Return what the codec keeps of N tokens.

    The entropy is that of the entries and of one for the rest, a lower bound of the teacher's.
    """
    assert found.log_tail is not None
    num_tokens = len(found.log_tail)
    log_tail = torch.from_numpy(found.log_tail)
    known = torch.cat([torch.from_numpy(found.log_probs), log_tail[:, None]], dim=-1)
    total = known.exp().sum(-1)
    if len(total) and not float((total - 1).abs().max()) <= MASS_TOLERANCE:
        worst = float(total[(total - 1).abs().argmax()])
        raise ValueError(
            "entries and the rest, none of it more probable, must have the mass 1, got "
            f"{worst:.3g}: are these the log-probabilities of a softmax at temperature 1?"
        )
    entropy = -torch.special.xlogy(known.exp(), known.exp()).sum(-1)
    counts = (found.log_probs > -np.inf).sum(-1).clip(1)
    nothing = np.zeros((num_tokens, 0))
    return Selection(
        head_ids=found.ids,
        head_log_probs=found.log_probs.astype(np.float32),
        head_sizes=counts,
        log_tail=log_tail.float().clamp_max(0).numpy(),
        log_sums=nothing.astype(np.float32),
        draw_ids=nothing.astype(np.int64),
        draw_log_probs=nothing.astype(np.float32),
        entropy=entropy.clamp_min(0).float().numpy(),
        num_entries=np.full(num_tokens, vocab),
    )


def cache_log_probs(
    source: LogProbs,
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
        source: a `RecordedLogProbs`, `ArrayLogProbs` or `DistillKitLogProbs`; or a `RemoteTeacher`,
            of whose requests at most its own `num_threads` are under way; or any object with the
            members of `LogProbs`.
        dataset: rows by number; `source.rows` are those of what was recorded.
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
        known: dict[str, Any] = {}
        if isinstance(source, RecordedLogProbs | ArrayLogProbs | RemoteTeacher):
            known = source.identity()
        return {"name_or_path": source.name, **unknown, "tail": "1 - entries", **known}

    return write_all(
        cache, encoder, about, tokenizer, process_state(), overwrite=overwrite, verify=verify
    )
