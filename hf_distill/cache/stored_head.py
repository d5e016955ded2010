"""The teacher's output head in a cache of hidden states: one file, written before the first shard.

Hidden states are stored as they are, or as coordinates on a basis of the directions that move the
logits most. Then the head is that of the coordinates, and the basis lies beside it: all processes,
and a run that goes on, project on the same.

Shapes: V vocabulary, H hidden states of the teacher, R width of what is stored.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hf_distill.cache.errors import CacheCorrupt, CacheError
from hf_distill.cache.files import canonical, commit, entry, parse, pretty, sha256_of
from hf_distill.cache.manifest import HEAD, check_version
from hf_distill.cache.shard import FORMAT_VERSION
from metal_ops import Head

logger = logging.getLogger(__name__)

SIDECAR = "head.json"
SHAPE, WIDTH = "shape", "width"
ROWS = 4096  # of the head that are multiplied at a time


def head_on_cpu(head: Head) -> Head:
    """Return a copy of a head, whole and on the CPU."""
    whole = head.gathered()
    weight, bias = (
        None if x is None else x.detach().to("cpu", copy=True).contiguous()
        for x in (whole.weight, whole.bias)
    )
    assert weight is not None
    return Head(weight, bias, whole.logit_scale, whole.softcap)


def _bytes(x: Tensor) -> memoryview:
    return x.contiguous().view(-1).view(torch.uint8).numpy().data


def head_digest(head: Head) -> str:
    """Return the sha256 of a head on the CPU: of its tensors, their dtype, scale and softcap."""
    about = [str(head.weight.dtype), list(head.weight.shape), head.logit_scale, head.softcap]
    digest = hashlib.sha256(canonical(about))
    digest.update(_bytes(head.weight))
    if head.bias is not None:
        digest.update(_bytes(head.bias))
    return digest.hexdigest()


def _leading_directions(head: Head, rank: int) -> tuple[Tensor, Tensor]:
    """Return a mean row [1, H] and the basis [H, R] of the head's rows about it, float32.

    Without a softcap the same number may be added to all logits of a token, so that the mean of the
    rows counts for nothing.
    """
    weight = head.weight
    width = weight.shape[1]
    mean, gram = torch.zeros(1, width).double(), torch.zeros(width, width).double()
    if head.softcap is None:
        mean = weight.sum(0, keepdim=True, dtype=torch.float64) / len(weight)
    for part in weight.split(ROWS):
        rows = part.float() - mean.float()
        gram += (rows.T @ rows).double()
    directions = torch.linalg.eigh(gram).eigenvectors  # the largest are the last
    return mean.float(), directions.flip(-1)[:, :rank].float().contiguous()


class StoredHead:
    """Writes the head of a cache, and projects hidden states on its basis.

    Args:
        head: of the teacher, on the CPU.
        rank: see `HiddenStates`.

    Raises:
        ValueError: rank is not below the width of the head.
    """

    def __init__(self, head: Head, rank: int | None) -> None:
        self._head, self._rank = head, rank
        size = head.weight.shape[1]
        if rank is not None and rank >= size:
            raise ValueError(
                f"rank must be less than the teacher's {size} hidden units, got {rank}: None keeps "
                "all of them"
            )
        self.width = size if rank is None else rank
        self._basis: Tensor | None = None
        self._digest = head_digest(head)

    @property
    def vocab(self) -> int:
        """Return the number of logits that it makes."""
        return self._head.vocab

    def notes(self) -> dict[str, Any]:
        """Return what the manifest says of the head."""
        head = self._head
        return {
            "sha256": self._digest,
            "dtype": str(head.weight.dtype).removeprefix("torch."),
            SHAPE: list(head.weight.shape),
            WIDTH: self.width,
            "has_bias": head.bias is not None,
            "logit_scale": float(head.logit_scale),
            "softcap": None if head.softcap is None else float(head.softcap),
        }

    def write(self, cache: Path, is_new: bool, verify: str) -> None:
        """Write the file, unless it is there; only the main process does.

        Args:
            cache: the folder.
            is_new: whether there are no shards yet.
            verify: see `cache_teacher`.

        Raises:
            CacheCorrupt: there are shards, and the basis that they were projected on is lost.
        """
        flaw = self._flaw(cache, verify)
        if flaw is None:
            return
        if not is_new and self._rank is not None:
            raise CacheCorrupt(
                f"{cache / HEAD}: {flaw}, and its shards are of the basis that was in it: write "
                "the cache again with overwrite=True"
            )
        size, digest = commit(cache / HEAD, [save(self._tensors())])
        about = {"format_version": FORMAT_VERSION, "head_sha256": self._digest}
        commit(cache / SIDECAR, [pretty(about | {"bytes": size, "sha256": digest})])
        logger.info("cache %s: the teacher's head in %s, %d bytes", cache, HEAD, size)

    def _flaw(self, cache: Path, verify: str) -> str | None:
        """Return why the file must be written, or None."""
        try:
            found = read_sidecar(cache)
        except (OSError, CacheError) as error:
            return str(error)
        path = cache / HEAD
        if found["head_sha256"] != self._digest:
            return "it is of another head"
        if not path.exists() or path.stat().st_size != found["bytes"]:
            return f"it must have {found['bytes']} bytes"
        if verify == "full" and sha256_of(path) != found["sha256"]:
            return f"its sha256 must be {found['sha256']}"
        return None

    def _tensors(self) -> dict[str, Tensor]:
        head = self._head
        made = {"weight": head.weight}
        if head.bias is not None:
            made["bias"] = head.bias
        if self._rank is not None:
            mean, basis = _leading_directions(head, self._rank)
            parts = [(part.float() - mean) @ basis for part in head.weight.split(ROWS)]
            made |= {"weight": torch.cat(parts).to(head.weight.dtype), "basis": basis}
        return made

    def read_basis(self, cache: Path) -> None:
        """Read the basis that is in the cache; every process does, before its first shard.

        Raises:
            CacheCorrupt: the file is not what was written.
        """
        if self._rank is None:
            return
        about, path = read_sidecar(cache), cache / HEAD
        if sha256_of(path) != about["sha256"]:
            raise CacheCorrupt(f"{path}: sha256 must be {about['sha256']}")
        size = self._head.weight.shape[1]
        tensors = read_tensors(path, str(path))
        self._basis = _tensor(tensors, "basis", [size, self.width], str(path))

    def project(self, hidden: Tensor) -> Tensor:
        """Return what is stored of hidden states [N, H]: [N, R]."""
        if self._basis is None:
            return hidden
        self._basis = self._basis.to(hidden.device)
        return hidden.float() @ self._basis


def read_sidecar(cache: Path) -> dict[str, Any]:
    """Read what the sidecar of the head says.

    Raises:
        OSError, CacheCorrupt, FormatVersionError: it is not there or not what was written.
    """
    path = cache / SIDECAR
    content = parse(path.read_bytes(), str(path))
    check_version(content, str(path))
    kinds = {"head_sha256": str, "bytes": int, "sha256": str}
    return {name: entry(content, name, kind, str(path)) for name, kind in kinds.items()}


def head_stats(cache: Path) -> dict[str, Any]:
    """Return bytes and sha256 of the head's file for the manifest; nothing if there is none."""
    if not (cache / SIDECAR).exists():
        return {}
    about = read_sidecar(cache)
    return {"head_bytes": about["bytes"], "head_sha256": about["sha256"]}


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Read a safetensors file whole: mapped, a file that shrinks would end the process.

    Raises:
        CacheCorrupt: it is none.
    """
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CacheCorrupt(f"{name} cannot be read: {error}") from error


def _tensor(
    tensors: Mapping[str, Tensor], key: str, shape: list[int], name: str, dtype: str = "float32"
) -> Tensor:
    """Return a tensor that must be there, of a shape and dtype, and finite."""
    found = tensors.get(key)
    got = "none" if found is None else f"{found.dtype} {list(found.shape)}"
    if found is None or got != f"torch.{dtype} {shape}":
        raise CacheCorrupt(f"{name}: {key} must be torch.{dtype} {shape}, got {got}")
    if not bool(found.isfinite().all()):
        raise CacheCorrupt(f"{name}: {key} must be finite")
    return found


def read_head(path: Path, notes: Mapping[str, Any], name: str) -> Head:
    """Read the head of what is stored.

    Args:
        path: of the file.
        notes: as `StoredHead.notes` gives them.
        name: for messages.

    Raises:
        CacheCorrupt: the file holds another head than the notes say.
    """
    tensors, dtype = read_tensors(path, name), notes["dtype"]
    vocab = notes[SHAPE][0]
    weight = _tensor(tensors, "weight", [vocab, notes[WIDTH]], name, dtype)
    bias = _tensor(tensors, "bias", [vocab], name, dtype) if notes["has_bias"] else None
    return Head(weight, bias, notes["logit_scale"], notes["softcap"])


def check_notes(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what a manifest's codec says of the head, checked.

    Raises:
        CacheCorrupt: an entry is missing or of another type.
    """
    notes = entry(config, "head", dict, name)
    kinds = {"sha256": str, "dtype": str, SHAPE: list, WIDTH: int, "has_bias": bool}
    for key, kind in kinds.items():
        entry(notes, key, kind, name)
    shape, scale, cap = notes[SHAPE], notes.get("logit_scale"), notes.get("softcap")
    sizes = [*shape, notes[WIDTH]]
    if len(shape) != 2 or any(type(x) is not int or x < 1 for x in sizes):
        raise CacheCorrupt(f"{name}: the head must have sizes of at least 1, got {sizes}")
    if not isinstance(scale, float) or not (cap is None or isinstance(cap, float)):
        raise CacheCorrupt(f"{name}: logit_scale and softcap must be numbers, got {scale}, {cap}")
    return notes
