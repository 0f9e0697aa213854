"""Part of a resized picture, computed without the rest of it: Pillow's bicubic filter, bit for bit.

A cropping image processor resizes a picture until its shorter side fits, and then cuts the middle out. Of a picture of
8,192 x 1 pixels it makes 2,752,512 x 336 first. Padding the same picture makes a square of 8,192 x 8,192. Here only the
pixels that are kept are computed. Pillow's own `resize(box=...)` rounds the box to float32, so its pixels differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

SUPPORT = 2.0  # pixels on each side of the centre that a bicubic filter reads
TOGETHER, COLUMNS = 32, 1024  # pixels of the resized axis and of the other one that are computed at a time
PRECISION = 1 << 22  # Pillow's weights of 8-bit pictures are whole multiples of 1 / PRECISION


@dataclass(frozen=True)
class Axis:
    """One axis of a picture that lies on a canvas. All numbers are pixels.

    canvas: length of the canvas. size: its length once it is resized. start, stop: the part of it that is wanted then.
    offset: where the picture begins on the canvas.
    """

    canvas: int
    size: int
    start: int
    stop: int
    offset: int = 0

    @property
    def scale(self) -> float:
        return self.canvas / self.size

    def reads(self, nth: int) -> tuple[int, int]:
        """[first, last) pixels of the canvas that the pixel `nth` of the resized one is computed from."""
        center, reach = (nth + 0.5) * self.scale, SUPPORT * max(self.scale, 1.0)
        return max(0, int(center - reach + 0.5)), min(self.canvas, int(center + reach + 0.5))

    def weights(self, nth: int) -> np.ndarray:
        """The weights of these pixels: float64 that are whole numbers, to be divided by PRECISION."""
        distances = np.arange(*self.reads(nth)) - (nth + 0.5) * self.scale + 0.5
        weights = _bicubic(distances * (1.0 / max(self.scale, 1.0)))
        weights /= weights.cumsum()[-1]  # added one after another, as Pillow does
        return np.trunc(weights * PRECISION + np.copysign(0.5, weights))


def resized_part(image: Image.Image, across: Axis, down: Axis, fill: Sequence[int] = (0, 0, 0)) -> Image.Image:
    """The wanted part of a resized canvas of colour `fill` with an RGB picture on it."""
    top = max(0, down.reads(down.start)[0] - down.offset)
    bottom = max(top, down.reads(down.stop - 1)[1] - down.offset)
    pixels = np.asarray(image)[top:bottom]
    # Pillow resizes along rows first, and rounds to 8 bits before it resizes along columns.
    pixels = _resized(pixels.swapaxes(0, 1), across, across.offset, fill).swapaxes(0, 1)
    return Image.fromarray(_resized(np.ascontiguousarray(pixels), down, down.offset + top, fill))


def _resized(pixels: np.ndarray, axis: Axis, offset: int, fill: Sequence[int]) -> np.ndarray:
    """uint8 [n, m, 3] at `offset` of an axis -> uint8 [stop - start, m, 3]."""
    found = np.empty((axis.stop - axis.start, *pixels.shape[1:]), np.uint8)
    for start in range(axis.start, axis.stop, TOGETHER):
        stop = min(start + TOGETHER, axis.stop)
        first, weights = _weights(axis, start, stop)
        begin, end = (min(max(at - first, 0), weights.shape[1]) for at in (offset, offset + len(pixels)))
        inside = weights[:, begin:end]
        outside = (weights.sum(axis=1) - inside.sum(axis=1))[:, None, None] * np.asarray(fill, np.float64)
        own, part = pixels[max(0, first - offset) :][: end - begin], found[start - axis.start : stop - axis.start]
        if begin == end:
            part[:] = _rounded(outside)
            continue
        for at in range(0, pixels.shape[1], COLUMNS):
            # Sums of whole numbers below 2^53 are exact in float64.
            sums = np.tensordot(inside, own[:, at : at + COLUMNS].astype(np.float64), 1) + outside
            part[:, at : at + COLUMNS] = _rounded(sums)
    return found


def _rounded(sums: np.ndarray) -> np.ndarray:
    return np.clip(np.floor(sums / PRECISION + 0.5), 0, 255)


def _weights(axis: Axis, start: int, stop: int) -> tuple[int, np.ndarray]:
    """(the first pixel of the canvas that the resized pixels start to stop are computed from, their weights)."""
    first, last = axis.reads(start)[0], axis.reads(stop - 1)[1]
    weights = np.zeros((stop - start, last - first))
    for nth in range(start, stop):
        begin, end = axis.reads(nth)
        weights[nth - start, begin - first : end - first] = axis.weights(nth)
    return first, weights


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -0.5, which is Pillow's."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
