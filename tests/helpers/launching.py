"""Launch files in processes of their own, and the configs that they compose."""

import gc
import inspect
import itertools
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from minitron_mcore import testing
from minitron_mcore.cli import compose, stage_process
from minitron_mcore.config import identity
from minitron_mcore.config.stages import Run
from minitron_mcore.parallel import stop_signal
from tests.helpers import models

ROOT = Path(__file__).parents[2]
SHUTDOWN_SECONDS = 30
"""From the SIGTERM to ranks of which another has failed to their SIGKILL: torchrun's default."""


def launch(cwd, stage, *overrides, processes=1, fails=False) -> str:
    """Run a launch file under torchrun in an empty folder; its whole output."""
    return torchrun(cwd, ROOT / "launch" / f"{stage}.py", *overrides, processes=processes, fails=fails)


def torchrun(cwd, script, *overrides, processes=1, fails=False) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(script), *overrides]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, output
    return output


def fork(cwd, stage, *overrides, processes=1, fails=False, stop_at=None) -> str:
    """`launch` on processes that are forked from one with torch imported: without torchrun and without the seconds of imports.
    The stages of a pipeline and the jobs of a sweep are forked too.

    Args:
        fails: whether the status is not 0; or the status.
        stop_at: (n, signal): the last rank sends itself this signal at its n-th stop point.
    """
    with tempfile.NamedTemporaryFile("r") as output:
        main = testing._processes().Process(
            target=_in_fork, args=(cwd, output.name, stage, overrides, processes, stop_at)
        )
        main.start()
        main.join(300)
        text = output.read()
    assert main.exitcode is not None and (main.exitcode == fails or (main.exitcode != 0) is fails), text
    return text


def _in_fork(cwd, output: str, stage: str, overrides, processes: int, stop_at) -> None:
    def run(command: list[str], env: dict) -> int:
        script = next(n for n, word in enumerate(command) if word.endswith(".py"))
        processes = int(command[script - 1]) if script > 1 else 1  # after torchrun's --nproc-per-node
        return _status(Path(command[script]).stem, command[script + 1 :], processes)

    gc.freeze()
    os.chdir(cwd)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    stage_process.process_tree = SimpleNamespace(run_child=run)
    if stop_at:
        _stop_last_rank_at(*stop_at)
    sys.exit(_status(stage, overrides, processes))


def _status(stage: str, overrides, processes: int) -> int:
    """Exit status of a stage on forked ranks: that of the first rank that failed. The others are ended as torchrun does."""
    with socket.create_server(("localhost", 0)) as free:
        world = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    ranks, failed = set(), 0
    for rank in range(processes):
        ranks.add(child := os.fork())
        if child == 0:
            os.environ |= world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            sys.argv = [str(ROOT / "launch" / f"{stage}.py"), *overrides]
            _run_script(sys.argv[0])
    while ranks:
        child, status = os.wait()
        ranks.remove(child)
        if status and not failed:
            failed = os.waitstatus_to_exitcode(status)
            for other in ranks:
                os.kill(other, signal.SIGTERM)
            signal.signal(signal.SIGALRM, lambda *_: [os.kill(other, signal.SIGKILL) for other in ranks])
            signal.alarm(SHUTDOWN_SECONDS)
    signal.alarm(0)
    return failed


def _stop_last_rank_at(point: int, number: signal.Signals) -> None:
    usual, points = stop_signal.requested_on_any_rank, itertools.count(1)

    def requested() -> bool:
        if int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1 and next(points) == point:
            os.kill(os.getpid(), number)
        return usual()

    stop_signal.requested_on_any_rank = requested


def _run_script(path: str) -> NoReturn:
    status = 1
    try:
        GlobalHydra.instance().clear()  # a pipeline's own, in the ranks of its stages
        runpy.run_path(path, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def config_of(stage, *overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose.compose(stage, list(overrides))


def identity_of(stage, *overrides) -> dict:
    return identity.resolved(config_of(stage, *overrides))


def plan(*overrides) -> None:
    """launch/plan.py in this process: it needs no other."""
    inspect.unwrap(runpy.run_path(str(ROOT / "launch" / "plan.py"))["main"])(config_of("plan", *overrides))


def word_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    vocab = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, models.SIZES["vocab_size"])}
    tokenizer = Tokenizer(kinds.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)


def composed(stage, *overrides) -> Run:
    with initialize_config_dir(str(compose.CONF), version_base="1.3"):
        return compose.compose(stage, list(overrides))


def words(count: int, seed: int) -> str:
    drawn = torch.randint(2, models.SIZES["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in drawn.tolist())
