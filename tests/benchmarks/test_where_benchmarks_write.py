"""Unless told, a benchmark writes where git ignores it: a try leaves the committed figures as they are."""

import importlib
import subprocess

import pytest
import record

from llava.common.files import REPOSITORY

NAMES = (
    "adav_cover_strength",
    "adav_zoom_crops",
    "busy_machine",
    "cache_policies",
    "decode_kernel",
    "end_to_end",
    "eval_throughput",
    "gpu_profile",
    "long_answers",
    "prefill",
    "serving",
)


def test_the_folder_is_ignored():
    path = record.RESULTS.relative_to(REPOSITORY) / "some.csv"
    assert subprocess.run(["git", "check-ignore", "--quiet", path], cwd=REPOSITORY).returncode == 0


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_default(name):
    module = importlib.import_module(name)
    assert record.RESULTS == module.RESULTS


def test_the_plot_lies_beside_the_table(tmp_path):
    import end_to_end

    args, _ = end_to_end.arguments(["--preset", "tiny", "--device", "cpu"])
    assert args.output.parent == args.plot.parent == record.RESULTS
    args, _ = end_to_end.arguments(["--preset", "tiny", "--device", "cpu", "--output", str(tmp_path / "e.csv")])
    assert args.plot == tmp_path / "e.png"
