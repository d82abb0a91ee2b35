"""Programs in forks of one process that has imported what they need: without that, imports are most
of the processor time of a short program."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

SERVER = """
import importlib, json, os, signal, sys, traceback

def child(code, environment):
    status = 1
    try:
        os.environ.update(environment)
        exec(code, {"__name__": "__main__"})
        status = 0
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

for module in sys.argv[1:]:
    importlib.import_module(module)
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    code, environments = json.loads(line)
    read, write = os.pipe()
    children = []
    for environment in environments:
        children.append(os.fork())
        if not children[-1]:
            os.dup2(write, 1)
            os.dup2(write, 2)
            os.close(read)
            os.close(write)
            child(code, environment)
    os.close(write)
    with open(read, errors="replace") as pipe:
        output = pipe.read()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    print(json.dumps([codes, output]), file=answers, flush=True)
"""


class Forks:
    """A process that waits for programs, and forks to run them.

    It has one thread, whatever the machine, as a process with more cannot fork.

    Args:
        modules: that it imports.
    """

    def __init__(self, *modules: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def __enter__(self) -> "Forks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def run(
        self, code: str, environments: Sequence[dict[str, str]] = ({},), seconds: float = 240
    ) -> tuple[list[int], str]:
        """Runs a program in a fork for each of the environments, all at once.

        Args:
            code: of the program, in Python.
            environments: variables that are added to those of this process.
            seconds: after which the forks are killed.

        Returns:
            their exit codes, and what all of them printed.

        Raises:
            TimeoutError: after so many seconds.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps([code, list(environments)]) + "\n")
        stdin.flush()
        if not select.select([stdout], [], [], seconds)[0]:
            self.__exit__(None, None, None)
            raise TimeoutError(f"no end after {seconds} s: {code}")
        answer: list[Any] = json.loads(stdout.readline())
        return answer[0], answer[1]

    def program(
        self,
        program: Path,
        arguments: Sequence[object] = (),
        environments: Sequence[dict[str, str]] = ({},),
        seconds: float = 240,
    ) -> tuple[int, str]:
        """Runs a file as `python FILE ARGUMENTS` does.

        Args:
            program: the file.
            arguments: of the program.
            environments: see `run`.
            seconds: see `run`.

        Returns:
            the highest of the exit codes, and what all processes printed.
        """
        words = [str(program), *map(str, arguments)]
        code = f"import runpy, sys; sys.argv[:] = {words!r}"
        code += f"; sys.path.insert(0, {str(program.parent)!r})"
        code += "; runpy.run_path(sys.argv[0], run_name='__main__')"
        codes, output = self.run(code, environments, seconds)
        return max(map(abs, codes)), output

    def together(
        self, program: Path, arguments: Sequence[object], seconds: float = 240
    ) -> tuple[int, str]:
        """Runs a program in two processes that find each other as those of torchrun do.

        Args:
            program: a file.
            arguments: of the program.
            seconds: see `run`.

        Returns:
            the higher of their exit codes, and what both printed.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        return self.program(program, arguments, ranks, seconds)
