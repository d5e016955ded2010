"""A teacher on a server."""

import logging
import math
import os
import threading
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_distill.data.sides import Side
from hf_distill.losses import DivergenceLoss
from hf_distill.models import structure
from hf_distill.models.signals import Signal
from hf_distill.models.structure import causal_lm
from hf_distill.run import Run
from hf_distill.teachers.base import Teacher
from hf_distill.teachers.sent_rows import predicting_rows
from hf_distill.teachers.server_checks import ask_num_ids, compare_tokens
from hf_distill.teachers.server_identity import (
    FINGERPRINT_TOKENS,
    Fingerprint,
    ServedModel,
    ask_model,
)
from hf_distill.teachers.server_requests import (
    RemoteTeacherError,
    Retries,
    ServerRequests,
    ask_all,
)
from hf_distill.teachers.vllm_client import Completions, TopK
from metal_ops import SparseTeacher

logger = logging.getLogger(__name__)

# Largest difference of a log-probability between two equal requests, in nats. Logits in bfloat16
# that are summed in another order differ by 0.06 to 0.13; another model by some nats.
REPEATED = 0.25
# Probabilities in float32 say no more about the rest than this.
LEAST_TAIL = torch.finfo(torch.float32).eps
NO_ENTRY = -1  # padding of ids


