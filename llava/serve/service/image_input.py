"""Opens untrusted images (bytes, data URLs, files of allowed folders) within limits, as RGB pictures.

    limits = ImageLimits()
    picture = picture_from_bytes(data, limits)               # also _from_data_url, _from_file, _from_folders

What is too large is refused by its header, before anything is decoded. Animations give their first frame. Pictures are as
a person sees them: upright, and on white where they are transparent. Imports no torch.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from llava.common.errors import UserError, first_line
from llava.common.pictures import as_seen

# Pillow has many more decoders. Untrusted files reach only these, which keeps the attack surface small.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
HEAD = 200  # letters of a data URL before its comma that are read


class ImageRefused(UserError):
    """Raised for an image that is not opened. The message is one sentence that says why."""


@dataclass(frozen=True)
class ImageLimits:
    """Limits of an image. max_bytes: of the file; max_pixels: width x height; max_side: pixels of the longer side."""

    max_bytes: int = 20 << 20
    max_pixels: int = 50_000_000
    # LLaVA-1.5 pads an image to a square: one of 1 x 50,000,000 pixels would become 2.5e15 pixels.
    max_side: int = 8192


def picture_from_bytes(data: bytes, limits: ImageLimits) -> Image.Image:
    """The RGB picture in the bytes of an image file. ImageRefused if there is none."""
    if len(data) > limits.max_bytes:
        raise ImageRefused(f"an image of {len(data):,} bytes, allowed are {limits.max_bytes:,}")
    webp = _webp_size(data)  # Pillow allocates the canvas of a WebP file in Image.open, before its size can be checked
    if webp is not None:
        _check_size(webp, limits)
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            _check_size(image.size, limits)
            image.load()
            _check_size(image.size, limits)  # a frame may be larger than its header says
            return as_seen(image)
    except ImageRefused:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the latter under python -W error
        raise ImageRefused(f"an image of too many pixels, allowed are {limits.max_pixels:,}") from None
    except Image.UnidentifiedImageError:
        raise ImageRefused(f"not an image that can be read, allowed are {', '.join(FORMATS)}") from None
    except Exception as error:  # a decoder may raise almost anything on a damaged file
        raise ImageRefused(
            f"an image that is damaged or cut short ({type(error).__name__}: {first_line(error)[:200]})"
        ) from None


def picture_from_data_url(url: str, limits: ImageLimits) -> Image.Image:
    """An RGB picture of a URL like data:image/png;base64,...; what type it is, its content says.

    Upper or lower case, blanks and line breaks do not matter, as in a browser.
    """
    head, comma, body = url.partition(",")
    kind, *parameters = "".join(head[:HEAD].lower().split()).removeprefix("data:").split(";")
    if not comma or not kind.startswith("image/") or parameters[-1:] != ["base64"]:
        raise ImageRefused(f"a data URL that begins with {head.strip()[:60]!r}, allowed is data:image/...;base64,...")
    try:
        body = body.encode("ascii").translate(None, b" \t\n\v\f\r")
        if len(body) > -(-limits.max_bytes // 3) * 4:
            raise ImageRefused(f"an image of some {len(body) * 3 // 4:,} bytes, allowed are {limits.max_bytes:,}")
        data = base64.b64decode(body, validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise ImageRefused("a data URL whose base64 cannot be read") from None
    return picture_from_bytes(data, limits)


def picture_from_file(path: str | os.PathLike, limits: ImageLimits) -> Image.Image:
    """The RGB picture in a file. The path is trusted: the user of this process names it, or it has been checked."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # open() on a pipe would block until its other end opens
            raise ImageRefused(f"{_short(path)} is no file")
        with open(path, "rb") as file:
            data = file.read(limits.max_bytes + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise ImageRefused(f"{_short(path)} cannot be read ({why})") from None
    if len(data) > limits.max_bytes:
        raise ImageRefused(f"{_short(path)} has more than {limits.max_bytes:,} bytes, which is what is allowed")
    try:
        return picture_from_bytes(data, limits)
    except ImageRefused as error:
        raise ImageRefused(f"{_short(path)}: {error}") from None


def picture_from_folders(reference: str, folders: Sequence[Path], limits: ImageLimits) -> Image.Image:
    """The RGB picture in a file below one of `folders`.

    reference: a path, absolute or relative to one of the folders, or a file:// URL. Links and `..` are resolved first.
    """
    # One message for files elsewhere and for files that do not exist: it must not tell which paths exist.
    refused = ImageRefused(f"{_short(reference)} is not a file below a folder that images may come from")
    name = reference
    if reference.startswith("file:"):
        try:
            parts = urlsplit(reference)
        except ValueError:
            raise refused from None
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise refused
        name = unquote(parts.path)
    for folder in folders:
        try:
            path = Path(folder, name).resolve(strict=True)
            inside = path.is_relative_to(Path(folder).resolve(strict=True)) and path.is_file()
        except (OSError, ValueError, RuntimeError):  # not there; a null byte or a surrogate; a loop of links
            continue
        if inside:
            try:
                return picture_from_file(path, limits)
            except ImageRefused as error:
                # The message must not show the resolved path of this machine.
                raise ImageRefused(str(error).replace(str(path), _short(reference), 1)) from None
    raise refused


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    """Raise ImageRefused for an image whose size (width, height) is beyond the limits."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageRefused(f"an image of {width} x {height} pixels, allowed is at least 1 x 1")
    if width * height > limits.max_pixels:
        raise ImageRefused(
            f"an image of {width:,} x {height:,} pixels, allowed are {limits.max_pixels:,} pixels altogether"
        )
    if max(size) > limits.max_side:
        raise ImageRefused(
            f"an image of {width:,} x {height:,} pixels, allowed are {limits.max_side:,} for the longer side"
        )


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) in the header of a WebP file (RFC 9649), None for anything else."""
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    if data[12:16] == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    return width, height


def _short(text) -> str:
    """A name in an error message: on one line, at most 200 characters."""
    text = repr(os.fspath(text))[1:-1]
    return text if len(text) <= 200 else text[:200] + "..."
