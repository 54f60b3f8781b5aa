"""The entry point of all stages: Hydra composes the config, and a user's mistake ends in one sentence."""

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
from typing import Any, NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig

from minitron_mcore.cli import help, sweep
from minitron_mcore.cli.compose import CONF, composition_error, normalize_overrides, resolve
from minitron_mcore.config import ranges
from minitron_mcore.config.stages import PipelineRun, ReportRun, TokenizeTextRun
from minitron_mcore.errors import Stopped, UserError, refuse
from minitron_mcore.parallel import process_tree, rendezvous, stop_signal


def entry(stage: str) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Make `fn(config)` the main function of launch/`stage`.py; `config` is its dataclass in `compose.LAUNCH_FILES`.

    On a UserError, one rank prints the message, and the process ends with the error's exit status (see `errors`). Any other
    exception on a rank of a process group is printed with its traceback, and the process ends with status 1. torchrun then ends
    the other ranks. A signal stops the stage (see `stop_signal`), which ends with STOPPED_STATUS. With `dry_run=true`,
    `dry_run.run` replaces the stage.
    """

    def decorate(fn: Callable[[Any], None]) -> Callable[[], None]:
        @hydra.main(version_base="1.3", config_path=str(CONF), config_name=f"stage/{stage}")
        @functools.wraps(fn)
        def run(raw: DictConfig) -> None:
            # Here too, as Hydra prints a line of its own for what leaves this function.
            with _exit_on_error(), stop_signal.at_once():
                if sweep.is_job():
                    return sweep.run_job(stage)
                config = resolve(raw)
                if config.dry_run and not isinstance(config, PipelineRun | ReportRun | TokenizeTextRun):
                    # The others plan themselves.
                    from minitron_mcore.cli import dry_run

                    dry_run.run(config)
                else:
                    if isinstance(config, PipelineRun) and int(os.environ.get("WORLD_SIZE", 1)) > 1:
                        raise UserError(
                            "minitron pipeline starts its stages' processes itself: run one, with processes=N."
                        )
                    refuse(ranges.problems(config))
                    fn(config)

        @functools.wraps(fn)
        def main() -> None:
            # Imports create several hundred thousand objects that are never freed: scanning them takes a sixth of the start.
            gc.set_threshold(50_000)
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it otherwise prints
            if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank of torchrun; in a shell a stage may outlive its parent
                process_tree.end_with_parent()
            _read_launcher()
            with _exit_on_error(), stop_signal.at_once():
                sys.argv[1:] = normalize_overrides(sys.argv[1:])
                if {"--help", "-h"} & {*sys.argv}:
                    with help.reader_may_end():
                        print(help.help_text(stage, [word for word in sys.argv[1:] if not word.startswith("-")]))
                    return
                sweep.run(run) if sweep.is_requested(sys.argv) else run()

        return main

    return decorate


@contextlib.contextmanager
def _exit_on_error() -> Iterator[None]:
    """End the process on an exception, as `entry` describes."""
    try:
        yield
    except (UserError, HydraException) as error:
        error = error if isinstance(error, UserError) else composition_error(error)
        _print_once(error)
        _end(error.exit_status)
    except Stopped as stopped:
        if rendezvous.is_rank_zero():
            print(stopped)
        _end(stopped.exit_status)
    except KeyboardInterrupt:
        _end(128 + signal.SIGINT)
    except Exception:
        if _store() is None:
            raise
        print(f"rank {os.environ.get('RANK', 0)} failed:\n{traceback.format_exc()}", file=sys.stderr)
        _end(1)


def _read_launcher() -> None:
    """End this process if the launcher's variables are inconsistent. Every rank prints this error: they cannot agree on one."""
    try:
        rendezvous.read_launcher()
    except UserError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()))
        sys.exit(error.exit_status)


def _store() -> Any:
    """The store of the default process group, or None. Does not import torch."""
    dist = sys.modules.get("torch.distributed")
    if not dist or not dist.is_initialized():
        return None
    from minitron_mcore.parallel.megatron_patches.groups import default_store

    return default_store()


def _print_once(error: UserError) -> None:
    """Print an error's lines unless another rank prints the same. Rank 0 prints at once, other ranks wait for it first."""
    store, lines = _store(), str(error).splitlines()
    if not rendezvous.is_rank_zero():
        lines = [f"rank {os.environ['RANK']}: {line}" for line in lines]
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun sends it when rank 0 has ended
        # Without a process group the ranks differ by the time of their imports.
        time.sleep(10 if store is None else 2)
    if store is not None:
        try:
            if store.add(f"error {hashlib.sha256(str(error).encode()).hexdigest()}", 1) > 1:
                return
        except RuntimeError:  # rank 0, which held the store, has ended
            return
    print("\n".join(f"error: {line}" for line in lines))


def _end(status: int) -> NoReturn:
    """End this process. In a process group, skip its shutdown, which could wait for ranks that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if _store() is not None:
        os._exit(status)
    sys.exit(status)
