"""A Python whose imports are done: one server process per test session imports torch and transformers once, and forks a
process for each command.

WarmPython.executable takes the place of `python` in a command (conftest.py: the fixtures `warm` and `cold`). The command
is a separate process with its own arguments, environment, working directory, open files, limits, signals and exit code.
What is not the same as in a cold start: torch, transformers and llava are imported already, with the state that
they have after their import and one seed of hash() for all; the process id that the caller sees is that of a client
(warm_client.py), whose SIGKILL the server repeats; the process has a session of its own, without terminal to control it.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import marshal
import os
import resource
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import NoReturn

REPOSITORY = Path(__file__).resolve().parents[2]
# These import all that takes long: torch, transformers, the model, what torchrun adds.
IMPORTED = ("llava.eval.runs.answer_shard", "torch.distributed.run")
# Read by libraries when they are loaded, and not through os.environ; PYTHON is the interpreter's own.
READ_BY_LIBRARIES = (
    b"OMP_",
    b"GOMP_",
    b"KMP_",
    b"MKL_",
    b"OPENBLAS_",
    b"ATEN_",
    b"CUDA_",
    b"LD_",
    b"MALLOC_",
    b"TRITON_",
    b"PYTHON",
)
# May differ: the new process does what the interpreter does for them; pytest changes the last for each test.
MAY_DIFFER = {b"PYTHONPATH", b"PYTHONUNBUFFERED", b"PYTEST_CURRENT_TEST"}


class WarmPython:
    """A server and a stand-in for `python`; ends with the `with` block, and with the process that made it.

    folder: gets .venv/bin with the stand-in, and a link to the repository's scripts, which thus find the stand-in.
    environment: the server's variables; a command for which those that imports read differ starts cold.
    executable: path of the stand-in.
    """

    def __init__(self, folder: Path, environment: dict[str, str]):
        place = folder / ".venv" / "bin"
        place.mkdir(parents=True)
        (folder / "scripts").symlink_to(REPOSITORY / "scripts")
        client = place / "python"
        client.write_text(f"#!{sys.executable} -IS\n" + Path(__file__).with_name("warm_client.py").read_text())
        client.chmod(0o755)
        self.executable = str(client)
        variables = {name: value for name, value in environment.items() if name.encode() not in MAY_DIFFER}
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, open(place / "log", "wb") as log:
            listener.bind(str(place / "socket"))
            listener.listen(64)  # from here on a client can wait for the server
            self.server = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno())],
                stdin=subprocess.PIPE, stdout=log, stderr=log, env=variables, pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C must not end it before what it has started
            )  # fmt: skip

    def __enter__(self) -> WarmPython:
        return self

    def __exit__(self, *exception) -> None:
        # Not by the end of its stdin alone: a process that a test has forked, such as a worker of a DataLoader, may hold it
        # open.
        self.server.stdin.close()
        self.server.terminate()
        self.server.wait()


# ------------------------------------------------------------------------------------------------------ the server
class Recorded(dict):
    """The data of os.environ, which notes the names that are read.

    A walk over all of them does not count: it copies the environment for another process.
    """

    def __init__(self, data: dict):
        super().__init__(data)
        self.names = set()
        self.walk = []  # what a walk that has begun reads next, last first

    def __iter__(self):
        self.walk = list(self.keys())[::-1]
        return super().__iter__()

    def __getitem__(self, name):
        if self.walk and self.walk[-1] == name:
            self.walk.pop()
        else:
            self.names.add(name)
        return super().__getitem__(name)

    def __contains__(self, name):
        self.names.add(name)
        return super().__contains__(name)


def import_all() -> set[bytes]:
    """Import what commands need; returns the environment variables that this has read through os.environ."""
    data = os.environ._data
    os.environ._data = recorded = Recorded(data)
    sys.path.insert(0, str(REPOSITORY))
    for name in IMPORTED:
        importlib.import_module(name)
    sys.path.remove(str(REPOSITORY))
    read = set(recorded.names)  # before the next line, which reads all
    data.update(recorded)  # some imports set variables
    os.environ._data = data
    return read


class Server:
    """Forks a process for each client. Signals of the client go to the process; a client that is gone kills it.

    A command starts cold if it has options of the interpreter but -u, another llava on its path, or other values of the
    environment variables that were read while this process imported everything.
    """

    def __init__(self, listener: socket.socket):
        self.before = dict(os.environb)
        self.read = import_all()
        threads = os.listdir("/proc/self/task")
        assert len(threads) == 1 == threading.active_count(), f"{len(threads)} threads: a fork would lose all but one"
        self.listener = listener
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ, self._accept)
        self.selector.register(0, selectors.EVENT_READ, self._end)
        self.processes: dict[int, tuple[socket.socket, int]] = {}  # process id: its client, its pidfd
        signal.signal(signal.SIGTERM, lambda *_: self._end())
        gc.collect()
        gc.freeze()  # a collection in a forked process would copy all pages that it walks over

    def run(self) -> dict:
        """Serve until the session's end; returns, in each forked process, the request of its client."""
        while True:
            for key, _ in self.selector.select():
                # An earlier event of this round may have closed it.
                if key.fd in self.selector.get_map() and (request := key.data()) is not None:
                    return request

    def _accept(self) -> dict | None:
        client, _ = self.listener.accept()
        data, files, _, _ = socket.recv_fds(client, 1 << 20, 253)
        if not data:  # it was killed before it asked
            client.close()
            return None
        request = marshal.loads(data)
        request["options"] = [word for word in request["arguments"][:1] if word == "-u"]  # torchrun gives it
        request["arguments"] = request["arguments"][len(request["options"]) :]
        if not self._fits(request):
            with suppress(ConnectionError):
                client.send(b"cold")
            client.close()
        elif pid := os.fork():
            pidfd = os.pidfd_open(pid)
            self.processes[pid] = client, pidfd
            self.selector.register(client, selectors.EVENT_READ, lambda: self._signal(pid))
            self.selector.register(pidfd, selectors.EVENT_READ, lambda: self._ended(pid))
            with suppress(ConnectionError):  # it was killed meanwhile, which `_signal` will read
                client.send(b"warm")
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self.selector.close()
            for number in (client.detach(), self.listener.detach()):
                os.close(number)
            for other, pidfd in self.processes.values():
                other.close()
                os.close(pidfd)
            return request | {"given": files}
        for number in files:
            os.close(number)
        return None

    def _fits(self, request: dict) -> bool:
        there = request["environment"]
        names = self.read | {name for name in {*there, *self.before} if name.startswith(READ_BY_LIBRARIES)}
        folders = [Path(request["cwd"], folder) for folder in path_of(request)]
        llava = next((folder for folder in folders if (folder / "llava").exists()), None)
        first = request["arguments"][:1]
        return (
            all(there.get(name) == self.before.get(name) for name in names - MAY_DIFFER)
            and llava is not None
            and llava.resolve() == REPOSITORY
            and (first in (["-m"], ["-c"]) or (first and not first[0].startswith("-")))
        )

    def _signal(self, pid: int) -> None:
        client, _ = self.processes[pid]
        try:
            number = client.recv(1)
        except ConnectionResetError:  # it was killed before it has read all
            number = b""
        if number:
            os.kill(pid, number[0])
        else:
            # At once, so that whoever killed the client never meets the process.
            os.kill(pid, signal.SIGKILL)
            self._ended(pid)

    def _ended(self, pid: int) -> None:
        client, pidfd = self.processes.pop(pid)
        _, status = os.waitpid(pid, 0)
        self.selector.unregister(client)
        self.selector.unregister(pidfd)
        os.close(pidfd)
        with suppress(BrokenPipeError, ConnectionResetError):  # the client may be gone
            client.send(str(status).encode())
        client.close()

    def _end(self) -> None:
        for pid in list(self.processes):
            os.kill(pid, signal.SIGKILL)
            self._ended(pid)
        gc.unfreeze()
        sys.exit()


