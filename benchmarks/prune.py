"""Llama-3.1-8B's shape from Hugging Face to a pruned Hugging Face folder: time over a plain copy of the same bytes, and memory.

Random bf16 weights and random scores (neither matters to time or memory), the width and depth plans of conf/prune, each stage
through its launch file in processes of its own, the long way at TP 1 and TP 2 and the direct way. Before each stage the same
number of bytes is read and written in blocks of 16 MiB, and synced; both start with the files they read out of the page cache.
Memory is the worst rank's: `anonymous` is what it allocated, `resident` counts the file pages mapped into it as well.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from common import Figure, parser, write
from rich.console import Console
from rich.table import Table

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.checkpoint.streaming import shard_slices
from minitron_mcore.formats.hf_folder import Writer
from minitron_mcore.importance.scores import Scores, expected_shapes, save_scores
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import from_hf

ROOT = Path(__file__).parents[1]
LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
SMALL = LLAMA_31_8B | {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 8, "vocab_size": 32064}
PLANS = {"width": ["prune=llama31_4b_width"], "depth": ["prune=llama31_4b_depth"]}
SMALL_PLANS = {"width": ["prune.hidden=768", "prune.ffn=2304"]}
PARAMETERS = {"width": 4_512_746_496, "depth": 4_540_469_248}
SPACE = 51e9  # bytes: the source, the checkpoint, and the pruned model three times over
BLOCK = 16 << 20


@dataclass(frozen=True)
class Measured:
    """Seconds of a stage, of its processors, and of the copy; bytes that the worst rank held."""

    seconds: float
    cpu: float
    anonymous: int
    resident: int
    copy: float = 0.0


def make_folder(folder: Path, config: dict) -> None:
    """A Hugging Face folder of random bf16 weights; no two tensors are the same stretch of the noise."""
    arch, start = from_hf(config), 0
    noise = (torch.randn(2**26, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def rows(parameter: parameter_table.Parameter) -> Iterator[Callable[[], torch.Tensor]]:
        nonlocal start
        for _, shape in shard_slices(parameter):
            start = (start + 1_000_003) % 2**25
            yield noise[start : start + torch.Size(shape).numel()].view(shape).clone

    folder.mkdir(parents=True)
    writer = Writer(folder, arch, dict.fromkeys(parameter_table.parameters(arch), torch.bfloat16))
    writer.write("source", rows)
    (folder / "config.json").write_text(json.dumps(config))
    writer.finish(folder)


def make_scores(checkpoint: Path, out_dir: Path) -> None:
    source, generator = open_checkpoint(checkpoint), torch.Generator().manual_seed(0)
    vectors = {name: torch.rand(shape, generator=generator) for name, shape in expected_shapes(source.arch).items()}
    out_dir.mkdir(exist_ok=True)
    save_scores(out_dir, Scores(vectors, {"fingerprint": source.fingerprint, "architecture": source.arch.digest()}))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def forget(files: list[Path]) -> None:
    """Put files out of the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(sources: list[Path], read: int, written: int, target: Path) -> float:
    """Seconds to read `read` bytes from the files, write `written` of them to one file, and sync it."""
    forget(sources)
    start = time.perf_counter()
    with target.open("wb", buffering=0) as out:
        for path in sources:
            with path.open("rb", buffering=0) as file:
                while read > 0 and (block := file.read(min(BLOCK, read))):
                    read -= len(block)
                    if written > 0:
                        written -= out.write(block[:written])
        os.fsync(out.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def run(stage: str, ranks: int, *options: str) -> Measured:
    """A launch file on that many ranks."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(ROOT / "launch" / f"{stage}.py"), *options]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    start, cpu, peaks = time.perf_counter(), _children_seconds(), {"RssAnon": 0, "VmHWM": 0}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watcher = threading.Thread(target=_watch, args=(process, peaks))
    watcher.start()
    output = process.communicate()[0]
    seconds = time.perf_counter() - start
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{output}")
    return Measured(seconds, _children_seconds() - cpu, peaks["RssAnon"], peaks["VmHWM"])


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _watch(process: subprocess.Popen, peaks: dict[str, int]) -> None:
    """Every 20 ms, the largest value among the process and its descendants (torchrun itself needs less than a rank)."""
    while process.poll() is None:
        try:
            family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        except psutil.NoSuchProcess:
            return
        for pid in family:
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            except OSError:  # gone meanwhile
                continue
            for line in lines:
                field = line.split(":")[0]
                if field in peaks:
                    peaks[field] = max(peaks[field], int(line.split()[1]) * 1024)
        time.sleep(0.02)


def measure(stage: str, ranks: int, source: Path, read: int, target: Path, written: int, *options: str) -> Measured:
    """A copy of the same bytes, then the stage; both read from disk."""
    files = [path for path in files_of(source) if path.stat().st_size > 4096]
    seconds = copy_seconds(files, read, written, target.parent / "copied")
    forget(files)
    return replace(run(stage, ranks, *options), copy=seconds)


def count_parameters(folder: Path) -> int:
    """Parameters of a folder as transformers loads it."""
    code = "import sys, torch, transformers as t; m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)"
    command = [sys.executable, "-c", f"{code}; print(m.num_parameters())", str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def ways(work: Path, config: dict, plans: dict, layouts: list[int]) -> Iterator[tuple[str, Measured]]:
    """Every stage with what it took. Folders go as soon as nothing reads them; the source stays for the next time."""
    source, full = work / "source", 2 * parameter_table.count(from_hf(config))
    model = ["+model=llama31_8b", "model.architecture=null", f"model.hf={source}", f"work_dir={work}"]
    for ranks in layouts:
        layout = [*model, f"parallel.tensor={ranks}"]
        yield f"convert tp{ranks}", measure("convert", ranks, source, full, work / "convert", full, *layout)
        make_scores(work / "convert", work / "importance")
        for plan, options in plans.items():
            run("plan", 1, *model, *options)
            target = 2 * json.loads((work / "plan/plan.json").read_text())["parameters"]["target"]
            read = target if plan == "depth" else full
            yield (
                f"prune {plan} tp{ranks}",
                measure("prune", ranks, work / "convert", read, work / "prune", target, *layout),
            )
            yield (
                f"export {plan} of tp{ranks}",
                measure("export", 1, work / "prune", target, work / "hf", target, *model, f"source={work}/prune"),
            )
            if (found := count_parameters(work / "hf")) != PARAMETERS.get(plan, target // 2) and config is LLAMA_31_8B:
                raise SystemExit(f"{work / 'hf'} holds {found} parameters, not {PARAMETERS[plan]}.")
            shutil.rmtree(work / "prune")
            yield f"cut {plan} for tp{ranks}", measure("cut", 1, source, full, work / "cut", target, *model)
            for path in (work / "hf").glob("*.safetensors"):
                subprocess.run(["cmp", path, work / "cut" / path.name], check=True)
            for folder in ("hf", "cut", "plan"):
                shutil.rmtree(work / folder)
        shutil.rmtree(work / "convert")
        shutil.rmtree(work / "importance")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--dir", type=Path, default=ROOT / "runs/bench_8b", help="a folder with 51 GB free")
    arguments.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="tensor-parallel sizes")
    options = arguments.parse_args()
    config, plans = (SMALL, SMALL_PLANS) if options.quick else (LLAMA_31_8B, PLANS)
    shape, layouts = ("small", [2]) if options.quick else ("llama31_8b", options.ranks)
    work = options.dir / shape
    work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work).free + sum(path.stat().st_size for path in files_of(work))
    if not options.quick and free < SPACE:
        print(
            f"skipped: {work} has {free / 1e9:.0f} GB free or for this, but the 8 B model needs {SPACE / 1e9:.0f} GB."
        )
        return
    if not (work / "source/config.json").is_file():
        make_folder(work / "source", config)
    figures, table_ = [], Table("", "time (s)", "copy (s)", "ratio", "CPU (s)", "anonymous (GiB)", "resident (GiB)")
    for stage, m in ways(work, config, plans, layouts):
        values = {
            "time": (m.seconds, "s"),
            "time_of_copy": (m.copy, "s"),
            "time_over_copy": (m.seconds / m.copy, "1"),
            "cpu_time": (m.cpu, "s"),
            "peak_anonymous": (m.anonymous / 2**30, "GiB"),
            "peak_resident": (m.resident / 2**30, "GiB"),
        }
        table_.add_row(stage, *(f"{value:.2f}" for value, _ in values.values()))
        print(stage, *(f"{name} {value:.2f} {unit}" for name, (value, unit) in values.items()), flush=True)
        figures += [Figure("prune", f"{shape} {stage}", "minitron", name, *value) for name, value in values.items()]
        write(figures, options.json)
    Console().print(table_)


if __name__ == "__main__":
    main()
