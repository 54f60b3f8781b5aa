"""Tokens a second of launch/tokenize_text.py with one and two processes, of the tokenizers library called directly, and of a stage
that reads text in data.train. All pairs are compared. Then: how long a training loop waits for samples.

python benchmarks/tokenize_text.py TOKENIZER_FOLDER FILE.jsonl.gz [--quick] [--json FILE]
"""

import gzip
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import Figure, parser, write

from minitron_mcore.config.model import ModelConfig
from minitron_mcore.config.stages import TokenizeTextRun
from minitron_mcore.data import datasets, token_cache, tokenizer
from minitron_mcore.data.corpus import Corpus
from minitron_mcore.data.token_files import sequence_lengths
from minitron_mcore.reporting import tables

STEP_SECONDS, STEPS = 0.1, 20


def measure(text: Path, folder: Path, work: Path) -> tuple[list[Figure], str]:
    """Speeds of all ways, each in a process of its own; and the prefix of one pair."""
    figures = []

    def timed(name: str, call: Callable[[], object]) -> None:
        if os.fork() == 0:
            start = time.perf_counter()
            call()
            (work / f"{name}.seconds").write_text(str(time.perf_counter() - start))
            os._exit(0)
        assert os.wait()[1] == 0

    def stage(processes: int) -> None:
        run = TokenizeTextRun(model=ModelConfig("x", str(folder)), files=[str(text)], processes=processes)
        run.out_dir = str(work / f"{processes}")
        Corpus(run, part_bytes=1 << 20).tokenize()

    def library() -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        backend = tokenizer.load(folder).backend
        rows = [json.loads(line)["text"] for line in text.open(encoding="utf-8")]
        for at in range(0, len(rows), 100):
            backend.encode_batch(rows[at : at + 100])

    def in_a_stage() -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        token_cache.tokenize([str(text)], tokenizer.load(folder), str(work / "cache"))

    timed("stage, 1 process", lambda: stage(1))
    timed("stage, 2 processes", lambda: stage(2))
    timed("data.train, 1 process, threads", in_a_stage)
    timed("encode_batch of tokenizers, threads", library)
    pairs = [next(path.with_suffix("") for path in (work / name).rglob("*.idx")) for name in ("1", "2", "cache")]
    for suffix in (".bin", ".idx"):
        assert len({pair.with_suffix(suffix).read_bytes() for pair in pairs}) == 1
    tokens = int(sequence_lengths(str(pairs[0])).sum())
    for path in sorted(work.glob("*.seconds")):
        speed = tokens / float(path.read_text())
        figures.append(Figure("tokenize_text", f"{tokens} tokens", path.stem, "speed", speed, "tokens/s"))
    return figures, str(pairs[0])


def waits(prefix: str, cache: str) -> list[Figure]:
    """Mean wait for a step's samples (8 micro-batches of 4 x 1024 tokens), between steps that take STEP_SECONDS."""
    figures = []
    order = datasets.SampleOrder([prefix], None, 1, 1024, 32 * STEPS)
    samples = datasets.Samples(order, cache, 1 << 24)
    for prefetch in (0, 1):
        batches = datasets.train_batches(
            samples, micro_batch_size=4, global_batch_size=32, num_samples=32 * STEPS, prefetch=prefetch
        )
        total = 0.0
        for step in range(STEPS):
            start = time.perf_counter()
            for _ in range(8):
                next(batches)
            total += time.perf_counter() - start if step else 0.0
            time.sleep(STEP_SECONDS)  # a GPU computes
        name = f"data.prefetch={prefetch}"
        figures.append(Figure("loader", "8 x 4 x 1024 tokens", name, "wait", total / (STEPS - 1) * 1e3, "ms a step"))
    return figures


def main() -> None:
    command = parser(__doc__)
    command.add_argument("tokenizer", type=Path)
    command.add_argument("text", type=Path)
    options = command.parse_args()
    work = Path(tempfile.mkdtemp())
    try:
        content = gzip.decompress(options.text.read_bytes())[: (8 if options.quick else 48) << 20]
        text = work / "text.jsonl"
        text.write_bytes(content[: content.rfind(b"\n") + 1])
        figures, prefix = measure(text, options.tokenizer, work)
        figures += waits(prefix, str(work / "cache"))
    finally:
        shutil.rmtree(work)
    tables.table("tokenisation and loader", [vars(figure) for figure in figures])
    write(figures, options.json)


if __name__ == "__main__":
    main()
