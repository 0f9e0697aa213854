"""What stands in the place of `python` where a test's commands are warm: asks the server of warm_python.py for the process.

WarmPython writes a copy of this file, with a first line that starts it. The copy gives the new process everything that an
exec would: arguments, environment, working directory, open files, limits. Then it only hands signals on, and ends as the
other one ends. If the server refuses (see warm_python.Server), it becomes a plain Python instead. It imports little, so
that it starts in 20 ms. Exit code 70: there is no server.
"""

import marshal
import os
import resource
import signal
import socket
import sys

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
NO_SERVER = 70  # EX_SOFTWARE of sysexits.h


def open_files():
    """Return the file descriptors that this process was started with."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.get_inheritable(int(name)):
                found.append(int(name))
        except OSError:
            continue  # the one that the folder was listed with
    return sorted(found)


def main():
    executable, *arguments = sys.argv
    path = os.path.join(os.path.dirname(executable), "socket")
    files = open_files()
    # signal.signal knows no way to hand on "ignored", which a process passes to what it starts.
    ignored = [int(number) for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
    umask = os.umask(0)
    os.umask(umask)
    request = {
        "arguments": arguments,
        "cwd": os.getcwd(),
        "environment": dict(os.environb),
        "executable": executable,
        "files": files,
        "ignored": ignored,
        "limits": [(which, resource.getrlimit(which)) for which in LIMITS],
        "cores": sorted(os.sched_getaffinity(0)),
        "umask": umask,
    }
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        server.connect(path)
        socket.send_fds(server, [marshal.dumps(request)], files)
        reply = server.recv(16)
    except OSError as error:
        sys.exit(no_server(path, error))
    if reply == b"cold":
        server.close()
        os.execv(sys.executable, [sys.executable, *arguments])
    # Only the other process holds them now: its readers see their end when it ends.
    for number in files:
        if number != 2:
            os.close(number)
    for number in FORWARDED:
        if number not in ignored:
            signal.signal(number, lambda number, _: server.send(bytes([number])))
    if reply == b"warm":
        reply = server.recv(16)
    if not reply:
        sys.exit(no_server(path, "it ended"))
    status = int(reply)
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:  # which has no handler
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def no_server(path, why):
    os.write(2, f"error: the warm Python of {path} does not answer ({why}); its log is beside it\n".encode())
    return NO_SERVER


if __name__ == "__main__":
    main()
