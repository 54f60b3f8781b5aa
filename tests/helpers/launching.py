"""Launch files in processes of their own, and the configs that they compose."""

import inspect
import os
import runpy
import subprocess
import sys
from pathlib import Path

from hydra import initialize_config_dir

from minitron_mcore.cli import compose
from minitron_mcore.config import identity
from minitron_mcore.config.stages import Run
from tests.helpers import models

ROOT = Path(__file__).parents[2]


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


def config_of(stage, *overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose.compose(stage, list(overrides))


def identity_of(stage, *overrides) -> dict:
    return identity.run_identity(config_of(stage, *overrides))


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
