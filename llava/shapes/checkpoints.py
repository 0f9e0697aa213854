"""The two demo checkpoints, and what `make demo` measures on each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scene:
    """The measurement on one checkpoint.

    tokens: budget K, about a tenth of the vision tokens. questions, batch: chosen so that the whole demo takes about
    two minutes on two cores.
    """

    checkpoint: str
    tokens: int
    questions: int
    batch: int
    settings: dict[str, dict]  # label -> keys that override the default configuration


_METHODS = {name: {"method": name} for name in ("none", "random", "fastervlm", "adav")}


_PUBLIC = {"adav, compat=public": {"method": "adav", "options": {"compat": "public"}}}


SCENES = (
    Scene("playground/llava-shapes-v1.5", 14, 800, 32, _METHODS),
    Scene("playground/llava-shapes-v1.6", 58, 400, 16, _METHODS | _PUBLIC),
)
