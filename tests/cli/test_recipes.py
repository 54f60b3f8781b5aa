"""Recipes: a failure means that a recipe no longer makes the published model. The figures stand here a second time on purpose:
they are the papers' (arXiv 2407.14679, 2408.11796)."""

import functools
import inspect
import json
import runpy

import pytest

from minitron_mcore.cli import compose
from minitron_mcore.config import identity
from minitron_mcore.errors import UserError
from minitron_mcore.models import architecture, parameter_table
from minitron_mcore.pruning.target import target_architecture
from tests.helpers.launching import conf

RECIPES = sorted(path.stem for path in (compose.CONF / "recipe").glob("*.yaml"))
ANYWHERE = ["parallel=tp8_sp", "data.train=[x.jsonl]", "work_dir=w"]
# (blocks, hidden, ffn, heads, groups, head_dim, vocab): source, then target; parameters, and those without embeddings
NEMOTRON, LLAMA, NEMO, MINITRON_4B = (
    (32, 6144, 24576, 48, 8, 128, 256000),
    (32, 4096, 14336, 32, 8, 128, 128256),
    (40, 5120, 14336, 32, 8, 128, 131072),
    (32, 3072, 9216, 24, 8, 128, 256000),
)
PUBLISHED = {
    "llama31_minitron_4b_width": (LLAMA, (32, 3072, 9216, 32, 8, 128, 128256), 4_512_746_496, 3_724_741_632),
    "llama31_minitron_4b_depth": (LLAMA, (16, 4096, 14336, 32, 8, 128, 128256), 4_540_469_248, 3_489_796_096),
    "mistral_nemo_minitron_8b": (NEMO, (40, 4096, 11520, 32, 8, 128, 131072), 8_414_105_600, 7_340_363_776),
    "minitron_8b": (NEMOTRON, (32, 4096, 16384, 48, 8, 128, 256000), 8_271_699_968, 6_174_547_968),
    "minitron_4b": (
        (32, 4096, 16384, 48, 8, 128, 256000),
        MINITRON_4B,
        4_190_509_056,
        2_617_645_056,
    ),
    "nemotron_mini_4b_instruct": (MINITRON_4B, MINITRON_4B, 4_190_509_056, 2_617_645_056),
}
# peak and lowest rate, warm-up, batch, sequence, tokens: of the distillation, then of the teacher's correction
LLAMA_TRAINING = (1e-4, 1e-5, 40, 1152, 8192, 94e9), (6e-5, 3e-6, 120, 1152, 8192, 100e9)
NEMOTRON_TRAINING = (2e-4, 4.5e-7, 40, 1152, 4096, 94e9), (4e-5, 4.5e-7, 120, 1152, 4096, 100e9)
TRAINING = {
    "llama31_minitron_4b_width": LLAMA_TRAINING,
    "llama31_minitron_4b_depth": LLAMA_TRAINING,
    "mistral_nemo_minitron_8b": ((1e-4, 4.5e-7, 60, 768, 8192, 380e9), (6e-5, 4.5e-7, 120, 768, 8192, 100e9)),
    "minitron_8b": NEMOTRON_TRAINING,
    "minitron_4b": NEMOTRON_TRAINING,
}
CHAINS = [("minitron_8b", "minitron_4b"), ("smollm2_115m", "smollm2_100m_chained")]


@pytest.fixture(autouse=True)
def hydra_is_up():
    with conf():
        yield


@functools.cache
def composed(stage: str, recipe: str, *overrides: str):
    return compose.compose(stage, [f"+recipe={recipe}", *overrides])


def source_of(run) -> architecture.Architecture:
    return architecture.from_config(run.model.architecture)


def sizes(arch: architecture.Architecture) -> tuple[int, ...]:
    return arch.blocks, arch.hidden, arch.ffn, arch.heads, arch.groups, arch.head_dim, arch.vocab


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_architectures_and_counts_are_the_published_ones(recipe):
    run = composed("plan", recipe)
    source, target, parameters, without_embeddings = PUBLISHED[recipe]
    found = target_architecture(source_of(run), run.prune)
    assert (sizes(source_of(run)), sizes(found)) == (source, target)
    assert (parameter_table.count(found), parameter_table.count(found, embeddings=False)) == (
        parameters,
        without_embeddings,
    )
    assert (run.parameters, run.without_embeddings) == (parameters, without_embeddings)


def test_depth_keeps_the_first_fifteen_and_the_last():
    """Counted from 1, as in the paper."""
    dropped = composed("plan", "llama31_minitron_4b_depth").prune.drop_blocks
    assert [block + 1 for block in range(32) if block not in dropped] == [*range(1, 16), 32]


