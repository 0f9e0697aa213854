"""Renews constraints.txt, the versions of every package that `make` installs: make lock [UPGRADE=--upgrade]

uv resolves the requirements of pyproject.toml (with all extras) and of scripts/lmms_eval/requirements.txt for Python 3.10 and
later, on Linux and macOS. A version that constraints.txt has stays where it still fits; --upgrade takes the newest.
`APART` and `OWN_ENVIRONMENT` are not resolved. torch is one of them: each of its builds has the same version number and other
dependencies, so the lock holds what all builds accept and none of their CUDA packages.
"""

import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, from any working directory

from llava.common.command_line import Parser  # noqa: E402
from llava.common.errors import UserError, exits_cleanly  # noqa: E402
from llava.common.files import write_atomically  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "constraints.txt"
HEADER = """\
# The versions of every package that make installs, direct and indirect; the tests and the committed figures were made with
# them. `make lock` writes this file. It has no CUDA packages and no local versions: a CPU and a CUDA torch both fit.
"""
# lmms_eval's own requirements would replace torch and transformers: it is installed without them.
APART = {"lmms-eval": "0.7.3", "torch": "2.13.0"}
# It is in an environment of its own (make vllm), because it holds back transformers.
OWN_ENVIRONMENT = ("vllm",)
LIMITS = """\
# The version that CUDA builds of torch 2.13.0 demand; a CPU build works with it too.
triton==3.7.1 ; sys_platform == "linux"
# Newer builds of torch refuse setuptools 82.
setuptools<82
"""
BUILD_SPECIFIC = re.compile(r"(nvidia|cuda|triton|pytorch-triton)\b")


def torch_requirements() -> list[str]:
    """What every build of torch needs, from the metadata of the installed one."""
    needed = [line for line in metadata.requires("torch") or [] if "extra ==" not in line]
    return [line for line in needed if not BUILD_SPECIFIC.match(line)]


def supported(line: str) -> bool:
    """Whether a line of the lock can hold on Linux or macOS; uv resolves for other platforms too."""
    marker = Requirement(line).marker
    machines = ("x86_64", "aarch64", "arm64")
    pythons = [f"3.{minor}.0" for minor in range(10, 20)]
    return marker is None or any(
        marker.evaluate({"sys_platform": system, "platform_machine": machine, "python_full_version": python})
        for system in ("linux", "darwin")
        for machine in machines
        for python in pythons
    )


def resolve(uv: list[str], upgrade: bool) -> list[str]:
    """The lines of the lock, without those of `APART`; UserError with uv's own words where there is no solution."""
    with tempfile.TemporaryDirectory() as folder:
        files = {
            "torch.txt": "\n".join(torch_requirements()),
            "limits.txt": LIMITS,
            "apart.txt": "\n".join([*APART, *OWN_ENVIRONMENT]),
            "lock.txt": LOCK.read_text(encoding="utf-8") if LOCK.is_file() else "",
        }
        paths = {name: Path(folder, name) for name in files}
        for name, text in files.items():
            paths[name].write_text(text, encoding="utf-8")
        command = [*uv, "pip", "compile", "--quiet", "--universal", "--python-version", "3.10", "--all-extras"]
        command += ["--no-header", "--no-annotate"]
        command += ["--excludes", str(paths["apart.txt"]), "--constraints", str(paths["limits.txt"])]
        command += ["--output-file", str(paths["lock.txt"]), *(["--upgrade"] if upgrade else [])]
        command += ["pyproject.toml", "scripts/lmms_eval/requirements.txt", str(paths["torch.txt"])]
        done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"uv found no versions that fit together: {done.stderr.strip()}")
        return [line for line in paths["lock.txt"].read_text(encoding="utf-8").splitlines() if supported(line)]


@exits_cleanly
def main(argv=None):
    parser = Parser(prog="scripts/lock.py", description=__doc__.split("\n")[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    args = parser.parse_args(argv)
    lines = resolve([sys.executable, "-m", "uv"], args.upgrade)
    lines += [f"{name}=={version}" for name, version in APART.items()]
    write_atomically(LOCK, HEADER + "\n".join(sorted(lines, key=str.lower)) + "\n")
    print(f"{LOCK.name}: {len(lines)} lines")


if __name__ == "__main__":
    main()
