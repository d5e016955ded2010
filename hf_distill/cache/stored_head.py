"""The teacher's output head in a cache of hidden states: one file, written before the first shard.

Hidden states are stored as they are; or each unit divided by its size over some rows, for 8 bits;
or as coordinates on a basis of the directions that move the logits most. Then the head is that of
the coordinates. Sizes and basis lie beside the head: all processes, and a run that goes on, use the
same.

Shapes: V vocabulary, H hidden states of the teacher, R width of what is stored.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hf_distill.cache.codecs import HiddenStates
from hf_distill.cache.errors import CacheCorrupt, CacheError
from hf_distill.cache.files import canonical, commit, entry, parse, pretty, sha256_of
from hf_distill.cache.manifest import HEAD, check_version
from hf_distill.cache.shard import FORMAT_VERSION
from metal_ops import Head

logger = logging.getLogger(__name__)

SIDECAR = "head.json"
SHAPE, WIDTH = "shape", "width"
SIZES, BASIS, ABOUT = "sizes", "basis", "about"
ROWS = 4096  # of the head that are multiplied at a time
SMALLEST = 1e-9  # of the largest eigenvalue: below, float64 knows none
SMALLEST_UNIT = 1e-3  # of the largest unit's size
SHRINKAGE = 0.02
# Units that are divided by all of their size have large errors where they are large. Measured on
# SmolLM2-135M, KL in nats of 8 bits a unit: power 0: 0.013, 0.5: 0.0007, 0.75: 0.0004, 1: 0.0007
EVENNESS = 0.75


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


def _gram(head: Head) -> tuple[Tensor, Tensor]:
    """Return a mean row [1, H] and the Gram matrix [H, H] of the head's rows about it, float64.

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
    return mean, gram