class RemoteTeacher(Teacher):
    """Asks a model behind vLLM's completions endpoint, known by its most probable tokens.

    Every row with scored tokens is one request, cut behind its last scored token; the server
    batches them. Its tokenizer must be the student's: token ids are sent as they are, and an answer
    must name them. The prompt's own token, which vLLM adds to the top k, is left out unless it is
    one of them, so that what is known does not depend on what was sampled.

    Args:
        url: the URL of the server up to the version, such as "http://localhost:8000/v1".
        model: the name by which the server knows the model.
        top_k: the number of entries that are asked for per token, at least 1. The server must allow
            as many (`--max-logprobs`).
        timeout: the number of seconds without an answer after which a request has failed, greater
            than 0.
        max_wait: the number of seconds during which a request is sent again after a failed
            connection, no answer or a status 429, 500, 502, 503 or 504, at least 0. A server that
            is started again must load its model in this time.
        retries: the number of times that it is sent again at most, at least 0. None means that
            only `max_wait` counts.
        backoff: the number of seconds before a request is sent again for the first time, at least
            0. It doubles each time, up to 15 seconds.
        num_threads: the number of requests that are under way at the same time, at least 1.
        api_key_env: the environment variable that contains the server's key. None means that there
            is no key.
        vocab_size: the number of logits per token of the server's model, padding included. None
            means as many as the student has. A vLLM server is asked how many ids it knows, which
            must be as many or more.

    Attributes:
        temperature: 1, at which the server's log-probabilities are taken; the loss's must be the
            same.

    Raises:
        ValueError: a number is out of range, or the environment variable is not set.
    """

    dense = False
    temperature = 1.0
    reads_batches = False

    def __init__(
        self,
        url: str,
        model: str,
        top_k: int,
        *,
        timeout: float = 60.0,
        max_wait: float = 600.0,
        retries: int | None = None,
        backoff: float = 0.5,
        num_threads: int = 8,
        api_key_env: str | None = None,
        vocab_size: int | None = None,
    ) -> None:
        for name, value, least in (("top_k", top_k, 1), ("num_threads", num_threads, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not timeout > 0 or min(max_wait, retries or 0, backoff) < 0:
            raise ValueError(
                "timeout must be positive, max_wait, retries and backoff not negative, got "
                f"{timeout}, {max_wait}, {retries} and {backoff}"
            )
        key = None if api_key_env is None else os.environ.get(api_key_env)
        if api_key_env is not None and not key:
            raise ValueError(f"the environment variable {api_key_env} must hold the server's key")
        self.top_k = top_k
        self.num_threads = num_threads
        self.vocab_size = vocab_size
        again = Retries(backoff, max_wait, retries)
        self._server = Completions(url, model, top_k, timeout, again, backoff, key, num_threads)
        self._vocab = 0
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._served = ServedModel(model)
        self._fingerprint: Fingerprint | None = None
        self._met = 0  # interruptions before the server was last asked what it is
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the connections to the server."""
        self._server.close()

    @property
    def requests(self) -> ServerRequests:
        """Return what sends its requests."""
        return self._server.requests

    def compare_with(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Compare the server's tokens with those of a tokenizer, at the next start."""
        self._tokenizer = tokenizer

    def check(self, run: Run) -> None:
        """Check that the run's divergences read entries that the server gives.

        Raises:
            ValueError: a support asks for entries that the student chooses, or for more of them.
        """
        self.compare_with(run.tokenizer)
        for spec in (loss.spec for loss in run.losses if isinstance(loss, DivergenceLoss)):
            chosen = spec.support not in ("full", "teacher_topk")
            if chosen or (spec.top_k or 0) > self.top_k:
                raise ValueError(
                    f"a RemoteTeacher knows its own {self.top_k} best entries of a token, which "
                    f"serve the supports 'full' and 'teacher_topk' up to them, got "
                    f"{spec.support!r} with top_k {spec.top_k}; a HiddenStateTeacher (python -m "
                    "hf_distill serve) serves all of them"
                )

    def prepare(self, accelerator: Accelerator, student: nn.Module, refusal: str | None) -> None:
        """Ask the server what it is, and for the same tokens twice.

        Raises:
            ValueError: the student's vocabulary is not known or smaller than top_k.
            RemoteTeacherError: the server does not answer, answers differently, or has another
                vocabulary or tokenizer.
        """
        self.start(structure.vocab_size(causal_lm(student)))

    @property
    def name(self) -> str:
        """Return the name of the model, and the server's URL."""
        return f"{self._server.model} at {self._server.url}"

    def identity(self) -> dict[str, Any]:
        """Return what the server is, for the manifest of a cache; it has been started.

        Entries: `name_or_path`, what it says that it has loaded; `dtype`, if it says so; `address`,
        as it was asked; `fingerprint`, see `server_identity.Fingerprint`.
        """
        assert self._fingerprint is not None
        return {
            "name_or_path": self._served.root or self._served.name,
            "dtype": self._served.dtype,
            "address": self.name,
            "fingerprint": self._fingerprint.to_json(),
        }

    def start(self, vocab: int | None) -> None:
        """Do what `prepare` does, where there is no student.

        Args:
            vocab: the logits that a student gives per token.

        Raises:
            ValueError, RemoteTeacherError: as `prepare`.
        """
        fewest = None if vocab is None else min(vocab, self.vocab_size or vocab)
        if vocab is None or fewest is None or fewest < self.top_k:
            raise ValueError(
                "top_k must be at most the student's vocabulary, and vocab_size, got "
                f"{self.top_k} and {fewest}"
            )
        self._vocab = vocab if self.vocab_size is None else self.vocab_size
        self._fingerprint, self._met = None, self.requests.interruptions
        self._served = ask_model(self._server)
        longest = self._server.max_model_len = self._served.max_model_len
        checked = self._check_vocab() if self._served.is_vllm else "not checked"
        count = min(FINGERPRINT_TOKENS, longest or FINGERPRINT_TOKENS)
        ids = [fewest * (i + 1) // (count + 1) for i in range(count)]
        first, again = (self.top_log_probs(ids) for _ in range(2))
        apart = _largest_difference(first, again)
        if apart > REPEATED:
            raise RemoteTeacherError(
                f"{self._server.url}: two equal requests must get equal log-probabilities, they "
                f"are {apart:.2g} nats apart (limit {REPEATED})"
            )
        compared = 0
        if self._tokenizer is not None:
            compared = compare_tokens(self._server, self._tokenizer, fewest, longest)
        self._fingerprint = Fingerprint.of(ids, first)
        logger.info(
            "teacher %s (%s, dtype %s, max_model_len %s): top %d of %d ids (%s), %s, two equal "
            "requests are %.1e nats apart, %d tokens are the student's",
            self.name,
            self._served.root or "it does not say what it has loaded",
            self._served.dtype or "not said",
            longest or "not said",
            self.top_k,
            self._vocab,
            checked,
            self._fingerprint.precision,
            apart,
            compared,
        )

    def _check_vocab(self) -> str:
        """Check that the server knows the ids that it must know, and no more."""
        known = ask_num_ids(self._server, self._vocab)
        if known is None:
            return "the server refuses none"
        if known != self._vocab and (self.vocab_size is None or known < self._vocab):
            whose = "the student" if self.vocab_size is None else "vocab_size"
            raise RemoteTeacherError(
                f"{self._server.url}: the server's model must have {whose}'s {self._vocab} ids, it "
                f"knows {known}; if the tokenizers are the same and the ids behind theirs are "
                f"padding, pass vocab_size={known}"
            )
        return "checked" if known == self._vocab else f"the server knows {known}"

    def _meet_again(self) -> None:
        """Check that a server that was away is what it was.

        Raises:
            RemoteTeacherError: it is another one.
        """
        with self._lock:
            known, seen = self._fingerprint, self.requests.interruptions
            if known is None or seen == self._met:
                return
            self._server.max_model_len = ask_model(self._server).max_model_len
            now = Fingerprint.of(known.ids, self._server.top_log_probs(known.ids))
            fault = known.fault(now)
            if fault is not None:
                raise RemoteTeacherError(
                    f"{self._server.url}: a server that is started again must have the model that "
                    f"it had; {fault}"
                )
            self._met = seen
            logger.info("%s: it has the model that it had", self._server.url)

    def top_log_probs(self, ids: Sequence[int]) -> list[TopK]:
        """Ask for the server's most probable tokens at positions 1 to len(ids) - 1.

        Raises:
            RemoteTeacherError: the server fails, or knows other ids than the student.
        """
        positions = self._server.top_log_probs(ids)
        self._meet_again()
        largest = max(map(max, positions))
        if largest >= self._vocab:
            whose = "the student's vocabulary" if self.vocab_size is None else "vocab_size"
            raise RemoteTeacherError(
                f"{self._server.url}: token ids must be below {whose} of {self._vocab}, got "
                f"{largest} (vocab_size says how many the server's model has)"
            )
        counts = {len(position) for position in positions}
        if min(counts) < self.top_k:
            raise RemoteTeacherError(
                f"{self._server.url}: each token must have {self.top_k} entries, got {min(counts)}"
            )
        return positions

    def signal(self, student: nn.Module, side: Side) -> Signal:
        """Return the server's log-probabilities where tokens are scored, and the mass of the rest.

        See `top_k_columns` for the rest.

        Raises:
            ValueError: the side has inputs that a server cannot be sent, or scores the first token
                of a row.
            RemoteTeacherError: the server fails.
        """
        rows = _scored_rows(side)
        if not rows:
            return Signal(sparse=self._sparse([], side.predicts.device))
        answers = ask_all(
            self.top_log_probs, [ids for ids, _ in rows], self.num_threads, self.requests
        )
        tokens = [
            # the answer begins with the second token
            answer[at - 1]
            for answer, (_, scored) in zip(answers, rows, strict=True)
            for at in scored
        ]
        return Signal(sparse=self._sparse(tokens, side.predicts.device))

    def _sparse(self, tokens: Sequence[TopK], device: torch.device) -> SparseTeacher:
        ids, log_probs, log_tail = top_k_columns(tokens, self.top_k, self._vocab)
        return SparseTeacher(
            ids.to(device), log_probs.float().to(device), log_tail.float().to(device)
        )


def _largest_difference(first: Sequence[TopK], again: Sequence[TopK]) -> float:
    """Return how far apart two answers are, rank by rank: in nats, or in probability at none."""
    return max(
        abs(math.exp(x) - math.exp(y)) if -math.inf in (x, y) else abs(x - y)
        for one, other in zip(first, again, strict=True)
        for x, y in zip(one.values(), other.values(), strict=True)
    )


def top_k_columns(tokens: Sequence[TopK], top_k: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [N, K] int64, log-probabilities [N, K], descending, log of the rest [N]; float64.

    See `log_rest` for the rest.
    """
    shape = (len(tokens), top_k)
    ids = torch.tensor([list(x) for x in tokens], dtype=torch.int64).view(shape)
    values = [list(x.values()) for x in tokens]
    log_probs = torch.tensor(values, dtype=torch.float64).view(shape)
    return ids, log_probs, log_rest(log_probs, vocab)


def log_rest(log_probs: Tensor, vocab: int) -> Tensor:
    """Return the log of the mass [N] that most probable entries [N, K] leave to all others.

    It is 1 less theirs, but at most what entries as small as the least of them can hold, and at
    least what float32 resolves; nothing if the entries are the whole vocabulary.
    """
    rest = (1.0 - log_probs.exp().sum(-1)).clamp_min(LEAST_TAIL)
    most = (vocab - log_probs.shape[-1]) * log_probs.exp().amin(-1)
    return torch.minimum(rest, most).log()


def _scored_rows(side: Side) -> list[tuple[list[int], list[int]]]:
    """Return (ids, places of the scored tokens in them) of each row that has any."""
    rows = ((ids, [x + 1 for x in at]) for ids, at in predicting_rows(side))
    return [(ids[: scored[-1] + 1], scored) for ids, scored in rows]
