"""The teacher's output head, read from a cache of hidden states when it is first needed."""

from typing import Any

import torch

from hf_distill.cache.reader import CacheReader
from hf_distill.cache.stored_head import WIDTH, check_notes, read_head
from metal_ops import Head


class CachedHead:
    """Reads a cache's head; a pickled one, which a worker gets, does not carry it.

    Args:
        reader: of the cache.

    Attributes:
        width: of the hidden states that it takes.

    Raises:
        CacheCorrupt: the manifest says nothing of it.
    """

    def __init__(self, reader: CacheReader) -> None:
        self._reader = reader
        config = reader.manifest.config["codec"]
        self._notes = check_notes(config, f"{reader.path}: the manifest's codec")
        self.width: int = self._notes[WIDTH]
        self._heads: dict[torch.device, Head] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_heads": {}}

    def on(self, device: torch.device) -> Head:
        """Return the head on a device.

        Raises:
            CacheCorrupt: its file is not what was written.
        """
        if device not in self._heads:
            path = self._reader.head_file()
            found = read_head(path, self._notes, f"{self._reader.path}/{path.name}")
            bias = None if found.bias is None else found.bias.to(device)
            weight = found.weight.to(device)
            self._heads[device] = Head(weight, bias, found.logit_scale, found.softcap)
        return self._heads[device]
