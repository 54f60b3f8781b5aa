"""The GPU campaign: every check and every timing that needs a card, as blocks with a time limit each.

    python benchmarks/gpu/run.py verify   --out DIR [--part build/gpu/part1]
    python benchmarks/gpu/run.py recovery --out DIR [--part build/gpu/part3]
    python benchmarks/gpu/run.py verify   --out DIR --cpu     the same blocks at toy size, without a GPU

Each block is a process with a time limit, so a failure or a hang affects that block only. Blocks that only check results run side
by side; blocks that measure time then run one at a time. The result files are rewritten after every block:

    NAME.jsonl   a line of environment (card, driver, versions, commit), a line a block, then the figures of all benchmarks
    NAME.txt     the table that is printed last
    logs.txt     the blocks' output

The exit status is the number of blocks that did not pass.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
CAMPAIGN = Path(tempfile.gettempdir()) / "minitron-campaign"
"""Where parts are unpacked: site/ and engine/ hold packages, the rest is recovery's data."""
PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "transformers",
    "transformer-engine",
    "apex",
    "liger-kernel",
    "nvidia-modelopt",
)


@dataclass(frozen=True)
class Block:
    name: str
    command: str
    """Words after `python`; {json}, {out} and {data} are filled in."""
    seconds: int
    """Time limit on a GPU."""
    alone: bool = True
    """It measures time: nothing runs beside it."""
    engine: bool = False
    """With Transformer Engine on the path; skipped where none was packed or installed."""
    on_cpu: str | None = ""
    """More words on a CPU; None skips the block there."""


TESTS = "-m pytest -v -m gpu --timeout 90 --durations 5 --tb short -p benchmarks.gpu.failures_at_once --dist loadfile tests/gpu"
CAMPAIGNS = {
    "verify": [
        Block("tests", f"{TESTS} -n 8", 120, alone=False, on_cpu="--on-cpu -n 0 -k equals"),
        # In fp32 its products are TF32 and megatron-core's router takes them too, so the other tests run without it.
        Block("engine tests", f"{TESTS}/test_transformer_engine.py", 90, alone=False, engine=True, on_cpu=None),
        Block("kd_loss", "benchmarks/kd_loss.py --quick --json {json}", 100, on_cpu="--tokens 64"),
        Block("attention", "benchmarks/attention.py --quick --json {json}", 60),
        Block("step", "benchmarks/distill_step.py --quick --kernels --json {json}", 100, on_cpu="--toy"),
        Block("engine step", "benchmarks/distill_step.py --quick --kernels --json {json}", 100, engine=True, on_cpu=None),
    ],
    "recovery": [
        Block("recovery", "benchmarks/recovery.py --data {data} --json {json}", 540, on_cpu="--quick"),
    ],
    "unpack": [],
}  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("campaign", choices=CAMPAIGNS)
    options.add_argument("--out", type=Path, required=True, help="folder of the results")
    options.add_argument("--part", type=Path, help="folder of pack.py's pieces to unpack first")
    options.add_argument("--only", default="", help="names of blocks, separated by semicolons")
    options.add_argument("--seconds", type=float, default=540, help="limit of the whole campaign")
    options.add_argument("--commit", help="that runs, where the copy of the tree has no history")
    options.add_argument("--cpu", action="store_true", help="toy sizes, without a GPU")
    options = options.parse_args()
    deadline = time.monotonic() + options.seconds
    if options.part:
        unpack(options.part)
    blocks = [
        block for block in CAMPAIGNS[options.campaign] if not options.only or block.name in options.only.split(";")
    ]
    results = Results(options.out, options.campaign, [environment(options)])
    together = [block for block in blocks if options.cpu or not block.alone]
    for group in [together, *([block] for block in blocks if block not in together)]:
        running = [Running(block, options, deadline) for block in group]
        for each in running:
            results.add(each.block, *each.wait())
    print(results.table())
    sys.exit(results.failed)


def unpack(part: Path) -> None:
    """Append the part's pieces to their archives, and unpack those that are whole."""
    CAMPAIGN.mkdir(exist_ok=True)
    for piece in sorted(part.iterdir()):
        with (CAMPAIGN / f"{piece.stem}.tar.xz").open("ab") as archive, piece.open("rb") as source:
            shutil.copyfileobj(source, archive)
    for archive in CAMPAIGN.glob("*.tar.xz"):
        try:
            with tarfile.open(archive) as file:
                file.extractall(CAMPAIGN, filter="tar")
        except (EOFError, tarfile.ReadError):  # its other pieces are in another part
            continue
        archive.unlink()


