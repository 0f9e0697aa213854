"""File tools of the evaluation: writing that never leaves half a file, and failures told as one sentence."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from llava.common.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file size limit is reached",
}


@contextmanager
def as_user_error_on_write(path):
    """Turn an OSError while writing `path` into a UserError that says whether anything is lost."""
    try:
        yield
    except OSError as error:
        why = _FULL.get(error.errno, error.strerror or str(error))
        kept = (
            "; what is answered so far is kept, and the same command goes on from there" if error.errno in _FULL else ""
        )
        raise UserError(f"{path}: cannot be written, {why}{kept}") from None


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or leave the old one: a reader never sees half of it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with as_user_error_on_write(path):
        try:
            # JSON can hold half a surrogate pair, which is no UTF-8. A file that is not written would cost a whole run.
            with open(temporary, "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_json(path: Path, value, indent: int | None = 2) -> None:
    """A JSON file, whole or not at all; its folder is made."""
    with as_user_error_on_write(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: list[dict]) -> None:
    """A .jsonl file, whole or not at all; its folder is made."""
    with as_user_error_on_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_json(path: Path):
    """A JSON file that must be there; UserError says what is wrong with it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON file ({error})") from None


def digest_of(value) -> str:
    """Ten hex digits that differ wherever two JSON values differ."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def repair(path: Path) -> None:
    """Cut a torn last line off, so that the next row starts on a line of its own."""
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
