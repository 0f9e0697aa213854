"""constraints.txt is a lock: every requirement has its line, for each Python and platform, and no line is for one machine."""

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings there

ROOT = Path(__file__).resolve().parents[1]
MACHINES = [
    {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.2", "sys_platform": system, "platform_machine": kind}
    for minor in (10, 11, 12, 13)
    for system, kind in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
]


def lines(name: str) -> list[Requirement]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]


def test_no_line_is_for_one_machine():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not re.search(r"--|://|@|\+", re.sub(r"(?m)^#.*$", "", text)), "hashes, hosts and local versions"
    names = {canonicalize_name(line.name) for line in lines("constraints.txt")}
    assert not [name for name in names if name.startswith(("nvidia", "cuda", "pytorch-triton"))]
    for line in lines("constraints.txt"):
        (pin,) = line.specifier
        assert pin.operator == "==" and not pin.version.endswith("*"), line


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: f"{m['python_version']}-{m['sys_platform']}-{m['platform_machine']}")
def test_each_requirement_has_one_version_that_fits(machine):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [Requirement(text) for text in project["dependencies"]]
    extras = project["optional-dependencies"]
    extras.pop("vllm")  # in an environment of its own
    wanted += [Requirement(text) for extra in extras.values() for text in extra]
    wanted += lines("scripts/lmms_eval/requirements.txt")
    pins = {}
    for line in lines("constraints.txt"):
        if line.marker is None or line.marker.evaluate(machine):
            name = canonicalize_name(line.name)
            assert name not in pins, f"{name} has two versions"
            pins[name] = next(iter(line.specifier)).version
    for need in wanted:
        if need.marker is None or need.marker.evaluate(machine):
            assert need.specifier.contains(pins[canonicalize_name(need.name)]), need
    # What lmms_eval 0.7.3 imports (filelock._api), and the versions that a CUDA build of torch demands.
    assert int(pins["filelock"].split(".")[0]) < 4 and pins["lmms-eval"] == "0.7.3"
    assert machine["sys_platform"] != "linux" or (pins["torch"], pins["triton"]) == ("2.13.0", "3.7.1")