# -------------------------------------------------------------------------------------------------- a new process
def path_of(request: dict) -> list[str]:
    """Return what comes before the interpreter's own folders on sys.path."""
    kind, *_ = [*request["arguments"], ""]
    first = {"-m": request["cwd"], "-c": ""}.get(kind, os.path.dirname(os.path.realpath(kind)))
    listed = os.fsdecode(request["environment"].get(b"PYTHONPATH", b""))
    return [first, *(listed.split(os.pathsep) if listed else [])]


def become(request: dict) -> None:
    """Make this process what the client was asked to start."""
    os.setsid()
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    # 1. Open files. First all out of the way of the numbers that they get.
    away = 1 + max(*request["files"], *request["given"])
    for place, given in enumerate(request["given"]):
        os.dup2(given, away + place)
        os.close(given)
    for place, number in enumerate(request["files"]):
        os.dup2(away + place, number)
        os.close(away + place)
    # 2. The process.
    os.environ.clear()
    os.environb.update(request["environment"])
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    os.sched_setaffinity(0, request["cores"])
    for which, limit in request["limits"]:
        if resource.getrlimit(which) != limit:
            resource.setrlimit(which, limit)
    # 3. The interpreter.
    open_standard_streams(bool(request["options"] or os.environ.get("PYTHONUNBUFFERED")))
    sys.path[:0] = [folder if place == 0 else os.path.abspath(folder) for place, folder in enumerate(path_of(request))]
    sys.path_importer_cache.clear()
    sys.executable = request["executable"]
    sys.orig_argv = [sys.executable, *request["options"], *request["arguments"]]
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # random and torch have seeds of their own, or always the same one


