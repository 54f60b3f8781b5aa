"""From a command line to a stage: Hydra composes and checks the config, mistakes end in one sentence."""

import contextlib
import functools
import gc
import hashlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig

from minitron_mcore.cli import help
from minitron_mcore.cli.compose import CONF, canonical, composition_error, resolve
from minitron_mcore.config import ranges
from minitron_mcore.config.stages import PipelineRun, ReportRun
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.parallel import rendezvous


def entry(stage: str) -> Callable[[Callable], Callable[[], None]]:
    """Make `fn(config)` the main function of launch/`stage`.py; `config` is its dataclass from `LAUNCH_FILES`.

    A UserError becomes its sentence, printed by one rank, and its exit status (see `errors`). Any other exception on a rank of a
    process group becomes its traceback. Either ends this rank's process at once; torchrun then ends the others. With `dry_run`
    the stage is planned instead (see `dryrun`).
    """

    def decorate(fn: Callable) -> Callable[[], None]:
        @hydra.main(version_base="1.3", config_path=str(CONF), config_name=f"stage/{stage}")
        @functools.wraps(fn)
        def run(raw: DictConfig) -> None:
            with _reported():  # here too, as Hydra prints a line of its own for what leaves this function
                config = resolve(raw)
                if config.dry_run and not isinstance(config, PipelineRun | ReportRun):  # these two plan themselves
                    from minitron_mcore.cli import dry_run

                    dry_run.run(config)
                else:
                    refuse(ranges.problems(config))
                    fn(config)

        @functools.wraps(fn)
        def main() -> None:
            # Imports create several hundred thousand objects that are never freed: scanning them takes a sixth of the start.
            gc.set_threshold(50_000)
            help.register()
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it otherwise prints
            _check_world()
            with _reported():
                sys.argv[1:] = canonical(sys.argv[1:])
                run()

        return main

    return decorate


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """End the process for an exception: a mistake of the user's with its sentence, any other on a rank with its traceback."""
    try:
        yield
    except (UserError, HydraException) as error:
        error = error if isinstance(error, UserError) else composition_error(error)
        _print_once(error)
        _end(error.exit_status)
    except Exception:
        if _store() is None:
            raise
        print(f"rank {os.environ.get('RANK', 0)} failed:\n{traceback.format_exc()}", file=sys.stderr)
        _end(1)


def _check_world() -> None:
    """End this process where its environment describes no world, in which it could not say so only once."""
    try:
        rendezvous.check()
    except UserError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()))
        sys.exit(error.exit_status)


def _store():
    """The store of this process's default process group; None without one. Does not import torch."""
    dist = sys.modules.get("torch.distributed")
    if not dist or not dist.is_initialized():
        return None
    from minitron_mcore.parallel.megatron_patches.groups import default_store

    return default_store()


def _print_once(error: UserError) -> None:
    """Print an error's lines unless another rank prints the same: rank 0 at once, another rank after rank 0 had time to."""
    store, lines = _store(), str(error).splitlines()
    if not rendezvous.is_rank_zero():
        lines = [f"rank {os.environ['RANK']}: {line}" for line in lines]
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun sends it when rank 0 has ended
        # Without a process group the ranks are as far apart as their imports.
        time.sleep(10 if store is None else 2)
    if store is not None:
        try:
            if store.add(f"error {hashlib.sha256(str(error).encode()).hexdigest()}", 1) > 1:
                return
        except RuntimeError:  # rank 0 had the store, and has ended
            return
    print("\n".join(f"error: {line}" for line in lines))


def _end(status: int) -> NoReturn:
    """End this process; in a process group without its shutdown, which may wait for ranks that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if _store() is not None:
        os._exit(status)
    sys.exit(status)
