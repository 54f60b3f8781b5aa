"""The launch files as users type them: a failure means a spelling, a default or an error message broke."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
import yaml

from minitron_mcore.checkpoint import steps
from minitron_mcore.checkpoint.claim import claim_run_folder, new_run_folder
from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.cli import compose
from minitron_mcore.errors import UserError
from minitron_mcore.importance.scores import Scores, save_scores
from tests.helpers import models
from tests.helpers.cutting import random_scores
from tests.helpers.launching import ROOT, config_of, fork, identity_of, launch, plan, torchrun, word_tokenizer


def run_pipeline(cwd, *overrides, fails=False) -> str:
    command = [sys.executable, str(ROOT / "launch" / "pipeline.py"), *overrides]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=500)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def fork_pipeline(cwd, *overrides, fails=False) -> str:
    return fork(cwd, "pipeline", *overrides, fails=fails)


def claim(begin, out_dir, settings) -> None:
    with begin(out_dir, settings):
        pass


def test_distill_defaults_are_the_papers():
    """Llama-3.1-Minitron-4B: arXiv 2408.11796, table 4."""
    found = identity_of("distill", "+model=llama31_8b")
    expected = dict(
        peak_lr=1e-4, min_lr=1e-5, warmup_steps=40, global_batch=1152, sequence_length=8192, adam_beta1=0.9, adam_beta2=0.95,
        weight_decay=0.1, clip_grad=1.0, kd_weight=1.0, lm_weight=0.0, temperature=1.0,
    )  # fmt: skip
    assert expected.items() <= found["distill"].items()
    assert found["teacher"] == "runs/llama31_8b/convert"


@pytest.mark.parametrize("stage", compose.LAUNCH_FILES)
def test_every_stage_composes_and_is_short(stage):
    assert config_of(stage, "+model=smollm2_135m", "parallel=tp3").parallel.tensor == 3
    assert len((ROOT / "launch" / f"{stage}.py").read_text().splitlines()) < 50


def test_help_and_cfg_job(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for flags, expected in (
        (["--help"], "  prune: keep, llama31_4b_depth"),
        (["+model=llama31_8b", "--cfg", "job"], "hidden: null"),
    ):
        command = [sys.executable, str(ROOT / "launch" / "plan.py"), *flags]
        assert (
            expected
            in subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
        )


def test_typos_are_caught_at_compose_time():
    with pytest.raises(Exception, match="warmup"):
        identity_of("distill", "+model=smollm2_135m", "distill.warmup=3")


def test_missing_weights_are_one_sentence(tmp_path):
    output = fork(tmp_path, "convert", "+model=llama31_8b", processes=2, fails=True)
    sentences = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(sentences) == 1 and "Llama-3.1-8B" in sentences[0] and "model.hf=" in sentences[0]


def test_missing_checkpoint_is_one_sentence(tmp_path):
    output = fork(tmp_path, "distill", "+model=llama31_8b", fails=True)
    assert "error: no checkpoint at runs/llama31_8b/prune" in output and "student=/path" in output


@pytest.mark.parametrize("stage", ["importance", "distill", "evaluate"])
def test_sequences_that_ranks_cannot_share_are_refused(tmp_path, stage):
    layout = ["parallel=tp3", "parallel.sequence=true", f"{stage}.sequence_length=511"]
    output = fork(tmp_path, stage, "+model=smollm2_135m", *layout, processes=3, fails=True)
    assert (
        output.count("error: sequence_length 511 cannot be shared by parallel.tensor 3") == 1 and "give 513" in output
    )


@pytest.mark.default_cases("forked")
@pytest.mark.parametrize("starts", ["forked", "torchrun"])
def test_whole_way_on_two_ranks(tmp_path, monkeypatch, starts):
    """Hugging Face in, smaller Hugging Face out, through the pipeline and every launch file; then against the wrong things."""
    pipeline, start = (fork_pipeline, fork) if starts == "forked" else (run_pipeline, launch)
    models.tiny_llama(tmp_path / "hf")
    word_tokenizer(tmp_path / "hf")
    g = torch.Generator().manual_seed(0)
    lines = [{"text": " ".join(f"w{i}" for i in torch.randint(2, 101, (40,), generator=g).tolist())} for _ in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    small = dict(steps=4, global_batch=4, sequence_length=16, warmup_steps=1, log_every=1)
    command = [
        *("+model=smollm2_135m", "model.name=tiny", "model.hf=hf", "model.architecture=null", "dtype=fp32"),
        *("parallel=tp2", "data.train=[text.jsonl]", "data.heldout=[text.jsonl]", "prune.hidden=24", "prune.ffn=18"),
        *("importance.samples=8", "importance.sequence_length=16", "evaluate.sequence_length=32"),
        *(f"{section}.{key}={value}" for section in ("correct", "distill") for key, value in small.items()),
        "recipe.teacher=${work_dir}/correct",
    ]
    stopped = pipeline(tmp_path, *command, "processes=2", "distill.stop_after=2", fails=True)
    assert "error: minitron distill stopped before its end: the same command resumes" in stopped
    assert "stage 4 of 8: prune\n$ minitron prune --nproc 2 model=smollm2_135m" in stopped
    output = pipeline(tmp_path, *command, "processes=2")
    assert "resuming after step 2" in output and "bits per byte" in output and "minitron correct" not in output

    run = tmp_path / "runs/tiny"
    config = json.loads((run / "hf/config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"], config["head_dim"]) == (24, 18, 8)
    assert len((run / "distill/metrics.jsonl").read_text().splitlines()) == 4
    correct = open_checkpoint(run / "correct")
    assert open_checkpoint(run / "distill").lineage["parents"]["teacher"]["fingerprint"] == correct.fingerprint
    assert correct.lineage["parents"]["student"]["fingerprint"] == open_checkpoint(run / "convert").fingerprint
    corrected = [json.loads(line) for line in (run / "correct/metrics.jsonl").read_text().splitlines()]
    assert [row["kd_loss"] for row in corrected] == [0] * 4 and all(row["lm_loss"] > 0 for row in corrected)
    assert yaml.safe_load((run / "plan/config.yaml").read_text())["prune"]["hidden"] == 24
    assert (run / "importance/importance.png").stat().st_size > 10_000
    card = (run / "hf/README.md").read_text()
    assert f"Weights `{correct.fingerprint}`" in card and f"distilled from teacher `{correct.fingerprint}`" in card
    page = (run / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 4 and correct.fingerprint in page  # scores, plan, two trainings
    assert "decoder.layers.*.mlp.linear_fc1.weight" in stopped and "report: runs/tiny/report.html" in output
    assert "transformers loads" in output and "LlamaForCausalLM" in output
    generate = [*command, "prompt='w5 w6'", "tokens=3", "text_file=continuation.txt"]
    assert "w5 w6 w" in start(tmp_path, "generate", *generate, processes=2)
    assert (tmp_path / "continuation.txt").read_text().startswith("w5 w6 w")

    with pytest.raises(UserError, match="already holds a finished run"):
        claim(new_run_folder, run / "convert", identity_of("convert", *command))
    with pytest.raises(UserError, match="holds another run .distill.peak_lr was 0.0001, is 0.001.: give the old"):
        claim(claim_run_folder, run / "distill", identity_of("distill", *command, "distill.peak_lr=1e-3"))
    assert steps.published(run / "distill")
    foreign = Scores(random_scores(open_checkpoint(run / "prune").arch).vectors, {"fingerprint": "another"})
    (tmp_path / "foreign").mkdir()
    save_scores(tmp_path / "foreign", foreign)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="belong to model another"):
        plan(*command, "scores=foreign", "out_dir=p2")
    with pytest.raises(UserError, match="parallel.tensor 2 does not divide ffn 17 .next: 18."):
        plan(*command, "out_dir=p3", "prune.ffn=17")
    assert not (tmp_path / "p2").exists()


FAILING = """
import torch.distributed as dist
from minitron_mcore.errors import UserError
from minitron_mcore.cli.main import entry

@entry("convert")
def main(config):
    from minitron_mcore.parallel import process_groups
    with process_groups.distributed_context(config.parallel):
        if process_groups.rank() == 1:
            open("raised", "w").close()
            raise {error}("no such thing")
        dist.distributed_c10d._get_default_store().wait(["never"])  # as NCCL waits, without an error when a rank is gone

main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "expected"), [("UserError", "error: rank 1: no such thing"), ("KeyError", "rank 1 failed:\n")]
)
def test_a_rank_that_fails_alone_is_heard(tmp_path, error, expected):
    script = tmp_path / "fail.py"
    script.write_text(FAILING.format(error=error))
    output = torchrun(tmp_path, script, "+model=smollm2_135m", processes=3, fails=True)
    # With the end of all processes, before torchrun kills ranks that wait in C++, after 30 s.
    assert time.time() - (tmp_path / "raised").stat().st_mtime < 20
    assert output.count(expected) == 1 and output.count("no such thing") == (1 if error == "UserError" else 2), output
