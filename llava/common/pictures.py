"""Opened image files as RGB pictures: as LLaVA reads them, or as a person sees them. Imports no torch."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps


def rgb(image: Image.Image) -> Image.Image:
    """Return a picture in RGB as LLaVA reads it: transparency and EXIF orientation are ignored.

    16-bit greys are scaled to 8 bits. Pillow would clip them to white."""
    return (_eight_bits(image) if _has_16_bits(image) else image).convert("RGB")


def as_seen(image: Image.Image) -> Image.Image:
    """Return a picture as a person sees it: upright by its EXIF orientation, and on white where it is transparent."""
    image = _upright(image)
    if not image.has_transparency_data:
        return rgb(image)
    seen = _with_alpha(image)
    page = Image.new("RGB", seen.size, (255, 255, 255))
    page.paste(seen, mask=seen.getchannel("A"))
    return page


def _with_alpha(image: Image.Image) -> Image.Image:
    if not _has_16_bits(image):
        return image.convert("RGBA")
    seen, clear = _eight_bits(image).convert("RGBA"), np.asarray(image) == image.info["transparency"]
    seen.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    return seen


def _has_16_bits(image: Image.Image) -> bool:
    """Pillow opens a 16-bit grey PNG as "I;16", before its version 11 as "I". In colour it keeps the upper 8 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def _eight_bits(image: Image.Image) -> Image.Image:
    """The upper 8 of 16 bits, as Pillow reads 16-bit colours."""
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _upright(image: Image.Image) -> Image.Image:
    """The picture, turned in place so that it is still known to be a PNG. Damaged EXIF data says nothing."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # a damaged field may raise almost anything
        return image
    return image
