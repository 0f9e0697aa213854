"""Joining of answers and annotations by key. Every mismatch is counted, and the order does not matter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

from llava.common.errors import UserError


def join(
    answers: Iterable[tuple[Hashable, str]],
    labels: Iterable[tuple[Hashable, Any]],
    source: Path,
    partial: bool = False,
    repeats: bool = False,
) -> dict[Hashable, tuple[list[str], list[Any]]]:
    """Return key -> (its answers, its labels), in the order of the answers.

    answers, labels: (key, answer) and (key, label) pairs. source: the annotation file, for messages.
    repeats: a key may occur several times; otherwise there is one answer and one label per key.
    partial: labels without an answer are left out.
    Raises UserError for a repeated key without `repeats`, an answer without label, or a label without answer.
    """
    grouped = _grouped(answers)
    labelled = _grouped(labels)
    if not repeats:
        for what, groups in (("labels", labelled), ("answers", grouped)):
            twice = [key for key, group in groups.items() if len(group) > 1]
            if twice:
                raise UserError(f"{source}: {len(twice)} questions have several {what}, the first is {shown(twice[0])}")
    unlabelled = [key for key, group in grouped.items() if len(group) > len(labelled.get(key, ()))]
    unanswered = [key for key, group in labelled.items() if len(group) > len(grouped.get(key, ()))]
    if not labelled or not grouped:
        raise UserError(f"{source}: there are {len(labelled)} annotations and {len(grouped)} answers, nothing to score")
    if unlabelled or (unanswered and not partial):
        parts = []
        if unlabelled:
            parts.append(
                f"{len(unlabelled)} of {len(grouped)} answered questions are not in it, or less often (the first: {shown(unlabelled[0])})"
            )
        if unanswered and not partial:
            parts.append(
                f"{len(unanswered)} of its {len(labelled)} questions have no answer (the first: {shown(unanswered[0])})"
            )
        raise UserError(f"{source}: does not match the answers, " + " and ".join(parts))
    return {key: (group, labelled[key]) for key, group in grouped.items()}


def has_label(keys: Iterable[Hashable], labels: Iterable[tuple[Hashable, Any]]) -> list[bool]:
    """Per key, whether `labels` has one for it; of a key that comes more often than its labels, the first ones have."""
    left = Counter(key for key, _ in labels)
    found = []
    for key in keys:
        found.append(left[key] > 0)
        left[key] -= 1
    return found


def only_labelled(answers: list[tuple[Hashable, Any]], labels: Iterable[tuple[Hashable, Any]]) -> list[tuple]:
    """The answers to questions that `labels` knows, in their order."""
    known = {key for key, _ in labels}
    return [(key, answer) for key, answer in answers if key in known]


def agreed(labels: list, key: Hashable, source: Path):
    """Return the common label of a question that was annotated several times. Raises UserError if labels differ."""
    if any(label != labels[0] for label in labels):
        raise UserError(f"{source}: has different labels for one question ({shown(key)})")
    return labels[0]


def _grouped(pairs: Iterable[tuple[Hashable, Any]]) -> dict[Hashable, list]:
    """Return key -> values, with keys in the order in which they first occur."""
    groups: dict[Hashable, list] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def shown(key: Hashable) -> str:
    """A key in a message."""
    return ", ".join(map(str, key)) if isinstance(key, tuple) else str(key)


def mean(values: Iterable[float]) -> float:
    """Return the arithmetic mean. It does not depend on the order of the values."""
    # fsum rounds only once. The last digits of a plain sum depend on the order.
    listed = list(values)
    return math.fsum(listed) / len(listed)
