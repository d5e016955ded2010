"""The teacher's output head, read from a cache of hidden states when it is first needed."""

from typing import Any

import torch
from torch import Tensor

from hf_distill.cache.codecs import HiddenStates
from hf_distill.cache.reader import CacheReader
from hf_distill.cache.stored_head import WIDTH, check_notes, read_head
from hf_distill.models.signals import Signal
from metal_ops import Head


class CachedHead:
    """Reads a cache's head; a pickled one, which a worker gets, does not carry it.

    Args:
        reader: of the cache.
        codec: of the cache.

    Attributes:
        width: of the hidden states that it takes.

    Raises:
        CacheCorrupt: the manifest says nothing of it.
    """

    def __init__(self, reader: CacheReader, codec: HiddenStates) -> None:
        self._reader, self._codec = reader, codec
        config = reader.manifest.config["codec"]
        self._notes = check_notes(config, f"{reader.path}: the manifest's codec")
        self.width: int = self._notes[WIDTH]
        self._heads: dict[torch.device, tuple[Head, Tensor | None]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_heads": {}}

    def signal(self, stored: Tensor, device: torch.device) -> Signal:
        """Return the signal of what is stored of tokens, [N, R], on a device.

        Raises:
            CacheCorrupt: the head's file is not what was written.
        """
        head, sizes = self._on(device)
        hidden = stored.to(device)
        hidden = hidden if sizes is None else hidden * sizes
        return Signal(hidden=hidden.to(head.weight.dtype), head=head)

    def hidden(self, stored: Tensor) -> Tensor:
        """Return the hidden states [N, R] of what is stored, float32, on the CPU.

        Raises:
            CacheCorrupt: the head's file is not what was written.
        """
        sizes = self._on(torch.device("cpu"))[1]
        return stored.float() if sizes is None else stored.float() * sizes

    def _on(self, device: torch.device) -> tuple[Head, Tensor | None]:
        if device not in self._heads:
            path = self._reader.head_file()
            name = f"{self._reader.path}/{path.name}"
            head, sizes = read_head(path, self._notes, self._codec, name)
            bias = None if head.bias is None else head.bias.to(device)
            head = Head(head.weight.to(device), bias, head.logit_scale, head.softcap)
            self._heads[device] = head, None if sizes is None else sizes.to(device)
        return self._heads[device]
