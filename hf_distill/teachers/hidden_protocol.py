"""What a hidden-state server and those who ask it say to each other, and the rules for both.

`GET /v1/hidden_states` answers JSON: the protocol's version, the teacher and its limits (`About`).
`GET /v1/head` answers the teacher's output head, a safetensors file. `POST /v1/hidden_states` takes
a safetensors file with the rows (`encode_rows`) and answers one with the hidden states before the
head (`encode_answer`). Errors are JSON: {"error": {"message": the rule and the value}}.

Nothing of the other side is trusted: what can be wrong is checked, and is a `ProtocolError`.

Shapes: R rows, T tokens of all rows, N asked positions of all rows, H hidden, V vocabulary.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from metal_ops import Head

PROTOCOL = "hf_distill hidden states"
VERSION = "1.0"  # another first number is refused
ASK, HEAD = "/v1/hidden_states", "/v1/head"
CONTENT_TYPE = "application/x-safetensors"  # none that a page of a browser may send elsewhere
DIGEST = "X-Content-SHA256"
DTYPES = {str(x).removeprefix("torch."): x for x in (torch.float32, torch.bfloat16, torch.float16)}
OVERHEAD = 4096  # bytes of a request besides its numbers, at most


class ProtocolError(ValueError):
    """A message breaks a rule; the text says which."""


class Row(NamedTuple):
    """Holds a row's token ids, and which outputs are asked for: ascending, below len(ids)."""

    ids: Sequence[int]
    outputs: Sequence[int]


@dataclass(frozen=True)
class Limits:
    """Says how much one request may ask for.

    Attributes:
        rows: of a request.
        tokens: of all rows of a request.
        length: of a row.
        outputs: of all rows of a request, whose hidden states are answered.
        requests: that wait for the model; more are told to come back.
    """

    rows: int
    tokens: int
    length: int
    outputs: int
    requests: int

    @property
    def bytes(self) -> int:
        """Return the size of the largest body."""
        return 4 * (2 * self.rows + 2 * self.tokens) + OVERHEAD


@dataclass(frozen=True)
class About:
    """Says what a server is.

    Attributes:
        name: of the model.
        teacher: what the model is: config, weights, dtype.
        dtype: of the hidden states and the head.
        shape: (V, H) of the head.
        has_bias: of the head.
        logit_scale: behind the head.
        softcap: behind the scale, or None.
        head_sha256: of the file of the head.
        tokenizer_sha256: of the tokenizer's ids by token, or None where it is not known.
        end_ids: at which the model ends a completion, which its chat rows are given too.
        limits: of a request.
    """

    name: str
    teacher: Mapping[str, Any]
    dtype: str
    shape: tuple[int, int]
    has_bias: bool
    logit_scale: float
    softcap: float | None
    head_sha256: str
    tokenizer_sha256: str | None
    end_ids: Sequence[int]
    limits: Limits

    @property
    def digest(self) -> str:
        """Return the sha256 of all that an answer depends on: teacher, head and dtype."""
        fields = {k: v for k, v in asdict(self).items() if k not in ("name", "limits")}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {"protocol": PROTOCOL, "version": VERSION, **asdict(self)}


KINDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "teacher": (dict,),
    "dtype": (str,),
    "shape": (list,),
    "has_bias": (bool,),
    "logit_scale": (float,),
    "softcap": (float, type(None)),
    "head_sha256": (str,),
    "tokenizer_sha256": (str, type(None)),
    "end_ids": (list,),
    "limits": (dict,),
}


def _need(holds: bool, rule: str) -> None:
    if not holds:
        raise ProtocolError(rule)


def read_about(said: Any) -> About:
    """Read what a server says of itself.

    Raises:
        ProtocolError: it is no hidden-state server, of another version, or an entry is wrong.
    """
    is_one = isinstance(said, dict) and said.get("protocol") == PROTOCOL
    _need(is_one, f"there must be a hidden-state server ({PROTOCOL!r}), got {str(said)[:80]!r}")
    version = said.get("version")
    _need(
        isinstance(version, str) and version.split(".")[0] == VERSION.split(".")[0],
        f"the server's version must be {VERSION.split('.')[0]}.*, got {version!r}: server and "
        "student need one version of hf_distill",
    )
    for key, kinds in KINDS.items():
        _need(type(said.get(key)) in kinds, f"{key} must be of {kinds}, got {said.get(key)!r:.80}")
    shape, numbers = said["shape"], [said["limits"].get(x) for x in Limits.__annotations__]
    for name, values in (("shape", shape), ("limits", numbers)):
        fine = all(type(x) is int and x >= 1 for x in values)
        _need(fine, f"{name} must be positive numbers, got {values}")
    _need(len(shape) == 2, f"shape must be [vocabulary, hidden], got {shape}")
    scales = [said["logit_scale"], said["softcap"] or 1.0]
    _need(all(map(math.isfinite, scales)), f"scale and softcap must be finite, got {scales}")
    _need(said["dtype"] in DTYPES, f"dtype must be one of {[*DTYPES]}, got {said['dtype']!r}")
    _need(
        all(type(x) is int for x in said["end_ids"]), f"end_ids must be ids, got {said['end_ids']}"
    )
    fields = {key: said[key] for key in KINDS}
    return About(**fields | {"shape": tuple(shape), "limits": Limits(*numbers)})


def _loaded(body: bytes) -> dict[str, Tensor]:
    try:
        return load(body)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise ProtocolError(f"the body must be a safetensors file: {error}") from error


