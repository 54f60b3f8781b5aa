"""The dry run: a failure means that it promises memory, time or a fit that the run would not keep."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minitron_mcore.cli import compose, dry_run
from minitron_mcore.config.settings import Device, DistillConfig, Dtype, ParallelConfig
from minitron_mcore.config.stages import STAGES
from minitron_mcore.errors import UserError
from minitron_mcore.estimate import activations, memory
from minitron_mcore.estimate.setting import Setting
from minitron_mcore.models import flops
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.testing import on_ranks, random_checkpoint, saved_bytes
from tests.helpers import launching

ROOT = Path(__file__).parents[2]
TINY = Architecture("llama", 3, 36, 30, 12, 6, 8, 101, 256, 1e-5, 1e4, None, tied=False)  # odd vocabulary, odd blocks
EXPERTS = {"experts": 6, "experts_per_token": 3, "ffn": 14}
DENSE = {
    "llama": TINY,
    "tied": dataclasses.replace(TINY, tied=True),
    "nemotron": dataclasses.replace(TINY, family="nemotron", rotary_fraction=0.5),
    "qwen2": dataclasses.replace(TINY, family="qwen2"),
    "qwen3": dataclasses.replace(TINY, family="qwen3", tied=True),
    "window": dataclasses.replace(TINY, family="mistral", window=5),
    "missing layers": dataclasses.replace(TINY, no_attention=(0,), no_mlp=(2,)),
}
MIXED = {
    "mixtral": dataclasses.replace(TINY, family="mixtral", **EXPERTS),
    "qwen3_moe": dataclasses.replace(TINY, family="qwen3_moe", **EXPERTS),
}
EVERY = DENSE | MIXED
LAYOUTS = {
    "one": (1, ParallelConfig(), EVERY),
    "tp3": (3, ParallelConfig(tensor=3), DENSE),
    "tp2_sp_pp2_ep2": (4, ParallelConfig(tensor=2, pipeline=2, sequence=True, expert=2), MIXED),
    "tp2_sp_pp2": (4, ParallelConfig(tensor=2, pipeline=2, sequence=True), DENSE),
    "dp2_ep2": (2, ParallelConfig(expert=2), MIXED),
    "cp2": (2, ParallelConfig(context=2), DENSE),
}
MICRO_BATCH, LENGTH = 2, 24


def setting(world, parallel, dtype=Dtype.bf16):
    return Setting(parallel, world, dtype, MICRO_BATCH, LENGTH, Device.cpu)


def built(archs, parallel, dtype):
    """By model: stage, parameters in experts and outside, bytes that autograd keeps of one forward pass."""
    from minitron_mcore.models import build
    from minitron_mcore.parallel import process_groups

    found = {}
    for name, arch in archs.items():
        model = build.build(arch, parallel, dtype)
        counts = [0, 0]
        for key, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.02)
            counts["local_experts" not in key] += parameter.numel()
        kept = 0
        if parallel.pipeline == 1:
            with saved_bytes(model.parameters()) as saved:
                ids = torch.randint(0, arch.vocab, (MICRO_BATCH, LENGTH // parallel.context))
                output = model(ids, None, None)
            kept = saved.now
            del output
        found[name] = (process_groups.pp_group().rank(), *counts, kept)
    return found


@pytest.mark.default_cases("tp2_sp_pp2_ep2-bf16", "cp2-bf16")
@pytest.mark.parametrize(
    ("layout", "dtype"), [*((layout, Dtype.bf16) for layout in LAYOUTS), ("one", Dtype.fp32), ("cp2", Dtype.fp32)]
)
def test_parameters_and_activations_are_those_of_built_models(layout, dtype):
    world, parallel, archs = LAYOUTS[layout]
    sizes, measured = setting(world, parallel, dtype), {name: 0 for name in archs}
    for found in on_ranks(built, world, parallel, archs, parallel, dtype.value):
        for name, arch in archs.items():
            stage, experts, others, kept = found[name]
            assert memory.parameters(arch, sizes, stage) == (experts, others), name
            measured[name] += kept / world
    for name, arch in archs.items() if parallel.pipeline == 1 else ():
        # Ranks that share experts are given different numbers of tokens: on average they keep what is estimated.
        assert activations.stage(arch, sizes, 0, 1) == pytest.approx(measured[name], rel=0.06), name


LONG = 320  # tokens: blocks of 128, 128 and 64 queries


def kept_with_documents(archs, parallel):
    """By model: bytes that autograd keeps of a forward pass over samples that one document fills."""
    from minitron_mcore.models import build

    found = {}
    for name, arch in archs.items():
        model, shape = build.build(arch, parallel, "bf16"), (MICRO_BATCH, LONG // parallel.context)
        with saved_bytes(model.parameters()) as saved:
            output = model(torch.zeros(shape, dtype=torch.int64), None, torch.zeros(shape, dtype=torch.int64))
        found[name] = saved.now
        del output
    return found


@pytest.mark.default_cases("cp2")
@pytest.mark.parametrize("layout", ["one", "cp2"])
def test_masks_of_documents_are_counted(layout):
    world, parallel, _ = LAYOUTS[layout]
    archs = {"llama": TINY, "window": dataclasses.replace(TINY, family="mistral", window=150)}
    sizes = Setting(parallel, world, Dtype.bf16, MICRO_BATCH, LONG, Device.cpu, document_mask=True)
    measured = on_ranks(kept_with_documents, world, parallel, archs, parallel)
    for name, arch in archs.items():
        masks, kept = activations.document_masks(arch, sizes), [rank[name] for rank in measured]
        expected = activations.stage(arch, sizes, 0, 1) + masks
        assert expected == pytest.approx(max(kept), rel=0.05) and masks > 0.08 * expected, (name, kept, masks)
    (row,) = memory.training([TINY], None, CONFIG, sizes)
    assert row["masks"] == (4 if world == 1 else 2) * activations.document_masks(TINY, sizes)
    assert "masks" not in memory.training([TINY], None, CONFIG, dataclasses.replace(sizes, document_mask=False))[0]


CONFIG = DistillConfig(
    steps=4, global_batch=12, micro_batch=MICRO_BATCH, sequence_length=LENGTH, warmup_steps=1, teacher_ahead=2
)
PAIR = {
    "student": dataclasses.replace(DENSE["tied"], blocks=5),
    "teacher": dataclasses.replace(DENSE["tied"], blocks=5, hidden=48, ffn=42),
}


def write_pair(folder, dtype):
    for name, arch in PAIR.items():
        random_checkpoint(arch, folder / name, dtype)


def trained(folder, parallel, config, dtype):
    """Bytes by kind on this rank, as they lie there in a second step."""
    from minitron_mcore.checkpoint import run_folder
    from minitron_mcore.distill.trainer import Trainer
    from minitron_mcore.parallel import process_groups

    student, teacher = (run_folder.open_checkpoint(folder / name) for name in ("student", "teacher"))
    trainer = Trainer(student, teacher, config, parallel, dtype)
    weights, taught = list(trainer.model.parameters()), list(trainer.teacher.model.parameters())
    if process_groups.is_last_stage() and all(trainer.teacher.head is not weight for weight in taught):
        taught.append(trainer.teacher.head)
    count = config.global_batch // (config.micro_batch * process_groups.dp_group().size())
    ids = torch.randint(0, student.arch.vocab, (count, MICRO_BATCH, LENGTH + 1))
    batches = [{"tokens": x[:, :-1], "labels": x[:, 1:], "loss_mask": torch.ones(MICRO_BATCH, LENGTH)} for x in ids]
    trainer.train_step(batches)
    with saved_bytes([*weights, *taught]) as saved:
        trainer.train_step(batches)
    with_teacher_outputs = (batch["teacher_hidden"] for batch in trainer.teacher.add_teacher_outputs(batches))
    handed = [states.nbytes for states in with_teacher_outputs if states is not None]
    inner = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    own, optimizer_bytes = {weight.untyped_storage().data_ptr() for weight in weights}, 0
    for parameter, state in ((p, s) for optimizer in inner for p, s in optimizer.optimizer.state.items()):
        kept = [tensor for tensor in (parameter, *state.values()) if tensor.dim()]
        optimizer_bytes += sum(tensor.nbytes for tensor in kept if tensor.untyped_storage().data_ptr() not in own)
    return {
        "stage": process_groups.pp_group().rank(),
        "weights": sum(weight.nbytes for weight in weights),
        "gradients": sum(weight.main_grad.nbytes for weight in weights),
        "optimizer": optimizer_bytes,
        "teacher": sum(weight.nbytes for weight in taught),
        "hand-off": sum(handed[: None if parallel.pipeline > 1 else config.teacher_ahead]),
        "activations": saved.peak,
    }


@pytest.mark.default_cases("dp2_fp32")
@pytest.mark.parametrize(
    ("world", "parallel", "dtype", "other"),
    [
        (2, ParallelConfig(), Dtype.bf16, None),
        (2, ParallelConfig(), Dtype.fp32, ParallelConfig(tensor=2)),
        (4, ParallelConfig(tensor=2, pipeline=2, sequence=True), Dtype.bf16, ParallelConfig(tensor=2)),
        (4, ParallelConfig(pipeline=2, virtual=2, context=2), Dtype.bf16, ParallelConfig(tensor=2, pipeline=2)),
    ],
    ids=["dp2", "dp2_fp32", "tp2_sp_pp2", "pp2_virtual2_cp2"],
)
def test_training_holds_what_was_estimated(tmp_path, world, parallel, dtype, other):
    on_ranks(write_pair, 1, ParallelConfig(), tmp_path, dtype.value)
    config = dataclasses.replace(CONFIG, teacher_parallel=other)
    rows = memory.training([PAIR["student"]], PAIR["teacher"], config, setting(world, parallel, dtype))
    found = on_ranks(trained, world, parallel, tmp_path, parallel, config, dtype.value)
    for stage, row in enumerate(rows):
        ranks = [rank for rank in found if rank["stage"] == stage]
        for kind in ("weights", "gradients", "hand-off"):
            assert all(rank[kind] == row[kind] for rank in ranks), (stage, kind)
        assert max(rank["teacher"] for rank in ranks) == row["teacher"], stage
        # megatron-core cuts its buffer evenly, wherever that falls: shares differ by a parameter's padding.
        assert sum(rank["optimizer"] for rank in ranks) / len(ranks) == pytest.approx(row["optimizer"], rel=1e-6)
        assert max(rank["activations"] for rank in ranks) == pytest.approx(row["activations"], rel=0.06)
        assert row["total"] == sum(row[kind] for kind in (*ranks[0].keys() - {"stage"}, "workspace"))


def counted(archs):
    """Operations of the matrix products in one forward pass, as torch's own counter sees them."""
    from torch.utils.flop_counter import FlopCounterMode

    from minitron_mcore.models import build

    found = {}
    for name, arch in archs.items():
        model = build.build(arch, ParallelConfig(), "fp32")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.randint(0, arch.vocab, (MICRO_BATCH, LENGTH)), None, None) @ model.head().t()
        by_product = counter.get_flop_counts()["Global"]
        found[name] = sum(flops for op, flops in by_product.items() if str(op) in ("aten.mm", "aten.addmm", "aten.bmm"))
    return found


