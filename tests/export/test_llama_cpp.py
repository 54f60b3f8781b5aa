"""GGUF files in llama.cpp itself: a failure means that it computes or serves another model than transformers does.

Skipped where llama-cpp-python is not installed (`pip install -c constraints.txt -e '.[llama]'` compiles it). After `make demo` the
distilled SmolLM2 and its held-out text are used; MINITRON_DEMO=/path names another folder of a demo. Without one, a random model.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_mcore.formats import gguf_tokenizer, gguf_writer
from minitron_mcore.formats.gguf_file import GGUFFile
from minitron_mcore.formats.hf_folder import HFFolder
from minitron_mcore.models import architecture
from tests.helpers import families, gguf_files, models
from tests.helpers.gguf_files import Q
from tests.helpers.launching import ROOT

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.slow
DEMO = Path(os.environ.get("MINITRON_DEMO", ROOT / "runs/demo"))
WINDOWS, LENGTH = 16, 256
F32 = dict(type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)


def llama(path: Path, length: int, **options):
    return llama_cpp.Llama(str(path), n_ctx=length, n_batch=length, n_threads=1, verbose=False, **options)


def with_tokenizer(folder: Path) -> Path:
    """Add a byte-level tokenizer to a tiny model."""
    given = gguf_files.write(folder / "given.gguf", folder, "llama", Q.F16, "smollm")
    gguf_tokenizer.read(GGUFFile(given, torch.float32)).save_pretrained(folder)
    return folder


def written(folder: Path, path: Path, matrices: str) -> Path:
    gguf_writer.write_file(path, architecture.read_hf(folder)[0], HFFolder(folder), folder, matrices, {})
    return path


SQUARE = gguf_files.SIZES | {"head_dim": 8}
TINY = {
    "llama31": gguf_files.SIZES,
    "mistral": gguf_files.SIZES,
    "qwen2": SQUARE,
    "qwen3": gguf_files.SIZES,
    "nemotron": SQUARE,
}


@pytest.mark.parametrize("which", TINY)
def test_logits_are_those_of_transformers(tmp_path, which):
    plain = families.tiny("llama32", tmp_path / "llama", **(gguf_files.SIZES | {"rope_parameters": families.PLAIN}))
    folder, ids = (
        families.tiny(which, tmp_path / "hf", **TINY[which]),
        models.tokens(1, 5 if which == "mistral" else 60),
    )
    for file in with_tokenizer(plain).glob("tokenizer*"):
        file.rename(folder / file.name)
    model = llama(written(folder, tmp_path / "model.gguf", "f32"), 64, logits_all=True, **F32)
    model.eval(ids[0].tolist())
    expected = models.hf_logits(folder, ids)[0]
    assert (torch.from_numpy(model.scores[: ids.shape[1]].copy()) - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> tuple[Path, Path, str]:
    """(Hugging Face folder, its file in f16, text)"""
    root = tmp_path_factory.mktemp("served")
    if (DEMO / "hf/config.json").is_file():
        folder = DEMO / "hf"
        text = "\n".join(json.loads(line)["text"] for line in (DEMO / "text/heldout.jsonl").read_text().splitlines())
    else:
        folder, text = (
            with_tokenizer(families.tiny("llama31", root / "hf", **gguf_files.SIZES)),
            (ROOT / "README.md").read_text(),
        )
    return folder, written(folder, root / "model.gguf", "f16"), text


def test_perplexity_is_that_of_transformers(served, capsys):
    folder, path, text = served
    model, theirs = (
        llama(path, LENGTH, logits_all=True),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    )
    ids = model.tokenize(text.encode(), add_bos=False)
    assert ids == AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
    windows = torch.tensor(ids[: WINDOWS * LENGTH]).view(-1, LENGTH)
    losses, seconds = {"llama.cpp": [], "transformers": []}, 0.0
    for window in windows:
        model.reset()
        start = time.perf_counter()
        model.eval(window.tolist())
        seconds += time.perf_counter() - start
        with torch.inference_mode():
            both = {"llama.cpp": torch.from_numpy(model.scores.copy()), "transformers": theirs(window[None]).logits[0]}
        for name, logits in both.items():
            losses[name].append(torch.nn.functional.cross_entropy(logits[:-1], window[1:]).item())
    perplexity = {name: float(np.exp(np.mean(found))) for name, found in losses.items()}
    model.reset()
    start = time.perf_counter()
    generated = list(zip(range(64), model.generate(ids[:32], temp=0.0), strict=False))
    decode = len(generated) / (time.perf_counter() - start)
    with capsys.disabled():
        print(
            f"\n{folder}: perplexity {perplexity}, prefill {windows.numel() / seconds:.0f} tokens/s, decode {decode:.0f} tokens/s"
        )
    assert abs(perplexity["llama.cpp"] / perplexity["transformers"] - 1) <= 0.01


@contextlib.contextmanager
def server(path: Path):
    """The address of an OpenAI-compatible server of the file."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(path), "--port", str(port), "--n_ctx", "256"]
    process = subprocess.Popen([*command, "--n_threads", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                ask(f"http://127.0.0.1:{port}/v1/models")
                break
            assert process.poll() is None, "the server ended"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def ask(url: str, **body) -> dict:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def test_a_server_answers(served):
    """Completions of a real model are transformers' greedy ones; a chat goes through the template in the file."""
    folder, path, _ = served
    tokenizer, prompt = AutoTokenizer.from_pretrained(folder), "The import statement is"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generated = theirs.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0)[0, ids.shape[1] :]
    expected = tokenizer.decode(generated, clean_up_tokenization_spaces=False)
    with server(path) as address:
        found = ask(f"{address}/v1/completions", prompt=prompt, max_tokens=8, temperature=0, repeat_penalty=1)
        chat = [{"role": "user", "content": "What is a module?"}]
        reply = ask(f"{address}/v1/chat/completions", messages=chat, max_tokens=8, temperature=0)
    assert found["usage"]["prompt_tokens"] == ids.shape[1]
    assert found["choices"][0]["text"] == expected or DEMO not in folder.parents  # random tokens need not be text
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert reply["usage"]["prompt_tokens"] == len(prompt) and "content" in reply["choices"][0]["message"]
