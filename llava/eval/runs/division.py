"""Which questions are asked, and by which shard: seeded subsets of whole groups, and shards that share no image."""

from __future__ import annotations

from itertools import groupby

from llava.eval.benchmarks.questions import Sample


def by_image(samples: list[Sample]) -> list[Sample]:
    """Samples of one image together, images in the order of their first line."""
    first: dict[str, int] = {}
    for sample in samples:
        if sample.image is not None:
            first.setdefault(sample.image, sample.line)
    return sorted(samples, key=lambda sample: (first.get(sample.image, sample.line), sample.line))


def divide(samples: list[Sample], parts: int) -> list[list[Sample]]:
    """`parts` runs of neighbours, about equally long, that no image is divided between; `samples` are by image.

    Where there are fewer images (and questions without one) than parts, the last parts are empty.
    """
    ends = [0]
    for _, members in groupby(samples, key=lambda sample: sample.image or sample.key):
        ends.append(ends[-1] + len(list(members)))
    groups = len(ends) - 1
    parts, empty = min(parts, groups), max(0, parts - groups)
    cuts = [0]
    for part in range(1, parts):
        # The boundary nearest to an even cut, of those that leave a group for every part.
        allowed = range(cuts[-1] + 1, groups - (parts - part) + 1)
        cuts.append(min(allowed, key=lambda place: abs(ends[place] * parts - len(samples) * part)))
    cuts += [groups] if parts else []
    pieces = [samples[ends[a] : ends[b]] for a, b in zip(cuts, cuts[1:], strict=False)]
    return pieces + [[] for _ in range(empty)]


def useful_shards(missing: list[list[Sample]], shards: int) -> int:
    """At most as many shards as there are images (or questions without one) in the longest run."""
    groups = [len({sample.image or sample.key for sample in samples}) for samples in missing]
    return max(1, min(shards, max(groups)))