@pytest.mark.parametrize("recipe", TRAINING)
def test_training_is_the_published_one(recipe):
    distill = composed("distill", recipe).distill
    for settings, expected in zip((distill, composed("correct", recipe).correct), TRAINING[recipe], strict=True):
        *values, tokens = expected
        found = [settings.peak_lr, settings.min_lr, settings.warmup_steps, settings.global_batch]
        assert [*found, settings.sequence_length] == values
        step = settings.global_batch * settings.sequence_length
        assert abs(settings.steps * step - tokens) < step
        assert (settings.adam_beta1, settings.adam_beta2, settings.weight_decay) == (0.9, 0.95, 0.1)
    assert (distill.kd_weight, distill.lm_weight, distill.temperature) == (1.0, 0.0, 1.0)
    importance = composed("importance", recipe).importance
    assert (importance.samples, importance.sequence_length) == (1024, expected[4])


def test_the_instruct_recipe_trains_its_source_on_answers_alone():
    """Of its training only the context of 4,096 tokens is published."""
    run = composed("distill", "nemotron_mini_4b_instruct")
    assert run.student == run.teacher == composed("convert", "nemotron_mini_4b_instruct").out_dir
    assert (run.distill.kd_weight, run.distill.lm_weight, run.distill.sequence_length) == (0.0, 1.0, 4096)
    chained = composed("distill", "nemotron_mini_4b_instruct", "recipe.source=${runs}/minitron_4b/distill")
    assert chained.student == composed("distill", "minitron_4b").out_dir


def test_every_stage_of_every_recipe_takes_the_same_command_line():
    pairs = {(stage, RECIPES[0]) for stage in compose.LAUNCH_FILES} | {("pipeline", recipe) for recipe in RECIPES}
    for stage, recipe in pairs:
        run = composed(stage, recipe, *ANYWHERE, "distill=small", "distill.steps=200")
        assert (run.parallel.tensor, run.distill.steps, run.distill.global_batch, run.work_dir) == (8, 200, 4, "w")


def test_a_stage_keeps_only_what_it_reads():
    """Otherwise a change to one stage's settings would make every finished folder another run."""
    first, second = (identity.resolved(composed("plan", "minitron_8b", f"distill.steps={n}")) for n in (100, 200))
    assert first == second and "prune" in first
    assert first.keys().isdisjoint({"distill", "importance", "recipe"})


@pytest.mark.parametrize(("first", "second"), CHAINS)
def test_a_chain_goes_on_from_the_student_with_the_first_teacher(first, second):
    before, after = composed("plan", first), composed("plan", second)
    assert target_architecture(source_of(before), before.prune) == source_of(after)
    assert after.source == composed("distill", first).out_dir
    assert composed("distill", second).teacher == composed("distill", first).teacher
    assert after.work_dir != before.work_dir
    assert composed("plan", second, "runs=/r").source.startswith("/r/")


def test_one_cut_and_the_chain_see_as_many_tokens():
    steps = {name: composed("distill", f"smollm2_{name}").distill for name in ("100m", "115m", "100m_chained")}
    assert steps["100m"].steps == steps["115m"].steps + steps["100m_chained"].steps
    assert len({(s.global_batch, s.sequence_length) for s in steps.values()}) == 1
    ends = [composed("plan", f"smollm2_{name}") for name in ("100m", "100m_chained")]
    assert len({target_architecture(source_of(run), run.prune) for run in ends}) == 1
    for recipe in ("smollm2_100m", "smollm2_115m", "smollm2_100m_chained"):
        run = composed("plan", recipe)
        target = target_architecture(source_of(run), run.prune)
        assert (parameter_table.count(target), parameter_table.count(target, embeddings=False)) == (
            run.parameters,
            run.without_embeddings,
        )
        architecture.check_exportable(target)


def test_another_source_is_refused(tmp_path):
    """As launch/plan.py meets it: Llama-3.1-8B where the recipe starts from Nemotron-4 15B."""
    arch = source_of(composed("plan", "llama31_minitron_4b_width"))
    (tmp_path / "step_0").mkdir()
    (tmp_path / "step_0" / "integrity.json").write_text('{"files": {}}')
    (tmp_path / "model.json").write_text(
        json.dumps({"architecture": arch.to_json(), "fingerprint": "f", "lineage": {}})
    )
    plan = inspect.unwrap(runpy.run_path(str(compose.LAUNCH / "plan.py"))["main"])
    with pytest.raises(
        UserError, match="is not the model that the config names: family is llama, not nemotron, .*hidden"
    ):
        plan(composed("plan", "minitron_8b", f"source={tmp_path}"))


def test_other_counts_are_refused():
    from minitron_mcore.pruning.target import check_counts

    run = composed("plan", "llama31_minitron_4b_width", "prune.ffn=9728")
    target = target_architecture(source_of(run), run.prune)
    with pytest.raises(
        UserError, match="parameters 4,663,741,440 where the recipe's model has 4,512,746,496 and without"
    ):
        check_counts(target, run.parameters, run.without_embeddings)
    check_counts(target, None, None)
