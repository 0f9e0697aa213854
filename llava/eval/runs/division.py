"""Division of the questions among shards: no image is used by two shards. Of several images, the first one counts."""

from __future__ import annotations

from itertools import groupby

from llava.eval.benchmarks.questions import Sample


def by_image(samples: list[Sample]) -> list[Sample]:
    """Sort samples so that those of one image are neighbours; images are in the order of their first line."""
    first: dict[str, int] = {}
    for sample in samples:
        if sample.image is not None:
            first.setdefault(sample.image, sample.line)
    return sorted(samples, key=lambda sample: (first.get(sample.image, sample.line), sample.line))


def divide(samples: list[Sample], parts: int) -> list[list[Sample]]:
    """Cut `samples` into `parts` consecutive pieces of about equal length; no image is in two pieces.

    samples: sorted by `by_image`. If there are fewer groups than parts, the last pieces are empty; a group is all
    questions about one image, or one question without image.
    """
    # 1. Places where a cut is allowed: the ends of the groups.
    ends = [0]
    for _, members in groupby(samples, key=lambda sample: sample.image or sample.key):
        ends.append(ends[-1] + len(list(members)))
    groups = len(ends) - 1
    parts, empty = min(parts, groups), max(0, parts - groups)
    # 2. The cuts, from left to right.
    cuts = [0]
    for part in range(1, parts):
        # Each later part needs a group too, so the last boundaries are not allowed. Of the others, take the one that is
        # nearest to an even division.
        allowed = range(cuts[-1] + 1, groups - (parts - part) + 1)
        cuts.append(min(allowed, key=lambda place: abs(ends[place] * parts - len(samples) * part)))
    cuts += [groups] if parts else []
    # 3. The pieces.
    pieces = [samples[ends[a] : ends[b]] for a, b in zip(cuts, cuts[1:], strict=False)]
    return pieces + [[] for _ in range(empty)]


def useful_shards(missing: list[list[Sample]], shards: int) -> int:
    """Return the number of shards to start: at most one per image (or question without image) of the longest run.

    missing: the unanswered samples of each run.
    """
    # A shard without work would load the checkpoint for nothing.
    groups = [len({sample.image or sample.key for sample in samples}) for samples in missing]
    return max(1, min(shards, max(groups)))
