"""A model that answers rows with its last hidden states, and a queue in front of it.

Shapes: R rows, N asked outputs of all rows, H hidden.
"""

import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_distill.data import batches
from hf_distill.data.sides import Side
from hf_distill.models.forward import Reader
from hf_distill.models.modes import evaluating
from hf_distill.models.probe_rows import PROBE_TOKENS
from hf_distill.models.signals import Signal
from hf_distill.models.structure import causal_lm, vocab_size
from hf_distill.teachers.hidden_protocol import DTYPES, Row
from metal_ops import Head

logger = logging.getLogger(__name__)


class Busy(Exception):
    """As many requests wait as may."""


class HiddenModel:
    """Runs a causal LM and reads its last hidden states.

    Rows of a request are put into batches by their length, and never with those of another request:
    an answer depends on its request alone, to the last bit.

    Args:
        model: on its device.
        batch_tokens: of a forward, padding included, unless one row has more.

    Attributes:
        head: of the model, on the CPU.

    Raises:
        ValueError: the model is read by its logits, or in a dtype that is not sent.
    """

    def __init__(self, model: nn.Module, batch_tokens: int) -> None:
        self.model, self.batch_tokens = model, batch_tokens
        self._device = next(model.parameters()).device
        self._reader = Reader("teacher")
        vocab = vocab_size(causal_lm(model)) or PROBE_TOKENS
        ids = torch.arange(min(PROBE_TOKENS, vocab), device=self._device)[None]
        said = self._signal(Side({"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool)))
        if said.hidden is None or said.head is None:
            raise ValueError(
                "a hidden-state server needs a model that is read by its hidden states, and this "
                f"one is read by its logits: {self._reader.refusal}"
            )
        if said.hidden.dtype not in DTYPES.values():
            raise ValueError(f"the dtype must be one of {[*DTYPES]}, got {said.hidden.dtype}")
        head = said.head
        weight = head.weight.detach().to("cpu", said.hidden.dtype).contiguous()
        bias = None if head.bias is None else head.bias.detach().to(weight)
        self.head = Head(weight, bias, head.logit_scale, head.softcap)

    @torch.no_grad()
    def _signal(self, side: Side) -> Signal:
        with evaluating(self.model):
            return self._reader.signal(self.model, side)

    def answer(self, rows: Sequence[Row]) -> Tensor:
        """Return [N, H] hidden states at the asked outputs, row by row, on the CPU."""
        found: list[Tensor] = [self.head.weight[:0]] * len(rows)
        for chosen in self._batches(rows):
            hidden = self._signal(self._side([rows[i] for i in chosen])).hidden
            assert hidden is not None
            parts = hidden.cpu().split([len(rows[i].outputs) for i in chosen])
            for i, part in zip(chosen, parts, strict=True):
                found[i] = part
        return torch.cat(found)

    def _batches(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        """Yield rows that are asked for something, the longest first."""
        lengths = {i: row.outputs[-1] + 1 for i, row in enumerate(rows) if row.outputs}
        batch: list[int] = []
        for i in sorted(lengths, key=lambda i: (-lengths[i], i)):
            if batch and (len(batch) + 1) * lengths[batch[0]] > self.batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _side(self, rows: Sequence[Row]) -> Side:
        ids = [row.ids[: row.outputs[-1] + 1] for row in rows]
        inputs = {
            "input_ids": batches.pad(ids, 0),
            "attention_mask": batches.pad([[1] * len(x) for x in ids], 0),
        }
        predicts = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        for flags, row in zip(predicts, rows, strict=True):
            flags[torch.tensor(row.outputs)] = True
        moved = {name: x.to(self._device) for name, x in inputs.items()}
        return Side(moved, predicts.to(self._device))


@dataclass
class _Request:
    rows: Sequence[Row]
    answer: "Future[Tensor]"


class ModelQueue:
    """Lets one request after another ask the model; so many may wait.

    Args:
        model: that answers.
        size: requests that wait, at most.
    """

    def __init__(self, model: HiddenModel, size: int) -> None:
        self._model = model
        self._lock, self._is_closed = threading.Lock(), False
        self._waiting: queue.Queue[_Request | None] = queue.Queue(size)
        self._thread = threading.Thread(target=self._run, name="hidden states", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[Row]) -> "Future[Tensor]":
        """Return what will hold the answer [N, H].

        Raises:
            Busy: as many requests wait as may, or the queue is closed.
        """
        request = _Request(rows, Future())
        with self._lock:
            if self._is_closed:
                raise Busy
            try:
                self._waiting.put_nowait(request)
            except queue.Full as error:
                raise Busy from error
        return request.answer

    def _run(self) -> None:
        while (request := self._waiting.get()) is not None:
            try:
                request.answer.set_result(self._model.answer(request.rows))
            except Exception as error:  # whatever a model raises: the next request has its turn
                logger.exception("a request of %d rows failed", len(request.rows))
                request.answer.set_exception(error)

    def close(self) -> None:
        """Answer what waits, and end."""
        with self._lock:
            self._is_closed = True
        self._waiting.put(None)
        self._thread.join()
