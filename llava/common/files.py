"""Reading and writing files: no write leaves half a file, and every failure is one sentence."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from llava.common.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
#: The checkout that this package lies in; None where pip installed it as a wheel.
REPOSITORY = PACKAGE.parent if (PACKAGE.parent / "scripts" / "launch.sh").is_file() else None
#: Where runs, data and pictures go unless told: the checkout, from any working directory; else the working directory.
BASE = REPOSITORY or Path()
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file size limit is reached",
}


@contextmanager
def as_user_error_on_write(path):
    """Context that turns an OSError while writing `path` into a UserError, which says whether anything is lost."""
    try:
        yield
    except OSError as error:
        why = _FULL.get(error.errno, error.strerror or str(error))
        kept = (
            "; what is answered so far is kept, and the same command continues from there"
            if error.errno in _FULL
            else ""
        )
        raise UserError(f"{path}: cannot be written, {why}{kept}") from None


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the whole old file or the whole new one, never a part."""
    path = Path(path)
    # The process id keeps apart two processes that write the same file. The same folder: a rename is atomic only
    # within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with as_user_error_on_write(path):
        try:
            # JSON can hold half a surrogate pair, which is no UTF-8. A file that is not written would cost a whole run.
            with open(temporary, "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
                # Without fsync, a power loss after the rename can leave an empty file under the final name.
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_json(path: Path, value, indent: int | None = 2) -> None:
    """Write `value` as a JSON file atomically. Creates its folder."""
    with as_user_error_on_write(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write `rows` as a .jsonl file atomically, one row per line. Creates its folder."""
    with as_user_error_on_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_json(path: Path):
    """Value of a JSON file that must exist. UserError says what is wrong with it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON file ({error})") from None


def digest_of(value) -> str:
    """Ten hex digits of SHA-256 that identify a JSON value. The order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def repair(path: Path) -> None:
    """Cut off an incomplete last line, so that the next appended row starts on a line of its own.

    A process that is killed while it appends leaves such a line.
    """
    # Reads backwards in blocks: answer files can be large, and only the end matters.
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)