def _leading_directions(head: Head, rank: int, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Return the basis [H, R] of what is stored and the head's weight [V, R] for it, float32.

    With G the Gram matrix of the head and S the second moments of the hidden states, the logits of
    all tokens have the singular values of G^(1/2) S G^(1/2); the leading ones are kept.

    Args:
        head: of the teacher.
        rank: R.
        sample: [n, H] hidden states of some tokens.
    """
    mean, gram = _gram(head)
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(values[-1] * SMALLEST)
    root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    states = sample.double()
    moments = states.T @ states / len(states)
    moments += SHRINKAGE * (moments.diag().diag() - moments)  # of a sample of few tokens
    sizes, directions = torch.linalg.eigh(root @ moments @ root)
    sizes, directions = sizes.flip(0)[:rank], directions.flip(1)[:, :rank]
    scale = sizes.clamp_min(sizes[0] * SMALLEST) ** (EVENNESS / 2)
    back = (inverse @ directions * scale).float()
    parts = [(part.float() - mean.float()) @ back for part in head.weight.split(ROWS)]
    return (root @ directions / scale).float().contiguous(), torch.cat(parts)


def _unit_sizes(sample: Tensor) -> Tensor:
    """Return [H] float32: what each hidden unit is divided by, so that 8 bits serve all alike."""
    sizes = sample.double().pow(2).mean(0).sqrt()
    return sizes.clamp_min(sizes.max() * SMALLEST_UNIT).pow(EVENNESS).float()


class StoredHead:
    """Writes the head of a cache, and brings hidden states into the form that is stored.

    Args:
        head: of the teacher, on the CPU.
        codec: of the cache.
        sample: [n, H] hidden states of some tokens, from which sizes or the basis are made where
            the codec needs them.

    Raises:
        ValueError: the codec's rank is not below the width of the head.
    """

    def __init__(self, head: Head, codec: HiddenStates, sample: Tensor | None = None) -> None:
        self._head, self._codec, self._rank = head, codec, codec.rank
        size = head.weight.shape[1]
        if codec.rank is not None and codec.rank >= size:
            raise ValueError(
                f"rank must be less than the teacher's {size} hidden units, got {codec.rank}: None "
                "keeps all of them"
            )
        self.width = size if codec.rank is None else codec.rank
        self.extra = extra_of(codec)
        self._sample, self._made = sample, torch.empty(0)
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
            CacheCorrupt: there are shards, and the sizes or basis of them are lost.
        """
        flaw = self._flaw(cache, verify)
        if flaw is None:
            return
        if not is_new and self.extra is not None:
            raise CacheCorrupt(
                f"{cache / HEAD}: {flaw}, and its shards are of the {self.extra} that was in it: "
                "write the cache again with overwrite=True"
            )
        metadata = {ABOUT: _about(self.notes(), self._codec)}
        size, digest = commit(cache / HEAD, [save(self._tensors(), metadata)])
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
        if self.extra is None:
            return made
        assert self._sample is not None
        if self._rank is None:
            return made | {SIZES: _unit_sizes(self._sample)}
        basis, weight = _leading_directions(head, self._rank, self._sample)
        return made | {"weight": weight.to(head.weight.dtype), BASIS: basis}

    def read_extra(self, cache: Path) -> None:
        """Read sizes or basis from the cache; every process does, before its first shard.

        Raises:
            CacheCorrupt: the file is not what was written.
        """
        if self.extra is None:
            return
        about, path = read_sidecar(cache), cache / HEAD
        if sha256_of(path) != about["sha256"]:
            raise CacheCorrupt(f"{path}: sha256 must be {about['sha256']}")
        size = self._head.weight.shape[1]
        shape = [size] if self.extra == SIZES else [size, self.width]
        self._made = _tensor(read_tensors(path, str(path))[0], self.extra, shape, str(path))

    def stored_form(self, hidden: Tensor) -> Tensor:
        """Return what is stored of hidden states [N, H]: [N, R]."""
        if self.extra is None:
            return hidden
        self._made = self._made.to(hidden.device)
        return hidden.float() / self._made if self.extra == SIZES else hidden.float() @ self._made


def extra_of(codec: HiddenStates) -> str | None:
    """Return what lies beside the head: the units' sizes, a basis, or nothing."""
    if codec.rank is not None:
        return BASIS
    return SIZES if codec.format == "int8" else None


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


def _about(notes: Mapping[str, Any], codec: HiddenStates) -> str:
    """Return what the head's file says of itself."""
    return canonical({**notes, "settings": codec.settings()}).decode()


def read_tensors(path: Path, name: str) -> tuple[dict[str, Tensor], str]:
    """Read a file whole: mapped, one that shrinks would end the process.

    Returns:
        Its tensors, and what it says of itself.

    Raises:
        CacheCorrupt: it is no safetensors file.
    """
    try:
        content = path.read_bytes()
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        about = json.loads(content[8 : 8 + size]).get("__metadata__", {}).get(ABOUT, "")
        return tensors, about
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


def read_head(
    path: Path, notes: Mapping[str, Any], codec: HiddenStates, name: str
) -> tuple[Head, Tensor | None]:
    """Read the head of what is stored, and the units' sizes [R] if there are some.

    Args:
        path: of the file.
        notes: as `StoredHead.notes` gives them.
        codec: of the cache.
        name: for messages.

    Raises:
        CacheCorrupt: the file holds another head than the notes say.
    """
    tensors, about = read_tensors(path, name)
    wanted = _about(notes, codec)
    if about != wanted:
        raise CacheCorrupt(f"{name}: it must be of {wanted}, as the manifest says, got {about!r}")
    dtype = notes["dtype"]
    vocab, width = notes[SHAPE][0], notes[WIDTH]
    weight = _tensor(tensors, "weight", [vocab, width], name, dtype)
    bias = _tensor(tensors, "bias", [vocab], name, dtype) if notes["has_bias"] else None
    sizes = _tensor(tensors, SIZES, [width], name) if extra_of(codec) == SIZES else None
    return Head(weight, bias, notes["logit_scale"], notes["softcap"]), sizes


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