def test_operations_are_those_that_torch_counts():
    for name, counted_flops in on_ranks(counted, 1, ParallelConfig(), EVERY)[0].items():
        arch = EVERY[name]
        positions = [min(i + 1, arch.window or LENGTH) for i in range(LENGTH)]
        attention = 4 * len(arch.blocks_with("attention")) * arch.heads * arch.head_dim * sum(positions) / LENGTH
        assert flops.forward_flops(arch, LENGTH) - attention == pytest.approx(counted_flops / (MICRO_BATCH * LENGTH)), (
            name
        )


def test_llama_8b_on_256_gpus(tmp_path):
    """Numbers by hand: Llama-3.1-8B has 65 norms of 4096 and matrices that TP 8 divides; 94 B tokens of table 4's recipe. Torch is
    not imported, and the folder stays empty."""
    code = (
        "import runpy, sys, atexit; atexit.register(lambda: print('torch' in sys.modules)); sys.argv = sys.argv[1:]; "
    )
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(ROOT / "launch/distill.py"), "dry_run=true", "+model=llama31_8b"]
    command += ["parallel=tp8", "dry.gpus=256"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    *lines, torch_imported = done.stdout.splitlines()
    output = "\n".join(lines)
    assert torch_imported == "False" and not list(tmp_path.iterdir()), done.stdout + done.stderr
    norms = 65 * 4096
    rank = (8_030_261_248 - norms) // 8 + norms
    row = next(line.split() for line in output.splitlines() if f"{rank:,}" in line)
    sizes = (2 * rank, 4 * rank, 12 * rank / 32, 2 * rank, 2 * 8192 * 4096)
    assert [float(x) for x in row[3:8]] == pytest.approx([size / 2**30 for size in sizes], rel=1e-3)
    # 2 x 7.5 B weights and 32 x 4 x 4096 x 4096.5 of causal attention a token; three times for the student, once for the teacher.
    weights = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) + 128256 * 4096
    flops = 4 * (2 * weights + 32 * 4 * 4096 * 4096.5) * 9960 * 1152 * 8192
    days = flops / (256 * 989e12 * 0.4) / 86400
    assert "dry run of distill" in output and "data.train is not given: no text was checked" in output
    assert "there is no plan, and prune= cuts nothing: the student has the teacher's size" in output
    assert f"{days:#.4g}" in output and f"{9960 * 1152 * 8192:,}" in output


