"""The warm Python of the tests (tests/support/warm_python.py) starts what a cold Python starts, but faster."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from eval_data import REPOSITORY, environment

WARM = "import sys; print('torch' in sys.modules)"


@pytest.fixture
def both(warm_python):
    """Runs the same arguments in both; returns the warm (exit code, stdout, stderr) after a comparison with the cold."""

    def run(*arguments, **options):
        variables = {name: value for name, value in environment().items() if name != "PYTHONUNBUFFERED"}
        options = {"env": variables, "capture_output": True, "text": True, "timeout": 120, **options}
        cold, warm = (
            subprocess.run([python, *map(str, arguments)], **options)
            for python in (sys.executable, warm_python.executable)
        )
        assert cold.returncode == warm.returncode, warm.stderr
        assert cold.stdout.replace(sys.executable, warm_python.executable) == warm.stdout
        assert cold.stderr.replace(sys.executable, warm_python.executable) == warm.stderr
        return warm.returncode, warm.stdout, warm.stderr

    return run


def ask(warm_python, code=WARM, **options) -> str:
    options = {"env": environment(), "check": True, "capture_output": True, "text": True, "timeout": 120, **options}
    return subprocess.run([warm_python.executable, "-c", code], **options).stdout.strip()


@pytest.mark.parametrize(
    "code, ends",
    [
        ("pass", 0),
        ("import sys; sys.exit()", 0),
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit(-1)", 255),
        ("import sys; sys.exit('no such file')", 1),
        ("raise SystemExit(('a', 1))", 1),
        ("1 / 0", 1),
        ("import os; os._exit(7)", 7),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import os; print('lost', flush=False); os.close(1)", 120),
        ("import atexit; atexit.register(print, 'last'); print('first')", 0),
        ("import threading; threading.Timer(0.2, print, ['late']).start()", 0),
    ],
)
def test_ends_as_python_does(both, code, ends):
    assert both("-c", code)[0] == ends


def test_is_started_as_python_is(both, tmp_path):
    """Arguments, path, folder, environment, input, open files, limits."""
    shown = "import os, sys; print(sys.argv, sys.path, sys.executable, __name__, os.getcwd(), sorted(os.environ.items()), sys.orig_argv);"
    assert "'a b', ''" in both("-c", shown, "a b", "", cwd=tmp_path)[1]
    script = tmp_path / "script.py"
    script.write_text(shown + "print(__file__)")
    both(script, "-x")
    (tmp_path / "module.py").write_text(shown + "print(__file__, __spec__.name)")
    path = os.pathsep.join([str(REPOSITORY), str(tmp_path)])
    assert "module" in both("-m", "module", "--flag", env={**environment(), "PYTHONPATH": path})[1]
    both("-m", "llava.nowhere")
    assert both("-c", "import sys; print(sys.stdin.read().upper()); print(1, file=sys.stderr)", input="in") == (
        0,
        "IN\n",
        "1\n",
    )
    reading, writing = os.pipe()
    limits = "import os, resource, sys; print(resource.getrlimit(resource.RLIMIT_FSIZE), os.umask(0), os.read({}, 1))"
    for _ in range(2):
        os.write(writing, b"x")
    found = both(
        "-c",
        limits.format(reading),
        pass_fds=[reading],
        umask=0o27,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 8192)),
    )
    assert found[1] == "(4096, 8192) 23 b'x'\n"
    os.close(reading)
    os.close(writing)


def test_only_what_the_server_imported_in_the_same_surroundings_is_warm(warm_python, tmp_path):
    assert ask(warm_python) == "True"
    assert ask(warm_python, env={**environment(), "SOME_VARIABLE": "1"}) == "True"
    code = f"import subprocess; subprocess.run([{warm_python.executable!r}, '-c', {WARM!r}], check=True)"
    assert ask(warm_python, code) == "True", "also what a warm process starts"
    launcher = subprocess.run(
        ["bash", "-c", 'exec "$0" -c "$1"', warm_python.executable, WARM], env=environment(), capture_output=True
    )
    assert launcher.stdout == b"True\n", "and what a script starts"
    assert ask(warm_python, env={**environment(), "HF_HUB_OFFLINE": "1"}) == "False"
    assert ask(warm_python, env={**environment(), "OMP_NUM_THREADS": "2"}) == "False"
    (tmp_path / "llava").mkdir()
    assert ask(warm_python, cwd=tmp_path) == "False", "another llava comes first"
    command = [warm_python.executable, "-X", "utf8", "-c", WARM]
    assert subprocess.run(command, env=environment(), capture_output=True).stdout == b"False\n"


@pytest.mark.parametrize("options, value", [([], "1"), (["-u"], "")])
def test_unbuffered_output_comes_at_once(warm_python, options, value):
    code = "import sys; assert 'torch' in sys.modules; sys.stdout.write('half'); sys.stdin.read()"
    variables = {**environment(), "PYTHONUNBUFFERED": value}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([warm_python.executable, *options, "-c", code], env=variables, **pipes) as process:
        assert process.stdout.read(4) == b"half"
        process.stdin.close()
    assert process.returncode == 0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


SLEEPS = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_signals_reach_the_process(warm_python, number):
    command = [warm_python.executable, "-c", SLEEPS]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        pid = int(process.stdout.readline())
        assert pid != process.pid and alive(pid)
        process.send_signal(number)
        process.wait(30)
        assert process.returncode == -number
    wait_for(lambda: not alive(pid))


def test_an_ignored_signal_stays_ignored(warm_python):
    code = "import signal; print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)"
    assert ask(warm_python, code, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) == "True"


OWNER = """
import sys, time
from pathlib import Path
from eval_data import environment
from warm_python import WarmPython
print(WarmPython(Path(sys.argv[1]), environment()).server.pid, flush=True)
time.sleep(60)
"""


def test_nothing_outlives_a_killed_session(tmp_path):
    """The server and its processes end; without a server a command fails and says why."""
    variables = {**environment(), "PYTHONPATH": str(REPOSITORY / "tests" / "support")}
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE) as owner:
        server = int(owner.stdout.readline())
        python = tmp_path / ".venv" / "bin" / "python"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen([python, "-c", SLEEPS], env=environment(), **pipes) as process:
            pid = int(process.stdout.readline())
            owner.kill()
            assert process.wait(30) == -signal.SIGKILL
        wait_for(lambda: not alive(pid) and not alive(server))
    failed = subprocess.run([python, "-c", "pass"], env=environment(), capture_output=True, text=True)
    assert failed.returncode == 70 and failed.stderr.startswith("error: the warm Python of ")
    assert not (tmp_path / ".venv" / "bin" / "log").read_text()