class Running:
    """A block's process, or the reason why it was not started."""

    def __init__(self, block: Block, options: argparse.Namespace, deadline: float):
        self.block, self.start = block, time.monotonic()
        self.limit = min(self.start + block.seconds, deadline)
        self.folder = Path(tempfile.mkdtemp(prefix="block-"))
        self.log, self.json = (self.folder / name for name in ("log", "figures.jsonl"))
        self.skipped, paths = "", [CAMPAIGN / "site", ROOT]
        if block.engine:
            paths.insert(0, CAMPAIGN / "engine")
        if options.cpu and block.on_cpu is None:
            self.skipped = "needs a GPU"
        elif block.engine and not (CAMPAIGN / "engine").is_dir():
            self.skipped = "Transformer Engine was not packed"
        elif deadline - self.start < 5:
            self.skipped = "no time was left"
        if self.skipped:
            return
        words = block.command.format(json=self.json, out=options.out, data=CAMPAIGN).split()
        words += (block.on_cpu or "").split() if options.cpu else []
        env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONUNBUFFERED": "1"}
        env |= {"CUDA_VISIBLE_DEVICES": ""} if options.cpu else {}
        self.process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=env, stdout=self.log.open("w"), stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def wait(self) -> tuple[str, float, str, list[dict]]:
        """(verdict, seconds, output, figures)."""
        if self.skipped:
            return f"skipped: {self.skipped}", 0.0, "", []
        try:
            status = self.process.wait(max(0.0, self.limit - time.monotonic()))
            verdict = "passed" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGINT)  # pytest then prints its summary
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            verdict = f"stopped after {self.limit - self.start:.0f} s"
        figures = [json.loads(line) for line in self.json.read_text().splitlines()] if self.json.is_file() else []
        return verdict, time.monotonic() - self.start, self.log.read_text(errors="replace"), figures


class Results:
    """What came out so far, written anew after each block."""

    def __init__(self, out: Path, name: str, lines: list[dict]):
        self.out, self.name, self.lines, self.rows, self.logs = out, name, lines, [], []
        self.failed = 0
        out.mkdir(parents=True, exist_ok=True)

    def add(self, block: Block, verdict: str, seconds: float, log: str, figures: list[dict]) -> None:
        self.failed += not verdict.startswith(("passed", "skipped"))
        self.lines += [{"block": block.name, "verdict": verdict, "seconds": round(seconds, 1)}, *figures]
        last = next((line for line in reversed(log.splitlines()) if line.strip()), "")
        self.rows.append((block.name, verdict, f"{seconds:.0f} s", last[:100]))
        self.logs.append(f"===== {block.name}: {verdict}\n{log}\n")
        print(f"{block.name}: {verdict}, {seconds:.0f} s", flush=True)
        (self.out / f"{self.name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        (self.out / f"{self.name}.txt").write_text(self.table() + "\n")
        (self.out / "logs.txt").write_text("".join(self.logs))

    def table(self) -> str:
        """Blocks, then every figure."""
        widths = [max(len(row[n]) for row in self.rows) for n in range(3)] if self.rows else []
        rows = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)) for row in self.rows
        ]
        figures = [
            f"{line['benchmark']:14} {line['case']:40} {line['implementation']:32} {line['metric']:24} "
            f"{line['value']:12.5g} {line['unit']}"
            for line in self.lines
            if "metric" in line
        ]
        return "\n".join([json.dumps(self.lines[0]), *figures, *rows])


def environment(options: argparse.Namespace) -> dict:
    """The card, its driver, versions of what matters, the commit."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    found = {"date": time.strftime("%Y-%m-%d"), "card": "none" if options.cpu else _output(query) or "unknown"}
    found |= {
        "commit": options.commit or _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]) or "unknown"
    }
    found |= {"python": sys.version.split()[0]}
    path = [*map(str, (CAMPAIGN / "site", CAMPAIGN / "engine")), *sys.path]
    for name in PACKAGES:
        distribution = next(iter(metadata.distributions(name=name, path=path)), None)
        found[name] = distribution.version if distribution else None
    return {"environment": found}


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    main()
