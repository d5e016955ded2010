"""Why a teacher cache is refused.

Each error takes one message, so that it reaches the caller whole from a loader's worker.
"""


class CacheError(RuntimeError):
    """A cache cannot be written, or must not be used. The others are kinds of it."""


class CacheIncomplete(CacheError):
    """The cache has no manifest, or shards that it names are not there."""


class CacheCorrupt(CacheError):
    """A file is not what was written; the message names the file and the rule it breaks."""


class CacheConfigMismatch(CacheError):
    """The folder holds a cache of something else; the message names the first difference."""


class TeacherMismatch(CacheError):
    """The cache was written from another teacher."""


class TokenizerMismatch(CacheError):
    """The cache was written with another tokenizer or chat template."""


class VocabSizeMismatch(CacheError):
    """The student has another number of logits than the cached teacher."""


class RowMismatch(CacheError):
    """A row of the batch is not in the cache, or scores tokens that were not stored."""


class TemperatureOutOfRange(CacheError):
    """The loss asks for a temperature outside the range that was declared at writing."""


class UnsupportedDivergence(CacheError):
    """The loss cannot be computed from what the codec stores."""


class FormatVersionError(CacheError):
    """The cache was written in a format that this version does not read."""
