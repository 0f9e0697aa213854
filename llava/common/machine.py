"""Versions, commit and hardware that a number was measured with. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from llava.common.files import PACKAGE, REPOSITORY

_CGROUP = Path("/sys/fs/cgroup")  # limits of a container; on Linux with version 2 of control groups
_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "pillow", "triton", "peft")


def environment() -> dict:
    """Versions of Python and of the packages, and hardware of this machine."""
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "cpu": _first_value("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": cores(),
        "memory": _first_value("/proc/meminfo", "MemTotal"),
        "gpus": gpus(),
    }


def cores() -> int:
    """CPU cores that this process may use."""
    # cpu_count() ignores the affinity mask, so in a container or under taskset it returns too many. macOS has no mask.
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A container may have a share of the time of all cores: microseconds per period, or "max" without a limit.
    quota, _, period = (_line(_CGROUP / "cpu.max") or "max").partition(" ")
    return count if quota == "max" else max(1, min(count, round(int(quota) / int(period))))


def available_memory() -> int | None:
    """Bytes that new processes may take without swapping, also inside a container's limit. None if nothing says it."""
    found = []
    if text := _first_value("/proc/meminfo", "MemAvailable"):
        found.append(1024 * int(text.removesuffix("kB")))
    limit, used = _line(_CGROUP / "memory.max"), _line(_CGROUP / "memory.current")
    if limit and used and limit != "max":
        # What is used includes cached files, which the kernel drops when a process needs the memory.
        cached = _first_value(str(_CGROUP / "memory.stat"), "inactive_file", " ") or 0
        found.append(max(0, int(limit) - int(used) + int(cached)))
    return min(found, default=None)


def gpus() -> list[str]:
    """One line per NVIDIA GPU of the machine, also those that CUDA_VISIBLE_DEVICES hides. [] if there is none."""
    return [line for line in _output(["nvidia-smi", "-L"]).splitlines() if line.startswith("GPU ")]


def torch_is_for_cpu() -> bool:
    """True if the installed torch is a build without CUDA, or if there is no torch."""
    return (_version("torch") or "+cpu").endswith("+cpu")


def commit() -> str | None:
    """The checkout's commit, with "+" where files differ from it; None without a repository.

    The environment variable ADAV_COMMIT has priority. It is for copies of the files without their repository.
    """
    if given := os.environ.get("ADAV_COMMIT"):
        return given
    if REPOSITORY is None or not (REPOSITORY / ".git").exists():
        return None
    head = _output(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]).strip()
    # A plain `git status` takes the index lock, and a git command of the user at that moment would fail.
    changed = _output(
        ["git", "--no-optional-locks", "-C", str(REPOSITORY), "status", "--porcelain", "--untracked-files=no"]
    )
    return head + ("+" if changed.strip() else "") if head else None


def code_digest(engine: str = "llava") -> str:
    """Ten hex digits that identify the source which answers depend on.

    That is configuration, prompts, images, methods, model and kernels, and with the engine "vllm" its plugin. A resumed run
    warns if the digest has changed.
    """
    seen = hashlib.sha256()
    folders = ["common", "methods", "model", "inference", "kernels"]
    files = ["image_reader.py", "answer_on_vllm.py" if engine == "vllm" else "answer_shard.py"]
    if engine == "vllm":
        folders.append("integrations/vllm")
    paths = [*PACKAGE.glob("*.py"), *(path for folder in folders for path in PACKAGE.glob(f"{folder}/**/*.py"))]
    for path in sorted([*paths, *(PACKAGE / "eval" / "runs" / name for name in files)]):
        seen.update(path.read_bytes())
    return seen.hexdigest()[:10]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _line(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _first_value(path: str, key: str, separator: str = ":") -> str | None:
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(key):
                return line.split(separator, 1)[1].strip()
    except OSError:
        pass
    return None


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
