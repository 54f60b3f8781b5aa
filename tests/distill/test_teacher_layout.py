"""A teacher of another layout: a failure means that where the teacher lies changes what the student learns.

The oracle is the run on one process, which test_trainer and test_hidden_state_loss hold to dense modules.
"""

import dataclasses

import pytest

from minitron_mcore.config.settings import HiddenStateLossConfig, ParallelConfig, PruneConfig
from minitron_mcore.testing import RankError, on_ranks
from tests.helpers import families, models
from tests.helpers.cutting import ONE, export, write_family
from tests.helpers.teacher_layouts import APART, CONFIG, PAIRS, hold, serve_or_learn, taught_apart, two_steps


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher, its narrower student, and what the student learns on one process."""
    at = tmp_path_factory.mktemp("teacher_layout")
    write_family(at, {"student": PruneConfig(hidden=24, ffn=18)}, tied=True)
    (alone,) = on_ranks(two_steps, 1, ONE, at, CONFIG, ONE, at / "one")
    return at, alone, export(at / "one", at / "one_hf")


@pytest.mark.default_cases("tp3_of_dp3", "cp2_tp2_sp_of_pp2_virtual2_dp2")
@pytest.mark.parametrize("name", PAIRS)
def test_gradients_are_those_of_one_process(tmp_path, folders, name):
    (at, alone, expected), (world, parallel, teacher_parallel) = folders, PAIRS[name]
    config = dataclasses.replace(CONFIG, teacher_parallel=teacher_parallel)
    hold(alone, expected, on_ranks(two_steps, world, parallel, at, config, parallel, tmp_path / "run"), tmp_path)


def test_replicas_that_share_experts_run_together(tmp_path, folders):
    """One micro-batch at a time for two replicas of a mixture of experts: the second runs it too, for nobody."""
    families.tiny("mixtral", tmp_path / "moe")
    on_ranks(models.import_hf, 1, ONE, tmp_path / "moe", tmp_path / "teacher", ONE)
    (tmp_path / "student").symlink_to(folders[0] / "student")
    config = dataclasses.replace(CONFIG, teacher_ahead=1, hidden_state_loss=HiddenStateLossConfig())
    (alone,) = on_ranks(two_steps, 1, ONE, tmp_path, config, ONE, tmp_path / "one")
    config.teacher_parallel, parallel = ParallelConfig(expert=2), ParallelConfig(tensor=2)
    ranks = on_ranks(two_steps, 2, parallel, tmp_path, config, parallel, tmp_path / "run")
    hold(alone, export(tmp_path / "one", tmp_path / "one_hf"), ranks, tmp_path)


@pytest.mark.parametrize("name", APART)
def test_ranks_of_its_own_teach_the_same(tmp_path, folders, name):
    at, alone, expected = folders
    hold(alone, expected, taught_apart(on_ranks, name, at, tmp_path / "run"), tmp_path)


def test_the_student_tells_why_there_is_no_teacher(tmp_path, folders):
    config = dataclasses.replace(CONFIG, teacher_ranks=1)
    with pytest.raises(RankError, match="UserError: the teacher's weights are zero"):
        on_ranks(serve_or_learn, 2, ONE, folders[0], config, ONE, tmp_path / "x", True, teacher_ranks=1)


def world_after_an_error(parallel, teacher_parallel):
    """The student's groups and ranks before another layout, in it, and after an error in it."""
    from minitron_mcore.parallel import process_groups

    def sizes():
        groups = (
            process_groups.tp_group,
            process_groups.pp_group,
            process_groups.cp_group,
            process_groups.dp_group,
            process_groups.ep_group,
        )
        return [(id(group()), group().size()) for group in groups], process_groups.is_last_stage()

    before, second = sizes(), process_groups.Layout.of(teacher_parallel)
    assert sizes() == before and process_groups.Layout.of(teacher_parallel) is second
    with pytest.raises(ZeroDivisionError), process_groups.use_layout(second):
        inside = sizes()
        raise ZeroDivisionError
    return [size for _, size in inside[0]], sizes() == before


def test_an_error_in_the_teacher_s_world_leads_back_to_the_student_s():
    for inside, back in on_ranks(world_after_an_error, 2, ParallelConfig(tensor=2), ONE, ParallelConfig(pipeline=2)):
        assert inside == [1, 2, 1, 1, 1] and back


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"teacher_parallel": ParallelConfig(tensor=4)}, "distill.teacher_parallel: 2 processes cannot hold tensor 4"),
        (
            {"teacher_parallel": ParallelConfig(pipeline=2, virtual=3)},
            "x virtual 3 = 6 is more than the model's 5 blocks",
        ),
        ({"teacher_ahead": 0}, "teacher_ahead is 0; it must be at least 1"),
    ],
)
def test_impossible_layouts_are_refused(tmp_path, folders, change, sentence):
    config = dataclasses.replace(CONFIG, **change)
    with pytest.raises(RankError, match=sentence):
        on_ranks(two_steps, 2, ONE, folders[0], config, ONE, tmp_path / "x")
