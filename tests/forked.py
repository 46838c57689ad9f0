"""`python()`: an interpreter for subprocesses that has imported torch and this project when it starts.

Half of the time of a small command is its imports, and torchrun starts three processes of them. Here one process has
imported all and forks. A client of a few milliseconds stands for the command: it has its command line, its output, its
signals and its exit status, and takes it along when it is killed. Where this cannot be it is the plain interpreter.
What it does not show: that a command imports all it needs, how an interpreter starts, another order of sets (all have
the server's hash seed) and another OMP_NUM_THREADS than 1, which is read as torch is loaded.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

CAN_FORK = sys.platform == "linux" and hasattr(os, "pidfd_open")
COMMANDS = ("train", "evaluate", "predict")
_server: list[str] = []  # its socket


def python() -> list[str]:
    """What takes sys.executable's place: `[*python(), "-m", "deeplab_fast.train", ...]`."""
    if not CAN_FORK:
        return [sys.executable]
    if not _server:
        _server.append(_start())
    # -I -S: nothing of site-packages, which the client does not need.
    return [sys.executable, "-I", "-S", __file__, "client", _server[0]]


def _start() -> str:
    """The address of a server that ends with this process, however that ends."""
    import atexit
    import shutil
    import subprocess
    import tempfile

    folder = tempfile.mkdtemp(prefix="forked")  # short: a socket's path has 108 characters at most
    address = f"{folder}/socket"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, __file__, "server", address, str(os.getpid())]
    server = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment, start_new_session=True
    )

    @atexit.register
    def stop() -> None:
        server.kill()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)

    if server.stdout.readline() != b"ready\n":
        raise RuntimeError(f"the server of forked commands ended with {server.wait()}; its error stands above")

    return address


def serve(address: str, tests: int) -> None:
    """Until the process with the id `tests` ends: its own end, not a pipe's, which others may hold open."""
    import importlib
    import select

    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path[0] = root  # instead of this file's folder
    for name in ("torch.distributed.run", "torch.utils.tensorboard", *(f"deeplab_fast.{name}" for name in COMMANDS)):
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    ended = os.pidfd_open(tests)
    os.write(1, b"ready\n")
    keepers = []
    while ended not in select.select([ended, listener], [], [])[0]:
        connection, _ = listener.accept()
        if (keeper := os.fork()) == 0:
            listener.close()
            os.close(ended)
            return keep(connection)
        connection.close()
        keepers = [pid for pid in (*keepers, keeper) if os.waitpid(pid, os.WNOHANG)[0] == 0]


def keep(connection: socket.socket) -> None:
    """Forks what the client asks for, and tells it how that ended. Returns in the forked process alone, at its end."""
    import json
    import select

    data, (out, err), _, _ = socket.recv_fds(connection, 1 << 20, 2)
    while not data.endswith(b"\n"):
        more = connection.recv(1 << 20)
        if not more:  # the client was killed
            os._exit(1)
        data += more
    pid = os.fork()
    if pid == 0:
        connection.close()
        return become(json.loads(data), out, err)
    os.close(out)
    os.close(err)
    ended = os.pidfd_open(pid)
    try:
        connection.sendall(f"{pid}\n".encode())
        if ended not in select.select([ended, connection], [], [])[0]:
            raise ConnectionResetError
        connection.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
    except OSError:  # the client was killed
        signal.pidfd_send_signal(ended, signal.SIGKILL)
    finally:
        os._exit(0)


def become(command: dict, out: int, err: int) -> None:
    """`python argv...` in the client's folder and environment."""
    import importlib
    import random
    import runpy

    import numpy

    os.setsid()
    for given, usual in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
        os.dup2(given, usual)
        os.close(given)
    os.environ.clear()
    os.environ.update(command["environment"])
    os.chdir(command["folder"])
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    importlib.invalidate_caches()
    random.seed()  # else all that are forked draw the same
    numpy.random.seed()
    first, *rest = command["argv"]
    if first == "-m":
        module, *rest = rest
        sys.argv = [module, *rest]
        sys.path.insert(0, os.getcwd())
        sys.modules.pop(module, None)  # runpy warns of what is imported already
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, os.path.dirname(os.path.abspath(first)))
        runpy.run_path(first, run_name="__main__")


def be_client(address: str, *argv: str) -> None:
    import json

    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    command = {"argv": argv, "environment": dict(os.environ), "folder": os.getcwd()}
    socket.send_fds(connection, [json.dumps(command).encode() + b"\n"], [1, 2])
    answers = connection.makefile()
    pid = int(answers.readline())
    os.close(1)  # the output ends with the command
    os.close(2)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    status = int(answers.readline() or 1)
    if status < 0:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "server":
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        be_client(*sys.argv[2:])
