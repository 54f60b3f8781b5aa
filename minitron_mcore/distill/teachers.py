"""Several teachers of one run, each with a weight."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from minitron_mcore.checkpoint.run_folder import Checkpoint
from minitron_mcore.config.performance import PerformanceConfig
from minitron_mcore.config.settings import DistillConfig, ParallelConfig
from minitron_mcore.config.stages import DistillRun
from minitron_mcore.data.blend import parse_blend
from minitron_mcore.distill import checks
from minitron_mcore.distill.cache import Cache, CachedTeacher, open_teacher
from minitron_mcore.distill.remote_teacher import RemoteTeacher
from minitron_mcore.distill.teacher import Teacher
from minitron_mcore.errors import refuse
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel.schedule import Batch


@dataclass(frozen=True)
class Several(Checkpoint):
    """Opened checkpoints of several teachers; itself the first of them."""

    others: tuple[Checkpoint, ...]
    weights: tuple[float, ...]
    """Of each, the first one's first; their sum is 1."""


def open_teachers(config: DistillRun) -> Checkpoint | None:
    """Open a run's teacher, its cache, or its several teachers; None if no loss needs one.

    Raises:
        UserError: see `cache.open_teacher` and `blend.parse_blend`; a cache among several teachers.
    """
    if not config.distill.needs_teacher:
        return None
    if not config.teachers:
        return open_teacher(config.teacher)
    paths, weights = parse_blend(config.teachers, "teachers")
    refuse(checks.teacher_folders(paths))
    first, *others = [open_teacher(path) for path in paths]
    if not others:
        return first
    weights = weights or [1.0] * len(paths)
    return Several(**vars(first), others=tuple(others), weights=tuple(weight / sum(weights) for weight in weights))


def members(teacher: Checkpoint | None) -> list[Checkpoint]:
    """Each teacher of a run."""
    return [teacher, *(teacher.others if isinstance(teacher, Several) else ())] if teacher else []


class SeveralTeachers:
    """What `teacher.Teacher` is to a trainer. Each rank holds its shards of all of them, in the same layout."""

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float]):
        self.teachers, self.weights = teachers, weights

    def heads(self) -> dict[str, Tensor]:
        """Key of each teacher's hidden states in a batch, and its head's rows [V_r, H] on last-stage ranks."""
        return {f"teacher_hidden {n}": teacher.head for n, teacher in enumerate(self.teachers)}

    def add_teacher_outputs(self, batches: Sequence[Batch]) -> Iterable[Batch]:
        """As `Teacher.add_teacher_outputs`, one teacher after the other (collective)."""
        every = [teacher.add_teacher_outputs(batches) for teacher in self.teachers]
        return (
            batch | {f"teacher_hidden {n}": each["teacher_hidden"] for n, each in enumerate(outputs)}
            for batch, *outputs in zip(batches, *every, strict=True)
        )


def load(
    teacher: Checkpoint,
    student: Architecture,
    config: DistillConfig,
    parallel: ParallelConfig,
    dtype: str,
    performance: PerformanceConfig,
) -> Teacher | SeveralTeachers | RemoteTeacher | CachedTeacher:
    """The teacher or teachers of a `student`'s trainer (collective). See `Teacher.load`."""
    if isinstance(teacher, Cache):
        return CachedTeacher(teacher, student, parallel)
    options = student, config, parallel, dtype, performance
    if config.teacher_ranks:
        return RemoteTeacher(teacher, *options)
    loaded = [Teacher.load(each, *options) for each in members(teacher)]
    return SeveralTeachers(loaded, teacher.weights) if isinstance(teacher, Several) else loaded[0]


def run_here(teacher: object) -> list[Architecture]:
    """Architectures of the teachers that run on the student's ranks."""
    teachers = teacher.teachers if isinstance(teacher, SeveralTeachers) else [teacher]
    return [each.arch for each in teachers if isinstance(each, Teacher)]
