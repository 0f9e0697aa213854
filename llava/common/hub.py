"""Folder of a checkpoint: a local folder as it is, or a hub name, which is downloaded once.

Imports no torch.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

from llava.common.errors import UserError, first_line
from llava.common.files import PACKAGE

PATIENCE = 3.0  # seconds in which the hub must answer, unless HF_HUB_ETAG_TIMEOUT is set
_WAYS_OUT = (
    "allowed are the path of a folder, HF_ENDPOINT=URL for a mirror, HF_HUB_ETAG_TIMEOUT=SECONDS for a slow network, and "
    "HF_HUB_OFFLINE=1 where the hub's cache on this machine has it"
)


class HubSilent(Exception):
    """The hub cannot be reached; the message says why."""


def checkpoint_folder(name, weights: bool = True, fetch: bool = True) -> Path | None:
    """Folder of `name`, which is a local folder or a hub name (owner/name).

    weights: False downloads only the small files.
    fetch: False uses no network. The result is None if the hub checkpoint is not on this machine already.

    UserError if there is no such folder and the hub does not have it either.
    """
    path, text = Path(name), os.fspath(name)
    if path.is_dir():
        return path
    if (PACKAGE / text / "config.json").is_file():  # a demo checkpoint, which comes with the package
        return PACKAGE / text
    owner, _, rest = text.partition("/")
    # If the first part is a folder here, a path was meant. Asking the hub could load a stranger's model of that name.
    if not rest or "/" in rest or owner in ("", ".", "..", "~") or path.exists() or Path(owner).exists():
        raise UserError(f"{name}: no such folder, allowed are a checkpoint folder and a hub name (owner/name)")
    _refuse_bad_name(text)
    return _fetch(text, weights) if fetch else _cached(text)


def _refuse_bad_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name}: no such folder, and no name that the hub can have ({first_line(error)})") from None


def _cached(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _fetch(name: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    try:
        files = files_on_hub(name)
    except HubSilent as error:
        folder = _cached(name)
        if folder is None:
            raise UserError(f"{name}: no such folder here, and {error}; {_WAYS_OUT}") from None
        print(f"{name}: {error}; the copy in the hub's cache is used", file=sys.stderr)
        return folder
    patterns = ["*.json", "*.txt", "*.jinja", "tokenizer.model"]
    if weights:
        patterns.append("*.safetensors")
        if not any(file.endswith(".safetensors") for file in files):
            patterns.append("*.bin")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the hub client announces each retry; the UserError below reports the failure once
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # hub errors, network errors
        raise UserError(f"{name}: no such folder here, and the hub did not give it ({first_line(error)})") from error
    finally:
        logging.set_verbosity(verbosity)


def files_on_hub(name: str, repo_type: str = "model") -> list[str]:
    """Names of the files that the hub has under `name`; [] where it answers with an error, which a download then tells.

    Says on stderr that the hub is asked. Raises HubSilent after a few seconds without an answer, or offline. In a thread,
    because looking up the hub's address has no time limit of its own.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        raise HubSilent("HF_HUB_OFFLINE is set")
    print(f"{name}: asking {constants.ENDPOINT} ...", file=sys.stderr, flush=True)
    patience = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or PATIENCE)
    outcome: list = []

    def ask() -> None:
        try:
            outcome.append(HfApi().repo_info(name, repo_type=repo_type, timeout=patience))
        except Exception as error:  # each HTTP library raises its own
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    (found,) = outcome or [TimeoutError(f"no answer in {patience:g} s")]
    if isinstance(found, HfHubHTTPError):
        return []
    if isinstance(found, Exception):
        raise HubSilent(f"{constants.ENDPOINT} cannot be reached ({first_line(found)})")
    return [file.rfilename for file in found.siblings or []]


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