def dry(cwd, stage, *overrides, fails=False) -> str:
    return launching.fork(cwd, stage, "dry_run=true", *overrides, fails=fails)


def test_a_teacher_s_own_layout_is_planned(tmp_path):
    """A rank of stage 0 holds a stage of the teacher and no head; all that is wrong with the layout is told."""
    given = ["+model=llama31_8b", "parallel.pipeline=2", "distill.teacher_parallel={tensor: 8}", "dry.memory=1000"]
    output = dry(tmp_path, "distill", *given)
    assert "processes: 8; TP 1 x PP 2 x CP 1 x DP 4" in output and "teacher: TP 8 x PP 1" in output
    norms, head = 65 * 4096, 128256 * 4096
    rank = (8_030_261_248 - norms - head) // 8 + norms
    found = [line.split() for line in output.splitlines() if line.split()[:2] in (["0", "16"], ["1", "16"])]
    held = [2 * rank / 2**30, 2 * (rank + head) / 2**30]
    assert [float(row[6]) for row in found] == pytest.approx(held, rel=1e-3)
    given.append("distill.teacher_ranks=16")
    output = dry(tmp_path, "distill", *given)
    assert "processes: 18; TP 1 x PP 2 x CP 1 x DP 1" in output and "teacher: TP 8 x PP 1" in output
    found = [line.split() for line in output.splitlines() if line.split()[:2] in (["0", "16"], ["1", "16"])]
    assert float(found[1][6]) == pytest.approx(2 * head / 2**30, rel=1e-3) and len(found[0]) == len(found[1])
    given[2:] = ["distill.teacher_parallel={tensor: 3, sequence: true}"]
    output = dry(tmp_path, "distill", *given, "dry.gpus=6", fails=2)
    assert "distill.teacher_parallel: sequence_length 8192 cannot be shared by parallel.tensor 3" in output


