"""Stopped and resumed runs: a failure means that a pause, or a resume in another layout, changes what a student learns."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.settings import (
    DistillConfig,
    Dtype,
    HiddenStateLossConfig,
    ParallelConfig,
    PruneConfig,
    TrainConfig,
)
from minitron_mcore.config.stages import CorrectRun, DistillRun
from minitron_mcore.testing import RankError, on_ranks
from tests.helpers import cached_teacher, families, models
from tests.helpers.cached_teacher import World
from tests.helpers.cutting import ONE, write_family

LOSSES = ("kd_loss", "lm_loss", "hidden_state_loss", "hidden_state_weight", "teacher_entropy")
FIGURES = ("step", "tokens", *LOSSES, "grad_norm", "lr")
STATES = {"hidden_state_loss": HiddenStateLossConfig(0.5, pairs=[[2, 2]], dynamic=True)}


@dataclasses.dataclass(frozen=True)
class Case:
    """A run of 4 steps in a layout."""

    ranks: int
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    dtype: Dtype = Dtype.fp32
    students: tuple[str, ...] = ("student",)
    teacher: str | None = "teacher"
    """None: the student is corrected."""
    changes: dict = dataclasses.field(default_factory=dict)

    def configs(self, world: World, name: str, **changes) -> list[DistillRun | CorrectRun]:
        world, settings = dataclasses.replace(world, dtype=self.dtype), self.changes | changes
        if self.teacher is None:
            common = {
                "parallel": self.parallel,
                "data": world.data(),
                "dtype": self.dtype,
                "out_dir": str(world.path / name),
            }
            known = {field.name for field in dataclasses.fields(TrainConfig)}
            correct = {key: value for key, value in vars(cached_teacher.SETTINGS).items() if key in known}
            return [
                CorrectRun(**common, source=str(world.path / student), correct=TrainConfig(**correct | settings))
                for student in self.students
            ]
        runs = [world.run(f"{name}/{student}", self.teacher, self.parallel, settings) for student in self.students]
        return [
            dataclasses.replace(run, student=str(world.path / each))
            for run, each in zip(runs, self.students, strict=True)
        ]


TP2_SP, PP2 = ParallelConfig(tensor=2, sequence=True), ParallelConfig(pipeline=2)
CASES = {
    "tp2_sp_pp2_bf16": Case(4, ParallelConfig(tensor=2, sequence=True, pipeline=2), Dtype.bf16, changes=STATES),
    "pp2_virtual2_states": Case(2, ParallelConfig(pipeline=2, virtual=2), changes=STATES),
    "cp2_cache_bf16": Case(2, ParallelConfig(context=2), Dtype.bf16, teacher="top"),
    "students_pp2": Case(2, PP2, students=("student", "short")),
    "tp2_ep2_correct_bf16": Case(
        2, ParallelConfig(tensor=2, sequence=True, expert=2), Dtype.bf16, ("experts",), teacher=None
    ),
    "dp2_of_teacher_ranks": Case(
        3, changes={"teacher_ranks": 1, "teacher_parallel": ONE, "teacher_ahead": 2, "async_save": True}
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    path = tmp_path_factory.mktemp("resume")
    write_family(path, {"student": PruneConfig(hidden=24, ffn=18), "short": PruneConfig(blocks=3)})
    families.tiny("mixtral", path / "moe")
    found = World(path, cached_teacher.write_text(path))
    on_ranks(make, 1, ONE, path, found.writer("top", **cached_teacher.KINDS["top"]))
    return found


def make(path: Path, cache) -> None:
    models.import_hf(path / "moe", path / "experts", ONE)
    cached_teacher.record(cache)


def train(*runs: list[DistillRun | CorrectRun]) -> None:
    """Each run's students together, as the launch files do."""
    from minitron_mcore.distill import remote_teacher, run
    from minitron_mcore.distill.cache import open_teacher
    from minitron_mcore.parallel import process_groups

    for configs in runs:
        first = configs[0]
        if isinstance(first, CorrectRun):
            settings = DistillConfig(**vars(first.correct), kd_weight=0.0, lm_weight=1.0)
            run.train(configs, settings, [open_checkpoint(first.source)], None)
        elif (bridge := process_groups.bridge()) and bridge.is_teacher:
            remote_teacher.serve(open_checkpoint(first.teacher), first.distill, first.parallel, first.dtype.value)
        else:
            students = [open_checkpoint(each.student) for each in configs]
            run.train(configs, first.distill, students, open_teacher(first.teacher))


