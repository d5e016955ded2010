"""What a server is: what it says of its model, and a fingerprint of what the model says.

A fingerprint is the most probable tokens behind each of some fixed ones. Two equal requests to one
server differ by nothing (vLLM 0.32); one model on other devices or in another implementation by
what its dtype rounds, another model by nats. Logits in 16 bits stand in coarse steps: 1/16 nat in
bfloat16 between 8 and 16.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from hf_distill.teachers.vllm_client import Completions, TopK

NOT_LISTED = (404, 405, 501)  # statuses of servers that do not say what they are
FINGERPRINT_TOKENS = 32
FINGERPRINT_ENTRIES = 5  # of each
LEAST = -50.0  # a log-probability below which a difference says nothing
SHOWN = 4  # positions of a fingerprint in an error
# Steps of logits, in nats, from bfloat16's above 16 to float16's above 1
STEPS = tuple(2.0**-i for i in range(3, 11))
ROUNDED = 2e-5  # what float32 log-probabilities of one token may miss a step by, in nats
# Means of differences, in nats. float32: 1e-4 at most over 941 tokens of vLLM and Transformers.
# bfloat16: 0.08 in the mean, steps of 1/16
TOLERANCE_32, TOLERANCE_16 = 0.02, 0.2


@dataclass(frozen=True)
class ServedModel:
    """Holds what a server says of a model; None is not said.

    Attributes:
        name: that it is asked by.
        root: what was loaded, a name or a folder.
        max_model_len: tokens of a row, with the one that is generated.
        dtype: of the weights.
        is_vllm: whether the server says that it is vLLM.
    """

    name: str
    root: str | None = None
    max_model_len: int | None = None
    dtype: str | None = None
    is_vllm: bool = False


def ask_model(client: Completions) -> ServedModel:
    """Ask a server what it serves by the name that the client asks for.

    Raises:
        RemoteTeacherError: it does not answer, or has no such model.
    """
    url = f"{client.base}/models"
    response = client.requests.send("GET", url)
    if response.status_code in NOT_LISTED:
        return ServedModel(client.model)
    try:
        if response.status_code != 200:
            raise ValueError("the status must be 200")
        cards = {card["id"]: card for card in response.json()["data"]}
    except (ValueError, TypeError, KeyError) as error:
        raise client.error(response, f"{url} must list models, got {error!r}") from error
    if client.model not in cards:
        known = ", ".join(map(repr, cards)) or "none"
        raise client.error(response, f"the server must have the model {client.model!r}, it has "
                           f"{known}")  # fmt: skip
    card = cards[client.model]
    length, root, dtype = (card.get(x) for x in ("max_model_len", "root", "dtype"))
    return ServedModel(
        client.model,
        root if isinstance(root, str) and root else None,
        length if type(length) is int and length > 1 else None,
        dtype if isinstance(dtype, str) else None,
        card.get("owned_by") == "vllm",
    )


@dataclass(frozen=True)
class Fingerprint:
    """Holds what a model says behind fixed tokens.

    Attributes:
        ids: those.
        entries: of each position from the second, its most probable tokens.
    """

    ids: Sequence[int]
    entries: Sequence[TopK]

    @classmethod
    def of(cls, ids: Sequence[int], positions: Sequence[TopK]) -> "Fingerprint":
        """Keep the first entries of each position, which are the most probable."""
        kept = [
            {i: round(max(x, LEAST), 6) for i, x in list(each.items())[:FINGERPRINT_ENTRIES]}
            for each in positions
        ]
        return cls(list(ids), kept)

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {"ids": list(self.ids), "log_probs": [list(x.items()) for x in self.entries]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Fingerprint":
        """Read what `to_json` returned.

        Raises:
            ValueError, TypeError, KeyError: it is something else.
        """
        entries = [{int(i): float(x) for i, x in each} for each in content["log_probs"]]
        ids = [int(i) for i in content["ids"]]
        if len(entries) != len(ids) - 1 or not all(entries):
            raise ValueError("each token but the first must have log-probabilities")
        return cls(ids, entries)

    @property
    def step(self) -> float | None:
        """Return the step that logits stand in, in nats; 0 if in none, None if that is not seen."""
        apart = [
            abs(x - y)
            for each in self.entries
            for x, y in zip(list(each.values())[:-1], list(each.values())[1:], strict=True)
            if x != y and y > LEAST
        ]
        if not apart:
            return None
        steps = (s for s in STEPS if all(abs(x - s * round(x / s)) < ROUNDED for x in apart))
        return next(steps, 0.0)

    @property
    def precision(self) -> str:
        """Describe the logits' precision in words."""
        step = self.step
        if step is None:
            return "logits of a precision that one entry does not show"
        return f"logits in steps of 1/{1 / step:.0f} (16 bits)" if step else "logits in 32 bits"

    def apart(self, other: "Fingerprint") -> float:
        """Return the mean difference of log-probabilities in nats; infinite at other tokens.

        An entry that the other lacks is there at most its smallest.
        """
        if list(self.ids) != list(other.ids):
            return math.inf
        found: list[float] = []
        for one, two in zip(self.entries, other.entries, strict=True):
            found += [abs(one[i] - two[i]) for i in one.keys() & two.keys()]
            found += [max(0.0, one[i] - min(two.values())) for i in one.keys() - two.keys()]
            found += [max(0.0, two[i] - min(one.values())) for i in two.keys() - one.keys()]
        return math.fsum(found) / len(found)

    def tolerance(self, other: "Fingerprint") -> float:
        """Return how far apart fingerprints of one model in one dtype may be, in nats."""
        return TOLERANCE_32 if 0.0 in (self.step, other.step) else TOLERANCE_16

    def fault(self, other: "Fingerprint") -> str | None:
        """Return why another one is not of the same model and dtype, or None."""
        apart, allowed = self.apart(other), self.tolerance(other)
        if apart <= allowed:
            return None
        return (
            f"log-probabilities of a probe must be {allowed:g} nats apart in the mean at most, got "
            f"{apart:.2g}: {self} and {other}"
        )

    def __str__(self) -> str:
        """Return the most probable tokens of the first positions, and the logits' precision."""
        first = ", ".join(f"{max(x, key=x.__getitem__)} at {max(x.values()):.4f}"
                          for x in self.entries[:SHOWN])  # fmt: skip
        return f"[{first}, ...; {self.precision}]"


def same_name(one: str, other: str) -> bool:
    """Return whether two names of models, or folders, end alike: a folder may have moved."""
    return PurePosixPath(one).name == PurePosixPath(other).name