def open_standard_streams(unbuffered: bool) -> None:
    """sys.stdin, stdout and stderr as the interpreter makes them, in the encoding of this process."""
    for number, name, mode in ((0, "stdin", "rb"), (1, "stdout", "wb"), (2, "stderr", "wb")):
        old = getattr(sys, name)
        raw = io.FileIO(number, mode, closefd=False)
        raw.name = f"<{name}>"
        binary = io.BufferedReader(raw) if number == 0 else raw if unbuffered else io.BufferedWriter(raw)
        lines = number == 2 or raw.isatty()
        new = io.TextIOWrapper(
            binary, old.encoding, old.errors, line_buffering=lines, write_through=unbuffered and number != 0
        )
        new.mode = "r" if number == 0 else "w"
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


def run(arguments: list[str]) -> None:
    """Run -m module, -c code or a file as __main__."""
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__builtins__ = __builtins__
    kind, *rest = arguments
    if kind == "-m":
        sys.argv = rest
        sys.modules.pop(rest[0], None)  # else runpy would warn that it was imported before
        runpy._run_module_as_main(rest[0])  # what the interpreter calls for -m
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.argv = arguments
        main.__file__ = kind
        exec(compile(Path(kind).read_bytes(), kind, "exec"), vars(main))


def run_to_the_end(arguments: list[str]) -> NoReturn:
    """Run a command and end as the interpreter does, but for taking all modules apart: that takes 1.5 s after a fork."""
    code, interrupted = 0, False
    try:
        run(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if code == 1 and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        error.__traceback__ = error.__traceback__.tb_next.tb_next  # without the two frames of this file
        sys.excepthook(type(error), error, error.__traceback__)
        code, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        code = 120  # the interpreter's code for output that is lost
        print(f"Exception ignored in: {sys.stdout!r}\n{type(error).__name__}: {error}", file=sys.stderr)
    sys.stderr.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    sys.path.pop(0)
    asked = Server(socket.socket(fileno=int(sys.argv[1]))).run()
    become(asked)
    run_to_the_end(asked["arguments"])
