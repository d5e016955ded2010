"""Whether a cache is of the model behind a server: by what both say, not by the address.

A teacher's entry in a manifest has a `fingerprint` if it was a server. Earlier versions wrote the
address as its name, and no fingerprint.
"""

import logging
from collections.abc import Mapping
from typing import Any

from hf_distill.teachers.server_identity import Fingerprint, same_name

logger = logging.getLogger(__name__)

FINGERPRINT, ADDRESS, NAME, DTYPE = "fingerprint", "address", "name_or_path", "dtype"
COMPARED_HERE = (FINGERPRINT, ADDRESS, NAME, DTYPE)


def is_same(found: Any, wanted: Mapping[str, Any]) -> bool:
    """Return whether a cache's teacher is the server's model that would go on with it."""
    if not isinstance(found, Mapping) or FINGERPRINT not in wanted or _rest_differs(found, wanted):
        return False
    if difference(found, wanted) is not None:
        return False
    if FINGERPRINT not in found:
        if found.get(NAME) != wanted[ADDRESS]:
            return False
        logger.warning(
            "the cache of %s has no fingerprint, as those of earlier versions: that the server has "
            "the same model is not checked",
            wanted[ADDRESS],
        )
    return True


def difference(found: Any, wanted: Mapping[str, Any]) -> str | None:
    """Return in which way two servers' models differ, with both fingerprints; or None.

    None is also what cannot be compared: one of them is not a server's, or an earlier version's.
    """
    if not isinstance(found, Mapping) or FINGERPRINT not in found or FINGERPRINT not in wanted:
        return None
    try:
        one, two = (Fingerprint.from_json(x[FINGERPRINT]) for x in (found, wanted))
    except (ValueError, TypeError, KeyError):
        return None  # `first_difference` shows it
    names = f"it is of {found.get(NAME)} ({found.get(ADDRESS)}), "
    names += f"this server has {wanted[NAME]} ({wanted[ADDRESS]})"
    fault = one.fault(two)
    if fault is not None:
        return f"{names}; {fault}"
    both = f"the fingerprints are {one} and {two}"
    if not same_name(str(found.get(NAME)), wanted[NAME]):
        return f"{names}, the names must end alike; {both}"
    dtypes = [x.get(DTYPE) for x in (found, wanted)]
    if None not in dtypes and dtypes[0] != dtypes[1]:
        return f"{names}, the dtypes {dtypes[0]} and {dtypes[1]} must be the same; {both}"
    return None


def _rest_differs(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    names = (found.keys() | wanted.keys()) - set(COMPARED_HERE)
    return any(found.get(name) != wanted.get(name) for name in names)
