"""Cache policies: which KV entries decoding stores and reads. One file per policy, chosen by the configuration.

    policy = config.make_cache_policy()                # full, avl or h2o, as the switches of adav_configs.json say
    policy.plan(counts).stored(step=64)                # entries of one layer after 64 decode steps

Importing this package imports no torch. CACHES and the classes are imported on first access. `Caching` belongs to one
request and makes the `AdaptiveCache` that decoding uses. The loop that runs it is llava/model/decoding/layer_loop.py.
The attention over the stored entries is llava/kernels/decode_attention.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava.methods.lazy_names import LazyNames

if TYPE_CHECKING:
    from llava.methods.kv_cache.base import CachePolicy

__all__ = ["CACHES", "CachePolicy", "cache_names"]

# policy name -> file and class. A new policy is one file and one line here.
_CLASSES = {
    "full": "full:Full",
    "h2o": "h2o:H2O",
    "avl": "avl:AVL",
}
_OTHERS = {
    "CachePolicy": "base:CachePolicy",
}


__getattr__ = _names = LazyNames(__name__, "CACHES", _CLASSES, _OTHERS)


def cache_names() -> tuple[str, ...]:
    """Return the names of all policies without importing torch; policies that a user added to CACHES are included."""
    return _names.names()
