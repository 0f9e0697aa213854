"""From the name of a checkpoint to a folder with its files: a local folder as it is, a hub name downloaded once.

Imports no torch.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

from llava.common.errors import UserError, first_line


def checkpoint_folder(name, weights: bool = True, fetch: bool = True) -> Path | None:
    """Folder of `name`, a local folder or a hub name (owner/name). weights=False fetches only the small files.

    fetch=False asks no network: None where a hub checkpoint is not on this machine already.
    Raises UserError where there is no such folder and the hub does not give it either.
    """
    path, text = Path(name), os.fspath(name)
    if path.is_dir():
        return path
    owner, _, rest = text.partition("/")
    # Where the first part is a folder here, a path was meant: never ask the hub for somebody's namesake.
    if not rest or "/" in rest or owner in ("", ".", "..", "~") or path.exists() or Path(owner).exists():
        raise UserError(f"{name}: no such folder, allowed are a checkpoint folder and a hub name (owner/name)")
    return _fetch(text, weights) if fetch else _cached(text)


def _cached(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _fetch(name: str, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import logging

    patterns = ["*.json", "*.txt", "*.jinja", "tokenizer.model"]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it announces each of its retries; what is wrong is said once, below
    try:
        if weights:
            patterns.append("*.safetensors")
            try:
                complete = any(file.endswith(".safetensors") for file in HfApi().list_repo_files(name))
            except Exception:  # offline: what is in the local cache decides
                complete = False
            if not complete:
                patterns.append("*.bin")
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # hub errors, network errors, a bad name
        raise UserError(f"{name}: no such folder here, and the hub did not give it ({first_line(error)})") from error
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def quiet_loading():
    """transformers reports weights that it did not find, which are loaded afterwards or refused here; no alarm for those.

    It draws its loading bar into log files too: a log gets none.
    """
    verbosity, bar = logging.get_verbosity(), not sys.stderr.isatty() and logging.is_progress_bar_enabled()
    logging.set_verbosity(max(verbosity, logging.ERROR))
    if bar:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