def test_every_problem_is_told_at_once(tmp_path):
    output = dry(
        tmp_path, "distill", "+model=llama31_8b", "teacher=runs/nemotron4_15b/convert", "parallel.tensor=7", "parallel.pipeline=40",
        "parallel.expert=3", "parallel.sequence=true", "dry.gpus=300", "distill.global_batch=33", "distill.micro_batch=2",
        "distill.warmup_steps=9960", "prune.heads=24", "prune.hidden=3500", "prune.ffn=0.7", "dry.memory=1", fails=2,
    )  # fmt: skip
    told = [line for line in output.splitlines() if line.startswith("error: ")]
    expected = (
        "300 processes cannot hold tensor 7 x pipeline 40 x context 1 = 280",
        "sequence_length 8192 cannot be shared by parallel.tensor 7",
        "student: parallel.tensor 7 does not divide heads 24 (next: 28), key/value groups 8 (next: 14), ffn 10035 (next: 10038)",
        "teacher: parallel.tensor 7 does not divide heads 48",
        "student: parallel.pipeline 40 is more than the model's 32 blocks",
        "teacher: parallel.expert is 3, but the model has no experts",
        "the teacher's vocabulary has 256000 tokens, the student's 128256",
        "distill.global_batch 33 is not a multiple of distill.micro_batch 2",
        "distill.warmup_steps is 9960; it must be below distill.steps 9960",
        "hidden 3500 is not a multiple of 24 heads",
        "a rank of pipeline stage 0 needs",
    )
    assert all(any(sentence in line for line in told) for sentence in expected), output
    wrong = ["prune.hidden=9000", "prune.heads=31", "prune.experts=2"]
    assert dry(tmp_path, "plan", "+model=llama31_8b", *wrong, fails=2).count("error: prune.") == 3
    output = dry(tmp_path, "distill", "+model=llama31_8b", "parallel.tensor=0", "distill.micro_batch=0", fails=2)
    assert "parallel.tensor is 0" in output and "micro_batch is 0" in output