def start(case: Case, *runs: list) -> None:
    teacher_ranks = case.changes.get("teacher_ranks", 0)
    for each in [[run] for run in runs] if teacher_ranks else [runs]:  # the teacher's ranks serve one run
        on_ranks(train, case.ranks, case.parallel, *each, teacher_ranks=teacher_ranks, teacher_parallel=ONE)


def history(folder: str) -> list[dict]:
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in FIGURES} for row in rows]


@pytest.mark.default_cases("pp2_virtual2_states")
@pytest.mark.parametrize("name", CASES)
def test_a_pause_changes_no_bit(world, name):
    case = CASES[name]
    whole, half, rest = (
        case.configs(world, f"{name}_{folder}", stop_after=stop)
        for folder, stop in (("whole", None), ("parts", 2), ("parts", None))
    )
    start(case, whole, half)
    assert [len(history(config.out_dir)) for config in half] == [2] * len(half)
    start(case, rest)
    for one, other in zip(whole, rest, strict=True):
        assert len(history(one.out_dir)) == 4 and history(one.out_dir) == history(other.out_dir)


@pytest.mark.slow
def test_another_layout_goes_on_with_the_same_samples(world):
    """To rounding; from any layout and micro-batch, in a folder that has moved."""
    case = Case(2, TP2_SP)
    start(case, case.configs(world, "layout_whole"), case.configs(world, "layout_half", stop_after=2))
    [expected] = (history(config.out_dir) for config in case.configs(world, "layout_whole"))
    for number, other in enumerate((Case(2), Case(2, PP2))):
        shutil.copytree(world.path / "layout_half", world.path / f"layout_{number}")
        configs = other.configs(world, f"layout_{number}", micro_batch=2)
        start(other, configs)
        for a, b in zip(expected, history(configs[0].out_dir), strict=True):
            tolerance = 1e-6 if a["step"] <= 3 else 1e-4
            assert all(math.isclose(a[key], b[key], rel_tol=tolerance) for key in ("kd_loss", "lm_loss")), (other, a, b)


def test_a_new_phase_goes_on_at_its_sample(world):
    """With another batch in the same order, to the bit as a run without rest; with another length from as many tokens on."""
    case = Case(1, teacher=None)
    still = {"peak_lr": 1e-12, "min_lr": 1e-12}  # the same weights at all steps: a loss is that of its samples
    names = ("phases_4", "phases_2", "phases")
    four, two, begun = (case.configs(world, name, **still, stop_after=2)[0] for name in names)
    four.correct, two.correct = (
        dataclasses.replace(config.correct, global_batch=batch, steps=16 // batch, stop_after=None)
        for config, batch in ((four, 4), (two, 2))
    )
    resumed = dataclasses.replace(begun, correct=dataclasses.replace(two.correct, phase=1, steps=6))
    longer = dataclasses.replace(
        resumed, correct=dataclasses.replace(resumed.correct, phase=2, sequence_length=24, steps=7)
    )
    start(case, [four], [two], [begun], [resumed], [longer])
    by_four, by_two, rows = (history(config.out_dir) for config in (four, two, begun))
    assert [row["tokens"] for row in rows] == [48, 96, 120, 144, 168, 192, 240]
    losses = [row["lm_loss"] for row in rows]
    assert losses[:2] == [row["lm_loss"] for row in by_four[:2]]
    assert losses[2:6] == [row["lm_loss"] for row in by_two[4:]]
    lineage = open_checkpoint(begun.out_dir).lineage
    positions = [
        tuple(phase[key] for key in ("first_step", "first_sample", "first_token")) for phase in lineage["phases"]
    ]
    assert positions == [(0, 0, 0), (2, 8, 96), (6, 8, 192)]
    record = Path(begun.out_dir) / "model.json"
    record.write_text(record.read_text().replace(lineage["data"]["hash"], "0" * 16))
    with pytest.raises(
        RankError, match=f"phases was trained on tokens 0{{16}}, but .* now give {lineage['data']['hash']}: restore"
    ):
        start(case, [longer])
    with pytest.raises(RankError, match=r"correct.phase was 2, is 1; .*correct.sequence_length was 24, is 12"):
        start(case, [resumed])
    late = dataclasses.replace(longer, correct=dataclasses.replace(longer.correct, phase=4))
    with pytest.raises(
        RankError, match="phase is 4, but the checkpoint of step 7 is of phase 2: give that number to go on"
    ):
        start(case, [late])
