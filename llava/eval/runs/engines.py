"""The two engines that can answer a run: this repository's own, and vLLM in a Python environment of its own.

vLLM needs other versions of torch and transformers than this repository pins, so its workers run under another Python:
$VLLM_PYTHON, else .venv-vllm/bin/python of the checkout (make vllm), else the launcher's own. Imports no torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field

from llava.common.errors import UserError
from llava.common.files import REPOSITORY
from llava.config import AdaVConfig
from llava.integrations.vllm.settings import check

ENGINES = ("llava", "vllm")
# Seconds that the other Python has to say what is installed. A cold start from a network disk takes several.
_PATIENCE = 120
# Run by the other Python, which may have neither this package nor any other of it.
_PROBE = """\
import importlib.metadata as metadata, json
found = metadata.packages_distributions().get("vllm")
plugins = metadata.entry_points(group="vllm.general_plugins")
plugin = any(plugin.value.startswith("llava.") for plugin in plugins)
print(json.dumps({"version": metadata.version(found[0]) if found else None, "plugin": plugin}))
"""


@dataclass(frozen=True)
class RunEngine:
    """The engine of a run. name: one of ENGINES. version: vLLM's. python: the interpreter that its workers run under."""

    name: str = "llava"
    version: str | None = None
    python: str = field(default_factory=lambda: sys.executable)

    @classmethod
    def named(cls, name: str) -> RunEngine:
        """Return the engine `name`. UserError if vLLM, or this package beside it, is not installed."""
        if name == "llava":
            return cls()
        python = worker_python(name)
        return cls(name, _vllm_version(python), python)

    @property
    def identity(self) -> dict | None:
        """What an answer depends on. None for the own engine, whose runs have no such entry."""
        return None if self.name == "llava" else {"name": self.name, "version": self.version}

    def check(self, config: AdaVConfig, shards: int | None, devices: list[str]) -> None:
        """Raise UserError for what vLLM cannot run. shards: None is one per device. devices: of this machine, [] is the CPU."""
        if self.name == "llava":
            return
        check(config)
        if devices and shards and shards > len(devices):
            # Each vLLM takes nearly all memory of its GPUs when it starts.
            raise UserError(
                f"--shards is {shards}, allowed with --engine vllm are at most {len(devices)}: one per GPU or group of GPUs"
            )


def worker_python(name: str) -> str:
    """Return the path of the Python that workers of the engine `name` run under."""
    if name == "llava":
        return sys.executable
    if named := os.environ.get("VLLM_PYTHON"):
        return named
    beside = REPOSITORY and REPOSITORY / ".venv-vllm" / "bin" / "python"
    return str(beside) if beside and beside.is_file() else sys.executable


def _vllm_version(python: str) -> str:
    """Return the version of the vLLM that `python` has."""
    try:
        said = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, timeout=_PATIENCE, check=True)
        found = json.loads(said.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise UserError(f"{python}: is no Python that can look for vLLM ({type(error).__name__})") from None
    if found["version"] is None:
        raise UserError(
            f"{python}: has no vLLM, which --engine vllm needs; make vllm installs it into .venv-vllm, and VLLM_PYTHON= "
            "names another Python"
        )
    if not found["plugin"]:
        raise UserError(
            f"{python}: has vLLM {found['version']}, but not this package as its plugin; "
            f"{python} -m pip install --no-deps -e {REPOSITORY or 'adav'} adds it"
        )
    return found["version"]