@contextlib.contextmanager
def stage(name, *overrides):
    """The config of a launch file, where others can be composed beside it."""
    with launching.conf():
        yield compose.compose(name, list(overrides))


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_plans(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    with stage(name, "+recipe=smollm2_100m", "dry.device=cpu") as config:
        dry_run.run(config)
        found = dry_run.plan(config)
    output = capsys.readouterr().out
    assert f"dry run of {name}, smollm2" in output and "prune= cuts nothing" not in output
    cut = {"source": 134_515_008, "target": 100_282_392}
    expected = {"plan": cut, "prune": cut, "cut": cut, "distill": {"teacher": cut["source"], "student": cut["target"]}}
    one = {"model": cut["target" if name in ("export", "evaluate") else "source"]}
    assert {role: model["parameters"] for role, model in found["models"].items()} == expected.get(name, one)
    assert bool(found["ranks"]) == (name not in ("plan", "cut", "export")) and not list(tmp_path.iterdir())
    assert found["operations"].get("tokens") == {
        "importance": 64 * 256,
        "correct": 65536,
        "distill": 65536,
        "teacher_cache": 65536,
    }.get(name)


def test_sizes_come_from_what_is_there(tmp_path, monkeypatch):
    """A checkpoint before a folder's config.json before the config's own architecture; a chain's teacher from its first recipe."""
    monkeypatch.chdir(tmp_path)
    config = {"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    on_ranks(random_checkpoint, 1, ParallelConfig(), TINY, tmp_path / "other", "bf16")
    given = ["+model=smollm2_135m", "model.hf=hf", "model.architecture=null", "prune.blocks=2"]

    def sizes(*overrides) -> dict[str, tuple[int, int]]:
        with stage("distill", *overrides) as config:
            return {role: (model["blocks"], model["hidden"]) for role, model in dry_run.plan(config)["models"].items()}

    assert sizes(*given) == {"teacher": (3, 32), "student": (2, 32)}
    assert sizes(*given, "student=other") == {"teacher": (3, 32), "student": (3, 36)}
    assert sizes("+recipe=minitron_4b") == {"teacher": (32, 6144), "student": (32, 3072)}
    nowhere = pytest.raises(UserError, match="no model at nowhere/x, and nowhere is no recipe or model")
    with stage("distill", *given, "teacher=nowhere/x", "dry.json=plan.json") as config, nowhere:
        dry_run.run(config)
    assert json.loads(Path("plan.json").read_text())[0]["problems"]
