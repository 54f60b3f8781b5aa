"""Runs programs that a model wrote, each in a process of its own, on Linux (x86_64, aarch64).

What a program cannot do: use more processor time, wall-clock time or address space than it is given; open a socket of any kind;
start a process or thread, or signal another one; create, change, rename or remove a file. The kernel enforces this (rlimits and a
seccomp filter), whatever the program's code. What it can do: read every file that the user can read, and use a core for its
time. It sees no environment variables and no file descriptors of this process. For programs that must not read the user's files,
run the whole stage in a container without them.
"""

import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minitron_mcore.errors import UserError
from minitron_mcore.evaluation.benchmarks import sandbox_process
from minitron_mcore.parallel import hang_watchdog

_MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Sandbox:
    """Limits of each program."""

    seconds: float
    """Processor time, rounded up, and wall-clock time."""
    memory_mb: int
    """Address space."""

    def check(self) -> None:
        """Refuse machines where programs are not confined.

        Raises:
            UserError: another system than Linux on x86_64 or aarch64, or a kernel without seccomp; limits in which Python does not
                start.
        """
        machine = f"{platform.system()} on {platform.machine()}"
        if machine not in ("Linux on x86_64", "Linux on aarch64"):
            raise UserError(
                f"mbpp and humaneval run programs on Linux on x86_64 or aarch64 only, but this is {machine}: leave them out of "
                "benchmark.tasks."
            )
        if not self.run("pass") or self.run("import socket\nsocket.socket()"):
            raise UserError(
                f"programs cannot be confined here, or Python does not start within benchmark.code_seconds {self.seconds:g} and "
                f"benchmark.code_memory_mb {self.memory_mb}: raise these, or leave mbpp and humaneval out of benchmark.tasks."
            )

    def run(self, program: str) -> bool:
        """Whether a program ends without an exception, before its limits, and not by exiting early."""
        hang_watchdog.beat()
        reader, writer = os.pipe()
        limits = (math.ceil(self.seconds), self.memory_mb * _MEBIBYTE, writer)
        command = [sys.executable, "-I", "-S", "-B", sandbox_process.__file__, *map(str, limits)]
        try:
            subprocess.run(
                command,
                input=program.encode(errors="replace"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                cwd=Path(sys.executable).anchor,
                pass_fds=[writer],
                timeout=self.seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        finally:
            os.close(writer)
            ended = os.read(reader, 1)
            os.close(reader)
        return ended == b"1"

    def pass_at_1(self, references: Sequence[str], predictions: Sequence[Sequence[str]]) -> float:
        """Share of the programs of a question that pass its test; lm-eval's metric."""
        programs = predictions[0]
        return sum(self.run(f"{program}\n{references[0]}") for program in programs) / len(programs)
