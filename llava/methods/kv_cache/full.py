"""Everything is kept and read: what decoding costs without a policy."""

from __future__ import annotations

from dataclasses import dataclass

from llava.methods.kv_cache.base import CachePolicy


@dataclass(frozen=True)
class Full(CachePolicy):
    """No entry is evicted and every step reads them all. generate() leaves it to transformers' own cache."""

    @classmethod
    def of(cls, config) -> Full:
        return cls()
