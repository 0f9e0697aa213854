"""One run over several ranks, as torchrun starts them: four of gloo, one killed; shares of devices; bad surroundings."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from eval_data import REPOSITORY, environment, launch, make_vqav2, scripts
from tiny_checkpoints import build_reference, save_clip_tower, save_original

from llava.common.errors import UserError
from llava.eval.runs.locks import hold_for_rank
from llava.eval.runs.machines import Ranks
from llava.eval.runs.worker_processes import RANK_VARIABLES

pytestmark = pytest.mark.usefixtures("warm")
QUESTIONS = 72


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    model = build_reference("llava")
    checkpoint = save_original(model, folder / "tiny-v1.5", save_clip_tower(model, folder / "tower"))
    data = make_vqav2(folder / "data", QUESTIONS, images=12)
    flags = {"checkpoint": checkpoint, "data-root": data, "batch-size": 2, "max-new-tokens": 32}
    return ["vqav2", "5", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]


def torchrun(ranks: int, *arguments) -> subprocess.Popen:
    """scripts/cluster/torchrun.sh on one machine, whose ranks are processes of one process group."""
    command = ["bash", str(scripts() / "cluster" / "torchrun.sh"), *map(str, arguments)]
    variables = {**environment(), "RANKS_PER_NODE": str(ranks), "MASTER_PORT": str(free_port())}
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launchers(output: Path) -> dict[int, int]:
    """Rank -> process id of the launchers that torchrun started with this --output."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
            variables = dict(pair.split("=", 1) for pair in (folder / "environ").read_text().split("\0") if "=" in pair)
        except (OSError, IndexError):
            continue  # it ended while we looked
        if str(output) in words and "RANK" in variables:
            found[int(variables["RANK"])] = int(folder.name)
    return found


def answered(output: Path) -> dict[int, int]:
    """Shard -> lines of its answers."""
    files = {int(path.stem.removeprefix("shard-")): path for path in output.rglob("shard-*.jsonl")}
    return {shard: path.read_bytes().count(b"\n") for shard, path in files.items()}


def only(output: Path, name: str) -> Path:
    (found,) = output.rglob(name)
    return found


def test_four_ranks_one_killed(arguments, tmp_path):
    """The answers of a rerun are those of one process, byte for byte, and the killed start's are not asked again.

    The rerun has two ranks: their number may change between starts.
    """
    alone = launch(*arguments, "--output", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr

    output = tmp_path / "four"
    agent = torchrun(4, *arguments, "--output", output)
    deadline = time.monotonic() + 300
    while sum(answered(output).values()) < 8:
        assert agent.poll() is None and time.monotonic() < deadline, agent.communicate()[1]
        time.sleep(0.01)
    pids = launchers(output)
    assert sorted(pids) == [0, 1, 2, 3]
    os.kill(pids[2], signal.SIGKILL)
    _, said = agent.communicate(timeout=300)
    assert agent.returncode == 1, said
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values()), "a rank was left behind"
    kept = answered(output)
    assert 8 <= sum(kept.values()) < QUESTIONS and not list(output.rglob("merge.jsonl"))

    again = torchrun(2, *arguments, "--output", output)
    printed, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert f"{QUESTIONS - sum(kept.values())} questions answered" in printed and printed.count("vqav2 (") == 1
    assert only(output, "merge.jsonl").read_bytes() == only(tmp_path / "alone", "merge.jsonl").read_bytes()
    assert sum(answered(output).values()) == QUESTIONS
    report = json.loads(only(output, "run.json").read_text())
    assert [rank["shards"] for rank in report["sessions"][-1]["ranks"]] == [1, 1]
    assert report["score"] == json.loads(only(tmp_path / "alone", "run.json").read_text())["score"] | {
        "upload": report["score"]["upload"]
    }


def test_bad_input_is_told_once_and_ends_every_rank(arguments, tmp_path, cold):
    agent = torchrun(2, *arguments, "--output", tmp_path, "--method", "best")
    _, said = agent.communicate(timeout=120)
    assert agent.returncode == 2
    assert said.count("error: ") == 1 and '"method" is "best"' in said
    assert "Traceback" not in said and "OMP_NUM_THREADS" not in said


