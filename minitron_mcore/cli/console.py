"""The command `minitron STAGE`: the same as launch/STAGE.py, in one process or, with --nproc, under torchrun."""

import os
import re
import runpy
import sys

from minitron_mcore.cli import compare, status, sweep
from minitron_mcore.cli.compose import LAUNCH, LAUNCH_FILES
from minitron_mcore.cli.help import launch_docstring, reader_may_end
from minitron_mcore.errors import UserError

COMMANDS = {"status": status, "compare": compare}
"""What is no stage: modules with a `main(arguments)`."""
USAGE = """minitron STAGE [--nproc N] [SETTING=VALUE ...]

{stages}

minitron STAGE --help            settings and config groups of a stage
minitron status DIR [--json]     what the stages below a folder are doing, from their files
minitron compare DIR DIR ...     training runs side by side
minitron STAGE dry_run=true ...  sizes, memory, time and every problem, without weights or GPU
--nproc N                        N processes of this machine, by torchrun; several machines:
                                 torchrun ... -m minitron_mcore.cli.console STAGE ...
eval "$(minitron --shell-completion install=bash)"    completion of stages, settings and values"""


def main() -> None:
    """Run the stage that the command line names; without one, list the stages."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["--shell-completion"], ["-sc"]):
        return _complete(arguments[1:])
    stages = _stages()
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, stages))
        with reader_may_end():
            print(USAGE.format(stages="\n".join(f"  {name:{width}}  {line}" for name, line in stages.items())))
        return
    stage, *overrides = arguments
    if stage in COMMANDS:
        try:
            with reader_may_end():
                COMMANDS[stage].main(overrides)
        except UserError as error:
            print("\n".join(f"error: {line}" for line in str(error).splitlines()))
            sys.exit(error.exit_status)
        return
    if stage not in stages:
        sys.exit(f"error: {stage} is no stage: give one of {', '.join(stages)}.")
    processes, overrides = _processes(overrides)
    script = str(LAUNCH / f"{stage}.py")
    if processes is not None and sweep.is_requested(overrides):
        os.environ[sweep.PROCESSES], processes = processes, None
    if processes is None:
        sys.argv[1:] = overrides
        runpy.run_path(script, run_name="__main__")
    else:
        torchrun = ["-m", "minitron_mcore.cli.torchrun", "--standalone", "--nproc-per-node", processes]
        os.execv(sys.executable, [sys.executable, *torchrun, script, *overrides])


def _stages() -> dict[str, str]:
    """The first line of each launch file's docstring, stages of the pipeline first and in its order; then `COMMANDS`."""
    docstrings = {name: launch_docstring(name) for name in (*LAUNCH_FILES, "demo")}
    docstrings |= {name: module.__doc__ or "" for name, module in COMMANDS.items()}
    return {name: text.partition("\n")[0] for name, text in docstrings.items()}


def _processes(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of `--nproc N` or `--nproc=N`, and the arguments without it."""
    rest, processes = [], None
    remaining = iter(arguments)
    for argument in remaining:
        name, _, value = argument.partition("=")
        if name != "--nproc":
            rest.append(argument)
            continue
        processes = value or next(remaining, "")
        if not processes.isdecimal() or processes == "0":
            sys.exit(f"error: --nproc is {processes!r}; it must be a whole number of at least 1.")
    return processes, rest


def _complete(arguments: list[str]) -> None:
    """Print Hydra's completion script, or the completions of the command line in COMP_LINE.

    Hydra completes one application. The stage is removed from the line, and its launch file completes the rest.
    """
    command, _, line = os.environ.get("COMP_LINE", "").partition(" ")
    stage, space, line = re.sub(r"--nproc[ =]\S+ ", "", line.lstrip()).partition(" ")
    if not any("query" in argument for argument in arguments):
        stage = "convert"  # any: the script is the same
    elif not (space and stage in LAUNCH_FILES):
        return print(" ".join(_stages()) if not space else "")
    os.environ["COMP_LINE"] = f"{command} {line}"
    sys.argv[1:] = ["--shell-completion", *arguments]
    runpy.run_path(str(LAUNCH / f"{stage}.py"))["main"]()


if __name__ == "__main__":
    main()