def _check_names(tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
    _need(
        sorted(tensors) == sorted(names),
        f"the body must hold {sorted(names)}, got {sorted(tensors)[:8]}",
    )


def encode_rows(rows: Sequence[Row]) -> bytes:
    """Return the body that asks for rows: equal rows give equal bytes."""
    numbers = {
        "ids": [x for row in rows for x in row.ids],
        "lengths": [len(row.ids) for row in rows],
        "outputs": [x for row in rows for x in row.outputs],
        "counts": [len(row.outputs) for row in rows],
    }
    return save({name: torch.tensor(x, dtype=torch.int32) for name, x in numbers.items()})


def _parts(values: Tensor, sizes: Tensor) -> list[list[int]]:
    flat, ends = values.tolist(), list(accumulate(sizes.tolist()))
    return [flat[a:b] for a, b in pairwise([0, *ends])]


def decode_rows(body: bytes, limits: Limits, vocab: int) -> list[Row]:
    """Return the rows that a body asks for.

    Raises:
        ProtocolError: it is not what `encode_rows` makes, or asks for more than the limits.
    """
    found = _loaded(body)
    _check_names(found, ("ids", "lengths", "outputs", "counts"))
    for name, x in found.items():
        got = f"{x.dtype} {list(x.shape)}"
        _need(x.dtype == torch.int32 and x.ndim == 1, f"{name} must be int32 [n], got {got}")
    ids, lengths, outputs, counts = (found[x] for x in ("ids", "lengths", "outputs", "counts"))
    num_rows = len(lengths)
    _need(len(counts) == num_rows, f"counts must be of {num_rows} rows, got {len(counts)}")
    _need(1 <= num_rows <= limits.rows, f"rows must be 1 to {limits.rows}, got {num_rows}")
    least, most = int(lengths.min()), int(lengths.max())
    _need(
        least >= 1 and most <= limits.length,
        f"a row must have 1 to {limits.length} tokens, got {least if least < 1 else most}",
    )
    total = int(lengths.long().sum())
    _need(total == len(ids), f"ids must be the {total} of lengths, got {len(ids)}")
    _need(total <= limits.tokens, f"tokens must be at most {limits.tokens}, got {total}")
    _need(int(counts.min()) >= 0, f"counts must be at least 0, got {int(counts.min())}")
    wanted = int(counts.long().sum())
    _need(wanted == len(outputs), f"outputs must be the {wanted} of counts, got {len(outputs)}")
    _need(wanted <= limits.outputs, f"outputs must be at most {limits.outputs}, got {wanted}")
    low, high = int(ids.min()), int(ids.max())
    _need(low >= 0 and high < vocab, f"ids must be in [0, {vocab}), got {low if low < 0 else high}")
    rows = [Row(*pair) for pair in zip(_parts(ids, lengths), _parts(outputs, counts), strict=True)]
    for number, row in enumerate(rows):
        before = [-1, *row.outputs]
        fine = all(a < b < len(row.ids) for a, b in pairwise(before))
        _need(fine, f"outputs of row {number} must ascend from 0 on, below {len(row.ids)}")
    return rows


def sha256_of(body: bytes) -> str:
    """Return the sha256 of a body, in hexadecimal."""
    return hashlib.sha256(body).hexdigest()


def encode_answer(hidden: Tensor, about: About, request: str) -> bytes:
    """Return the body that answers a request.

    Args:
        hidden: [N, H] of the asked outputs, row by row.
        about: of the server.
        request: the sha256 of the request's body.
    """
    metadata = {"teacher": about.digest, "request": request}
    return save({"hidden": hidden.detach().cpu().contiguous()}, metadata)


def decode_answer(body: bytes, about: About, request: str, num_outputs: int) -> Tensor:
    """Return the hidden states [N, H] of an answer.

    Args:
        body: of the answer.
        about: what the server said at the start.
        request: the sha256 of the request's body.
        num_outputs: N.

    Raises:
        ProtocolError: it answers another request, is of another teacher, or is none.
    """
    found = _loaded(body)
    _check_names(found, ("hidden",))
    size = int.from_bytes(body[:8], "little")  # what `load` has checked
    metadata = json.loads(body[8 : 8 + size]).get("__metadata__", {})
    for name, wanted in (("request", request), ("teacher", about.digest)):
        got = metadata.get(name)
        _need(
            got == wanted,
            f"the answer must be of the {name} {wanted[:12]}, got {str(got)[:12]}"
            + ("" if name == "request" else ": the server has another teacher than before"),
        )
    hidden, wide = found["hidden"], about.shape[1]
    wanted = f"{DTYPES[about.dtype]} {[num_outputs, wide]}"
    got = f"{hidden.dtype} {list(hidden.shape)}"
    _need(got == wanted, f"hidden must be {wanted}, got {got}")
    _need(bool(hidden.isfinite().all()), "hidden states must be finite")
    return hidden


def encode_head(head: Head) -> bytes:
    """Return the file of a head on the CPU."""
    made = {"weight": head.weight.contiguous()}
    if head.bias is not None:
        made["bias"] = head.bias.contiguous()
    return save(made)


def decode_head(body: bytes, about: About) -> Head:
    """Return the head that a server has sent.

    Raises:
        ProtocolError: it is not the one that the server named.
    """
    got = sha256_of(body)
    _need(
        got == about.head_sha256, f"the head's sha256 must be {about.head_sha256[:12]}, got {got}"
    )
    found, dtype = _loaded(body), DTYPES[about.dtype]
    shapes = {"weight": list(about.shape)} | ({"bias": [about.shape[0]]} if about.has_bias else {})
    _check_names(found, [*shapes])
    for name, shape in shapes.items():
        wanted, got = f"{dtype} {shape}", f"{found[name].dtype} {list(found[name].shape)}"
        _need(got == wanted, f"{name} of the head must be {wanted}, got {got}")
    return Head(found["weight"], found.get("bias"), about.logit_scale, about.softcap)