def test_a_rank_that_is_left_behind_keeps_others_out(arguments, tmp_path):
    """Its machine may have lost the others; what it still answers must not be answered again."""
    first = launch(*arguments, "--output", tmp_path, "--limit", "2")
    assert first.returncode == 0, first.stderr
    lock = hold_for_rank(only(tmp_path, "run.json").parent, 3)
    try:
        refused = launch(*arguments, "--output", tmp_path, "--limit", "2")
    finally:
        os.close(lock)
    assert refused.returncode == 2 and "another process is at work on this very run" in refused.stderr


# ------------------------------------------------------------------------------------------------ surroundings
def surroundings(monkeypatch, **values):
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


WHOLE = {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "a", "MASTER_PORT": 1}


def test_ranks_of_the_environment(monkeypatch):
    surroundings(monkeypatch)
    assert Ranks.of_environment() is None
    surroundings(monkeypatch, **{**WHOLE, "WORLD_SIZE": 1, "RANK": 0})
    assert Ranks.of_environment() is None
    surroundings(monkeypatch, **WHOLE)
    assert Ranks.of_environment() == Ranks(3, 4, 1, 2)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"MASTER_PORT": None}, "WORLD_SIZE is 4, but MASTER_PORT is not set"),
        ({"LOCAL_WORLD_SIZE": None}, "WORLD_SIZE is 4, but LOCAL_WORLD_SIZE is not set"),
        ({"RANK": "x"}, 'RANK is "x", allowed is a whole number'),
        ({"RANK": 4}, "RANK 4 of 4"),
    ],
)
def test_bad_surroundings(monkeypatch, change, said):
    values = {name: value for name, value in {**WHOLE, **change}.items() if value is not None}
    surroundings(monkeypatch, **values)
    with pytest.raises(UserError, match=said):
        Ranks.of_environment()


@pytest.mark.parametrize(
    "local, devices, share",
    [
        ((0, 1), ["0", "1"], ["0", "1"]),
        ((1, 2), ["0", "1", "2", "3"], ["1", "3"]),
        ((1, 2), ["0,1", "2,3"], ["2,3"]),  # GPUS_PER_MODEL=2: the 34B model over two GPUs
        ((1, 2), [], []),
    ],
)
def test_ranks_of_one_machine_share_its_devices(local, devices, share):
    assert Ranks(local[0], 4, *local).share(devices) == share


def test_more_ranks_than_devices():
    with pytest.raises(UserError, match="2 ranks share a machine that has devices for 1"):
        Ranks(1, 2, 1, 2).share(["0"])


def test_slurm_starts_one_rank_per_node(tmp_path):
    """With stand-ins for Slurm's two commands: srun starts every task with its number."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho node7\necho node8\n")
    (tmp_path / "srun").write_text(
        '#!/bin/bash\nwhile [[ $1 == --* ]]; do echo "$1"; shift; done\n'
        'for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=0 "$@"; done\n'
    )
    show = tmp_path / "python"
    show.write_text(
        '#!/bin/sh\necho "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT" "$@"\n'
    )
    for name in ("scontrol", "srun", "python"):
        (tmp_path / name).chmod(0o755)
    checkout = tmp_path / "checkout"
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to(show)
    (checkout / "scripts").symlink_to(REPOSITORY / "scripts")
    slurm = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(checkout),
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "20123",
        "SLURM_NTASKS": "2",
    }
    script = str(REPOSITORY / "scripts" / "cluster" / "slurm.sh")
    done = subprocess.run(["bash", script, "vqav2", "144"], env=slurm, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "--kill-on-bad-exit=1",
        "--ntasks-per-node=1",
        "0 2 0 1 node7 20123 -m llava.eval.launch vqav2 144",
        "1 2 0 1 node7 20123 -m llava.eval.launch vqav2 144",
    ]
    elsewhere = subprocess.run(["bash", script], env={**slurm, "SLURM_SUBMIT_DIR": str(tmp_path)}, capture_output=True)
    assert elsewhere.returncode == 2 and b"error: submit from the checkout" in elsewhere.stderr
