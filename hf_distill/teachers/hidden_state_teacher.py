"""A teacher on a server that sends its hidden states: exact, over the whole vocabulary.

Shapes: N scored tokens, H hidden, V vocabulary.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from hf_distill.data.cross_tokenizer_collator import find_cross_tokenizer_collator
from hf_distill.data.sides import Side, student_side, teacher_side
from hf_distill.data.span_collator import find_span_collator
from hf_distill.losses import CrossTokenizerLoss
from hf_distill.models.signals import Signal
from hf_distill.models.structure import vocab_size
from hf_distill.models.tokenizers import describe, ids_digest
from hf_distill.run import Run
from hf_distill.teachers.base import Teacher
from hf_distill.teachers.hidden_client import HiddenClient
from hf_distill.teachers.hidden_protocol import About, Row, encode_rows
from hf_distill.teachers.sent_rows import predicting_rows
from hf_distill.teachers.server_requests import RemoteTeacherError
from metal_ops import Head

logger = logging.getLogger(__name__)

AHEAD = 64  # batches that are asked for before their step, at most: all of an optimizer step
PROBE_TOKENS = 8


class HiddenStateTeacher(Teacher):
    """Asks a server of this package for a model's last hidden states (`hf_distill serve`).

    With the teacher's output head, which is fetched once, they are its whole distribution: every
    loss is that of the local model, at every temperature. In a trainer without data loader workers
    the rows of the next batch are asked for while the student computes.

    Args:
        url: the URL of the server, such as "http://127.0.0.1:8077".
        timeout: the number of seconds without an answer after which a request has failed, greater
            than 0.
        max_wait: the number of seconds for which a failed request is sent again, at least 0: the
            time that a server has to come back.
        backoff: the number of seconds before a request is sent again for the first time, at least
            0. It doubles each time, up to 15 seconds.
        api_key_env: the environment variable that contains the server's token. None means that
            there is no token.

    Attributes:
        about: what the server is, asked at first use.

    Raises:
        ValueError: a number is out of range, or the environment variable is not set.
    """

    reads_batches = False

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 300.0,
        max_wait: float = 600.0,
        backoff: float = 0.5,
        api_key_env: str | None = None,
    ) -> None:
        if not timeout > 0 or not max_wait >= 0 or not backoff >= 0:
            raise ValueError(
                "timeout must be positive, max_wait and backoff not negative, got "
                f"{timeout}, {max_wait} and {backoff}"
            )
        key = None if api_key_env is None else os.environ.get(api_key_env)
        if api_key_env is not None and not key:
            raise ValueError(f"the environment variable {api_key_env} must hold the server's token")
        self._client = HiddenClient(url, timeout, max_wait, backoff, key)
        self._about: About | None = None
        self._head: Head | None = None
        self._heads: dict[torch.device, Head] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._asked: OrderedDict[bytes, Future[Tensor]] = OrderedDict()

    @property
    def about(self) -> About:
        """Return what the server is.

        Raises:
            RemoteTeacherError: it does not answer, or is no hidden-state server.
        """
        if self._about is None:
            self._about = self._client.about()
        return self._about

    @property
    def vocab_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return the logits per token of the server's model."""
        return self.about.shape[0]

    @property
    def url(self) -> str:
        """Return the server's URL."""
        return self._client.url

    def close(self) -> None:
        """Forget what was asked for, and close the connections."""
        self._forget()
        self._client.close()

    def _forget(self) -> None:
        """Forget what was asked for; a request that waits for the server fails now."""
        self._asked.clear()
        if self._pool is None:
            return
        with self._client.giving_up():
            self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def check(self, run: Run) -> None:
        """Check that the server's model has the tokenizer of its rows.

        Raises:
            ValueError: it has another, or it may have: no tokenizer is known, and the vocabularies
                have different sizes.
            RemoteTeacherError: see `about`.
        """
        crossing = find_cross_tokenizer_collator(run.collator) or find_span_collator(run.collator)
        own = run.tokenizer if crossing is None else crossing.teacher_tokenizer
        self.check_tokenizer(own)
        sorts = any(isinstance(loss, CrossTokenizerLoss) for loss in run.losses)
        if crossing is not None or not sorts or (own and self.about.tokenizer_sha256):
            return  # other losses need one vocabulary, which the trainer checks
        size = vocab_size(run.language_model)
        if size not in (None, self.vocab_size):
            raise ValueError(
                "the student's ids are sent to the server, so both need one tokenizer: got "
                f"vocabularies of {size} and {self.vocab_size} entries, and no tokenizer of "
                f"{'the student' if own is None else 'the server'} to compare; for two "
                "tokenizers, take a CrossTokenizerCollator"
            )

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Check that a tokenizer gives every token the server's id; None passes.

        Raises:
            ValueError: it does not.
        """
        theirs = self.about.tokenizer_sha256
        if tokenizer is not None and theirs is not None and ids_digest(tokenizer) != theirs:
            raise ValueError(
                f"{self.url}: the tokenizer must have the ids of the server's {self.about.name!r}, "
                f"got {describe(tokenizer)}"
            )

    def collator(self, collator: Any) -> Any:
        """Wrap the collator, so that a batch is asked for when it is made."""
        return AskingCollator(collator, self)

    def prepare(self, accelerator: Accelerator, student: nn.Module, refusal: str | None) -> None:
        """Fetch the head, and ask for the same tokens twice.

        Raises:
            RemoteTeacherError: the server fails, or two equal requests get different answers.
        """
        self.start()

    def start(self) -> None:
        """Do as `prepare`, where there is no student."""
        ids = [self.vocab_size * (i + 1) // (PROBE_TOKENS + 1) for i in range(PROBE_TOKENS)]
        rows = [Row(ids[: self.about.limits.length], [0])]
        one, other = (self._client.hidden(rows, self.about) for _ in range(2))
        if not torch.equal(one, other):
            raise RemoteTeacherError(
                f"{self.url}: two equal requests must get equal hidden states, they are "
                f"{float((one - other).abs().max()):.2g} apart"
            )
        head = self.head()
        logger.info(
            "teacher %s at %s: %d hidden units in %s, %d logits, head of %d MiB",
            self.about.name,
            self.url,
            head.weight.shape[1],
            self.about.dtype,
            head.vocab,
            head.weight.nbytes >> 20,
        )

    def head(self) -> Head:
        """Return the teacher's output head, on the CPU; it is fetched once.

        Raises:
            RemoteTeacherError: the server fails.
        """
        if self._head is None:
            self._head = self._client.head(self.about)
        return self._head

    def _head_on(self, device: torch.device) -> Head:
        if device not in self._heads:
            head = self.head()
            bias = None if head.bias is None else head.bias.to(device)
            placed = Head(head.weight.to(device), bias, head.logit_scale, head.softcap)
            self._heads[device] = placed
        return self._heads[device]

    def ask(self, rows: Sequence[Row]) -> Tensor:
        """Return hidden states [N, H] on the CPU, those that were asked for ahead or new ones.

        Raises:
            RemoteTeacherError: the server fails, or is another teacher than at the start.
        """
        key = encode_rows(rows) if self._asked else b""
        if key not in self._asked:
            return self._client.hidden(rows, self.about)
        while (oldest := next(iter(self._asked))) != key:  # of a step that was not taken
            self._asked.pop(oldest).cancel()
        try:
            return self._asked.pop(key).result()
        except BaseException:  # what is asked ahead would wait for the server as long, at the exit
            self._forget()
            raise

    def ask_ahead(self, rows: Sequence[Row]) -> None:
        """Ask for rows in another thread; `ask` for the same rows then waits for their answer."""
        if not rows:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "hidden states")
        key = encode_rows(rows)
        if key not in self._asked:
            self._asked[key] = self._pool.submit(self._client.hidden, rows, self.about)
        while len(self._asked) > AHEAD:  # of steps that were never taken
            self._asked.popitem(last=False)[1].cancel()

    def signal(self, student: nn.Module, side: Side) -> Signal:
        """Return the server's hidden states where tokens are scored, and its head.

        Raises:
            ValueError: the side has inputs that a server cannot be sent.
            RemoteTeacherError: the server fails, or is another teacher than at the start.
        """
        device = side.predicts.device
        hidden = self.ask(rows_of(side))
        return Signal(hidden=hidden.to(device), head=self._head_on(device))


class AskingCollator:
    """Makes batches, and asks the server for each before its step.

    Accelerate's data loader makes a batch while the one before is used. In a worker's process
    nothing is asked ahead: the batch's step asks.

    Args:
        collator: of the training.
        teacher: that is asked.
    """

    def __init__(self, collator: Any, teacher: HiddenStateTeacher) -> None:
        self.collator, self.teacher = collator, teacher
        self.columns = tuple(getattr(collator, "columns", ()))

    def __getstate__(self) -> dict[str, Any]:
        return {"collator": self.collator, "teacher": None, "columns": self.columns}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the collator's batch."""
        batch = dict(self.collator(rows))
        if get_worker_info() is None and self.teacher is not None:
            self.teacher.ask_ahead(rows_of(teacher_side(batch, student_side(batch))))
        return batch


def rows_of(side: Side) -> list[Row]:
    """Return each row that scores tokens, up to the token that predicts its last scored one.

    Raises:
        ValueError: the side has other inputs, or scores the first token of a row.
    """
    return [Row(ids[: at[-1] + 1], at) for ids, at in predicting_rows(side)]
