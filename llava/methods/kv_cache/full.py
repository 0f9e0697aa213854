"""full: every entry is stored and read, as in decoding without a policy."""

from __future__ import annotations

from dataclasses import dataclass

from llava.methods.kv_cache.base import CachePolicy


@dataclass(frozen=True)
class Full(CachePolicy):
    """No entry is evicted, and every step reads all entries. generate() uses the cache of transformers for it."""

    @classmethod
    def from_config(cls, config) -> Full:
        return cls()
