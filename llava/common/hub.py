"""Folder of a checkpoint: a local folder as it is, or a hub name, which is downloaded once.

Imports no torch.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path

from llava.common.errors import UserError, first_line


def checkpoint_folder(name, weights: bool = True, fetch: bool = True) -> Path | None:
    """Folder of `name`, which is a local folder or a hub name (owner/name).

    weights: False downloads only the small files.
    fetch: False uses no network. The result is None if the hub checkpoint is not on this machine already.

    UserError if there is no such folder and the hub does not have it either.
    """
    path, text = Path(name), os.fspath(name)
    if path.is_dir():
        return path
    owner, _, rest = text.partition("/")
    # If the first part is a folder here, a path was meant. Asking the hub could load a stranger's model of that name.
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
    logging.set_verbosity_error()  # the hub client announces each retry; the UserError below reports the failure once
    try:
        if weights:
            # Many repositories hold the same weights twice. The .bin files are downloaded only where they are needed.
            patterns.append("*.safetensors")
            try:
                complete = any(file.endswith(".safetensors") for file in HfApi().list_repo_files(name))
            except Exception:  # offline: snapshot_download then takes what the local cache has
                complete = False
            if not complete:
                patterns.append("*.bin")
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # hub errors, network errors and bad names share no base class
        raise UserError(f"{name}: no such folder here, and the hub did not give it ({first_line(error)})") from error
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def quiet_loading():
    """Context that silences transformers' warnings while a checkpoint is loaded.

    transformers warns about weights that it did not find. Our loader loads them afterwards or refuses the checkpoint,
    so the warning would be a false alarm. transformers also draws its loading bar into log files; the bar is switched
    off where stderr is not a terminal.
    """
    from transformers.utils import logging  # not at the top: the launcher imports this file and must not import torch

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
