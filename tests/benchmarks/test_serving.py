"""Benchmarks of serving: a failure means that a rate is read wrongly, or that a ratio compares unequal work."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import serving  # noqa: E402
import throughput  # noqa: E402

VLLM = """When dataset path is not set, it will default to random dataset
Throughput: 12.34 requests/s, 3158.50 total tokens/s, 1579.25 output tokens/s
Total num prompt tokens:  32768
"""
TENSORRT_LLM = """===========================================================
= PERFORMANCE OVERVIEW
===========================================================
Request Throughput (req/sec):                     43.2089
Total Output Throughput (tokens/sec):             5530.7382
"""


def test_rates_are_read(tmp_path):
    """The documented outputs of `vllm bench throughput` and of trtllm-bench, older (0.17) and newer."""
    older = "Token Throughput (tokens/sec):  28390.4265\nRequest Throughput (req/sec):   221.8002\n"
    read = serving.requests_per_second
    assert read("vllm", VLLM) == 12.34
    assert read("tensorrt-llm", TENSORRT_LLM) == 43.2089 and read("tensorrt-llm", older) == 221.8002
    with pytest.raises(ValueError, match="trtllm-bench printed no throughput; the end of its output:\nout of memory"):
        read("tensorrt-llm", "out of memory")
    serving.write_requests(tmp_path / "requests", 7, 2, 9, 5)
    lines = [json.loads(line) for line in (tmp_path / "requests").read_text().splitlines()]
    assert len(lines) == 16 and all(len(x["input_ids"]) == 9 and max(x["input_ids"]) < 7 for x in lines)
    words = serving.command("vllm", Path("hf"), 64, 128, 2048, True, tmp_path)
    assert words[words.index("--max-num-seqs") + 1] == "64" and words[words.index("--max-model-len") + 1] == "2176"


def test_ratios_and_roofline():
    """Ratios compare the runs of one round, and stand beside the paper's. The roofline by hand: two reads of 8.03 G weights in FP8
    less the embedding table, and of 64 kB of keys and values for each of two tokens, at 3.35 TB/s."""
    rows = {
        "teacher": [(1, 3), (2, 6), (9, 27)],
        "width": [(0.5, 1.5), (1, 3), (3, 9)],
        "depth": [(1, 1), (2, 2), (9, 9)],
    }
    found = {(f.implementation, f.metric): f.value for f in throughput._figures("fp32, 1 + 1 tokens", rows)}
    assert (found["width", "ratio"], found["width", "lowest"], found["width", "highest"]) == (2, 2, 3)
    assert (found["depth", "prefill"], found["depth", "decode"], found["teacher", "rate"]) == (1, 3, 1 / 8)
    means = {row["of"]: row for row in throughput.mean_ratios(throughput.roofline_figures())}
    assert means["roofline, width"]["paper"] == 1.8 and means["roofline, depth"]["paper"] == 2.7
    weights, cache = 8_030_261_248 - 128_256 * 4096, 2 * 32 * 8 * 128
    seconds = 1 / throughput.roofline(throughput.shapes()["teacher"], 1, 1, 1)
    assert seconds == pytest.approx((2 * weights + 2 * cache) / 3.35e12, rel=1e-6)
