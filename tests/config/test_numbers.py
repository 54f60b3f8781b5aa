"""Settings out of range, numbers with two meanings, half a launcher: a failure means a silent wrong run or a traceback."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from minitron_mcore.cli import dry_run
from minitron_mcore.config import ranges
from minitron_mcore.config.search import SearchConfig
from minitron_mcore.config.settings import (
    DistillConfig,
    EvaluateConfig,
    ImportanceConfig,
    ParallelConfig,
    PruneConfig,
)
from minitron_mcore.config.stages import TeacherCacheRun
from minitron_mcore.depth import study
from minitron_mcore.distill import checks
from minitron_mcore.distill.losses import FactoredLogits, LossConfig, distillation_loss
from minitron_mcore.errors import UserError
from minitron_mcore.importance import checks as importance
from minitron_mcore.importance.scores import load_scores, save_scores
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import process_groups, rendezvous
from minitron_mcore.pruning.plan import load_plan, make_plan
from minitron_mcore.pruning.target import as_count, target_architecture
from minitron_mcore.search.space import Space
from tests.helpers.cutting import random_scores
from tests.helpers.launching import config_of

ROOT = Path(__file__).parents[2]
ONE = ParallelConfig()
ARCH = Architecture("llama", 4, 32, 24, 8, 4, 8, 101, 64, 1e-5, 1e4, None, tied=False)
TRAINING = DistillConfig(steps=9, global_batch=2, sequence_length=16, warmup_steps=1)


def planned(stage, *overrides) -> str:
    return "\n".join(dry_run.plan(config_of(stage, "+model=llama31_8b", "dry.device=cpu", *overrides))["problems"])


def test_one_is_a_size_and_one_point_nought_is_all():
    for axis, total in (("hidden", 32), ("ffn", 24), ("blocks", 4)):
        assert getattr(target_architecture(ARCH, PruneConfig(**{axis: 1.0})), axis) == total
        assert getattr(target_architecture(ARCH, PruneConfig(**{axis: 1})), axis) == 1
    space = Space(ARCH, SearchConfig(ffn=[0.5, 0.75, 1.0], hidden={"start": 0.5, "stop": 1.0, "step": 0.25}), ONE)
    assert space.axes == {"ffn": [12, 18, 24], "hidden": [16, 24, 32]}
    assert Space(ARCH, SearchConfig(ffn=[1, 12]), ONE).axes == {"ffn": [1, 12]}
    assert config_of("plan", "+model=llama31_8b", "prune.hidden=24", "prune.ffn=1.0").prune == PruneConfig(24, 1.0)
    assert type(config_of("plan", "+model=llama31_8b", "prune.hidden=24").prune.hidden) is int


@pytest.mark.parametrize("value", [24.0, 1.5, 0.0, -0.5, float("nan"), float("inf"), "24", True, None, [1], 1e-9])
def test_what_is_neither_a_size_nor_a_share_is_refused(value):
    with pytest.raises(UserError, match=r"^prune\.ffn is "):
        as_count(value, 32, "prune.ffn is")
    for axis in ("ffn", "hidden", "heads", "groups", "blocks"):
        with pytest.raises(UserError, match=rf"search\.{axis} has"):
            Space(ARCH, SearchConfig(**{axis: [value]}), ONE)
    assert list(study.problems(config_of("depth", "+model=llama31_8b", "depth.sizes=[2.0]"), 32))


@pytest.mark.parametrize(
    "given",
    [
        {"start": 0.5, "stop": 1, "step": 0.25},
        {"start": 8, "stop": 16.0, "step": 4},
        {"start": 8, "stop": 16, "step": 0},
        {"start": 8, "stop": 4, "step": 1},
        {"start": "a", "stop": 4, "step": 1},
        {"start": 1, "stop": 10**12, "step": 1},
        {"start": 1.0, "stop": float("inf"), "step": 0.5},
    ],
)
def test_ranges_of_two_kinds_or_without_end_are_refused(given):
    with pytest.raises(UserError, match=r"^search\.ffn is .*give"):
        Space(ARCH, SearchConfig(ffn=given), ONE)


WRONG = {
    "min_lr": (2e-4, "min_lr is 0.0002; it must be at least 0 and at most peak_lr 0.0001"),
    "peak_lr": (0.0, "peak_lr is 0; it must be above 0"),
    "adam_beta1": (-0.1, "adam_beta1 is -0.1; it must be at least 0 and below 1"),
    "adam_beta2": (1.5, "adam_beta2 is 1.5; it must be at least 0 and below 1"),
    "weight_decay": (-1.0, "weight_decay is -1"),
    "clip_grad": (float("nan"), "clip_grad is nan"),
    "kd_weight": (-1.0, "kd_weight is -1; it must be finite and at least 0"),
    "lm_weight": (-1.0, "lm_weight is -1; it must be finite and at least 0"),
    "temperature": (float("inf"), "temperature is inf; it must be above 0 and finite"),
    "log_every": (0, "log_every is 0"),
    "save_every": (0, "save_every is 0"),
    "stop_after": (0, "stop_after is 0"),
    "sequence_length": (65, "sequence_length is 65, but the student has 64 positions"),
}


@pytest.mark.parametrize("name", WRONG)
def test_training_out_of_range_is_refused_by_the_run_and_by_the_dry_run(name):
    value, sentence = WRONG[name]
    wrong = dataclasses.replace(TRAINING, **{name: value})
    found = list(checks.problems(ARCH, ARCH, wrong, ONE, 1))
    assert any(sentence in line for line in found), found
    assert not list(checks.problems(ARCH, ARCH, TRAINING, ONE, 1))


def test_the_dry_run_tells_them_all():
    long = 131072 + 8
    told = planned(
        "distill", "distill.adam_beta2=1.5", "distill.kd_weight=-1", f"distill.sequence_length={long}", "seed=-1"
    )
    for sentence in ("adam_beta2 is 1.5", "kd_weight is -1", f"{long}, but the student, ", "seed is -1"):
        assert sentence.removesuffix(", ").replace("but the student", "but the student") in told, told
    assert "min_lr is 1;" in planned("correct", "correct.min_lr=1.0")
    for stage in ("importance", "evaluate", "depth"):
        told = planned(stage, f"{stage}.sequence_length={long}", "source=runs/llama31_8b/convert")
        assert f"{stage}.sequence_length is {long}, but the model has 131072 positions" in told, told
    assert f"sequence_length is {long}, but the teacher" in planned("teacher_cache", f"sequence_length={long}")
    budget = ("search.ffn=[0.5,1.0]", "search.budget.parameters=8e9", "search.budget.tolerance=0.9")
    told = planned("search", *budget, f"evaluate.sequence_length={long}", "evaluate.micro_batch=0")
    assert "evaluate.micro_batch is 0" in told and f"evaluate.sequence_length is {long}" in told
    assert "vocab_multiple is 0" in planned("export", "vocab_multiple=0")


def test_positions_and_windows():
    config = TeacherCacheRun(steps=1, global_batch=1, micro_batch=1, sequence_length=65)
    assert any("but the teacher has 64 positions" in line for line in checks.cache_problems(config, ARCH))
    assert any("64 positions" in line for line in importance.problems(ARCH, ImportanceConfig(sequence_length=65), 1))
    assert len(list(ranges.evaluation(EvaluateConfig(1, 0, 0)))) == 3
    assert not list(ranges.evaluation(EvaluateConfig()))


def test_routers_and_norms_that_megatron_core_would_refuse():
    experts = dict(family="mixtral", experts=4)
    with pytest.raises(UserError, match="one expert a token with normalised probabilities"):
        dataclasses.replace(ARCH, experts_per_token=1, **experts)
    for fine in ({"experts_per_token": 2}, {"experts_per_token": 1, "normalize_experts": False}):
        assert dataclasses.replace(ARCH, **experts, **fine).experts == 4
    for family, count in (("llama", 4), ("mixtral", 0)):
        with pytest.raises(UserError, match=f"experts is {count}, but {family} is "):
            dataclasses.replace(ARCH, family=family, experts=count)
    merged = PruneConfig(heads=4, merge_heads=True)
    assert target_architecture(ARCH, merged).heads == 4
    with pytest.raises(UserError, match=r"prune\.merge_heads .* Qwen3ForCausalLM"):
        target_architecture(dataclasses.replace(ARCH, family="qwen3"), merged)


@pytest.mark.parametrize("label", [-100, -1, 11, 15, 1 << 40])
def test_labels_outside_the_vocabulary_count_only_under_a_mask(label):
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(3, 4, generator=g), torch.randn(16, 4, generator=g)
    labels, mask = torch.tensor([1, label, 10]), torch.ones(3)
    inputs, how = (FactoredLogits(hidden, head), None, labels), dict(vocab_size=11, config=LossConfig(0.0, 1.0))
    with pytest.raises(UserError, match=f"label {label} is outside the vocabulary of 11"):
        distillation_loss(*inputs, mask, **how)
    expected = torch.nn.functional.cross_entropy((hidden @ head.t())[[0, 2], :11], labels[[0, 2]], reduction="sum")
    assert torch.allclose(distillation_loss(*inputs, torch.tensor([1.0, 0, 1]), **how)[0], expected)


STEP = {
    "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "n7", "SLURM_JOB_NODELIST": "n[7-9]", "SLURM_JOB_ID": "1234567",
}  # fmt: skip
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK and WORLD_SIZE are set, but MASTER_ADDR and MASTER_PORT are not"),
        ({"MASTER_ADDR": "here"}, "MASTER_ADDR is set, but MASTER_PORT is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but RANK and MASTER_ADDR"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; it must be a whole number"),
        (TORCHRUN | {"RANK": "-1"}, "RANK is '-1'"),
        (TORCHRUN | {"RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2; ranks go from 0 to 1"),
        (TORCHRUN | {"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT is 99999"),
        (TORCHRUN | {"MASTER_PORT": "29500.5"}, "MASTER_PORT is '29500.5'"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR is empty"),
        (TORCHRUN | {"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        (
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
            "srun started 2 processes, but SLURM_LOCALID, SLURM_NODEID, SLURM_JOB_ID",
        ),
        (STEP | {"SLURM_STEP_NODELIST": "n[1-2]"}, "scontrol cannot name the nodes n[1-2]"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 processes, each of which would be a run of its own"),
    ],
)
def test_half_a_launcher_is_one_sentence(env, sentence):
    with pytest.raises(UserError) as refused, mock.patch.dict(os.environ, env | {"PATH": ""}, clear=True):
        rendezvous.read_launcher()
    assert len(str(refused.value).splitlines()) == 1 and sentence in str(refused.value)


def test_every_launcher_is_read():
    """Environments of one process, of torchrun, of srun with one task a rank (as submitit's), and of submitit's local executor."""
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "ENVIRONMENT": "BATCH"}  # a batch script is one process
    own = {"MASTER_ADDR": "here", "MASTER_PORT": "1"}
    srun = {"RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n7"}
    local = {"SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_LOCALID": "1"}
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for env, expected in (
        ({}, {}),
        (batch, {}),
        (TORCHRUN, TORCHRUN),
        (STEP | TORCHRUN, TORCHRUN),
        (own, own),
        (STEP, srun | {"MASTER_PORT": "24567"}),
        (STEP | own, srun | own),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "ENVIRONMENT": "BATCH"}, {}),
        (local | {"SUBMITIT_LOCAL_JOB_ID": "987"}, ranks | {"MASTER_PORT": "20987"}),
    ):
        with mock.patch.dict(os.environ, env, clear=True):
            rendezvous.read_launcher()
            assert {name: os.environ[name] for name in os.environ if name not in env or name in expected} == expected


def test_processes_end_before_they_wait(tmp_path):
    """As a shell starts them: the sentence and the status, at once and without a traceback."""
    for env in ({"RANK": "0", "WORLD_SIZE": "two"}, {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}):
        command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), "+model=smollm2_135m", "source=nowhere"]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, timeout=60)
        told = (done.stdout + done.stderr).splitlines()
        assert done.returncode == 2 and len(told) == 1 and told[0].startswith("error: "), told
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "0")
        with pytest.raises(UserError, match="RANK is set, but WORLD_SIZE"), process_groups.distributed_context(ONE):
            pass


def test_what_omegaconf_says_reaches_the_user():
    for stage in ("export", "evaluate"):
        given = ["model.name=x", "source=there", "out_dir=here"]
        assert config_of(stage, *given).model.hf == ""  # never read there
    with pytest.raises(UserError, match=r"model\.hf is not set"):
        config_of("convert", "model.name=x")
    for override, sentence in (
        ("out_dir=${nowhere}", r"out_dir: Interpolation key 'nowhere' not found"),
        ("out_dir=${oc.env:NOT_SET_ANYWHERE}", "out_dir: .*NOT_SET_ANYWHERE"),
        ("prune.hidden=abc", "abc"),
        ("distill.steps=x", "steps|x"),
    ):
        with pytest.raises(UserError, match=sentence) as error:
            config_of("distill", "+model=llama31_8b", override)
        assert "is not set" not in str(error.value) and "\n" not in str(error.value)


SPOILED = (
    b"",
    b"{",
    b"null",
    b"[]",
    b"3",
    b"\xff\xfe{}",
    b"[" * 100_000,
    b"version https://git-lfs.github.com/spec/v1\n",
    b"{}",
)


@pytest.mark.parametrize("content", SPOILED)
def test_spoiled_json_is_named(tmp_path, content):
    for name, read in (("plan.json", load_plan), ("depth.json", lambda path: study.load_study(path, "x"))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=str(tmp_path / name)) as error:
            read(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d["hidden"].__setitem__(0, 0.5),
        lambda d: d["ffn"]["1"].__setitem__(-1, 23.0),
        lambda d: d["blocks"].__setitem__(0, False),
        lambda d: d["source"].update(hidden="32"),
        lambda d: d["source"].update(groups=0),
        lambda d: d.update(heads=[1]),
    ],
)
def test_spoiled_plans_are_named(tmp_path, spoil):
    data = json.loads(make_plan(ARCH, "x", random_scores(ARCH), PruneConfig(hidden=16)).to_json())
    spoil(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=str(tmp_path / "plan.json")):
        load_plan(tmp_path)


def test_scores_of_another_type_are_refused(tmp_path):
    scores = random_scores(ARCH)
    scores.metadata["fingerprint"] = "x"
    file = save_scores(tmp_path, scores)
    load_scores(tmp_path, ARCH, "x")
    for dtype in (torch.bfloat16, torch.int64, torch.bool):
        spoiled = scores.vectors | {"hidden": scores.vectors["hidden"].to(dtype)}
        save_file(spoiled, file, metadata=scores.metadata)
        with pytest.raises(UserError, match=rf"{file} has hidden in .*, expected float32"):
            load_scores(tmp_path, ARCH, "x")
