"""Perplexity and bits per byte on text, for any model that gives tokens a likelihood; and one from transformers."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minitron_mcore.checkpoint import run_folder
from minitron_mcore.config import ranges
from minitron_mcore.config.stages import EvaluateRun
from minitron_mcore.data.text_reader import Limits, documents, is_prefix
from minitron_mcore.data.tokenizer import Spans, Tokenizer, open_tokenizer
from minitron_mcore.distill.losses import FactoredLogits, LossConfig, distillation_loss
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.export import serving_compat
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.build import DTYPES, Model
from minitron_mcore.parallel import cpu_backend, process_groups
from minitron_mcore.parallel.schedule import forward

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region  # isort: skip

Nll = Callable[[Tensor, Tensor], Tensor]
"""(tokens [B, S], mask [B, S]) -> the sum, in nats, of -log p(tokens[b, s] | tokens[b, :s]) where the mask is True."""

_CHUNK_LOGITS = 2**25  # fp32 logits held at once: 128 MB


class Windows(NamedTuple):
    """A text cut into n windows of S tokens. `mask` names those predicted, each from what comes before it there."""

    tokens: Tensor
    """[n, S] int64"""
    mask: Tensor
    """[n, S] bool; False on each window's first token, on EOS and BOS that the text doesn't hold, and on padding"""
    num_bytes: Tensor
    """[n] int64, UTF-8 bytes of exactly the predicted tokens"""


def _token_bytes(text: str, spans: Spans) -> np.ndarray:
    """UTF-8 bytes [T] that each token stands for; their sum is the text's.

    Characters that no token covers count with the next one, or the last; a character split over tokens with one of them.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    utf8_ends = np.cumsum(np.concatenate([[0], 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)]))
    token_ends = np.maximum.accumulate(np.asarray(spans.ends, dtype=np.int64))
    text_tokens = np.flatnonzero(~np.asarray(spans.special, dtype=bool))
    if len(text_tokens):
        token_ends[text_tokens[-1] :] = len(text)
    return np.diff(utf8_ends[token_ends], prepend=0)


def windows(path: str, tokenizer: Tokenizer, sequence_length: int, limits: Limits | None = None) -> Windows:
    """The windows of a text file: its documents, each followed by EOS, as one stream that is cut every S tokens.

    The last window is padded with EOS. Windows without a token to predict are left out.

    Args:
        limits: of a document of text; None is the default ones.

    Raises:
        UserError: a file that is missing, not text, above the limits, or without a token to predict.
    """
    if is_prefix(path):
        raise UserError(f"{path} is a .bin/.idx pair, whose bytes of text are not known: evaluate on the text itself.")
    ids, predicted, sizes = [], [], []
    for texts, _ in documents(path, limits):
        for text, spans in zip(texts, tokenizer.spans(texts), strict=True):
            ids.append(np.asarray(spans.ids, dtype=np.int64))
            predicted.append(~np.asarray(spans.special, dtype=bool))
            sizes.append(_token_bytes(text, spans))

    def cut(pieces: list[np.ndarray], fill: int) -> Tensor:
        flat = np.concatenate(pieces)
        padded = np.pad(flat, (0, -len(flat) % sequence_length), constant_values=fill)
        return torch.from_numpy(padded).reshape(-1, sequence_length)

    if not ids:
        raise UserError(f"{path} holds no text.")
    tokens, mask, num_bytes = cut(ids, tokenizer.eos), cut(predicted, False), cut(sizes, 0)
    mask[:, 0] = False
    used = mask.any(dim=1)
    if not used.any():
        raise UserError(f"{path} holds no token to predict: windows of {sequence_length} need two tokens of text.")
    return Windows(tokens[used], mask[used], (num_bytes * mask).sum(dim=1)[used])


def evaluate_text(
    files: Sequence[str],
    tokenizer: Tokenizer,
    nll: Nll,
    *,
    sequence_length: int,
    limits: Limits | None = None,
    **how: Any,
) -> list[dict]:
    """How well `nll` predicts each text file: `evaluate_windows` of its `windows`, which raise what is wrong with it."""
    return evaluate_windows({path: windows(path, tokenizer, sequence_length, limits) for path in files}, nll, **how)


def evaluate_windows(
    cuts: Mapping[str, Windows],
    nll: Nll,
    *,
    micro_batch: int,
    max_windows: int | None = None,
    dp_rank: int = 0,
    dp_size: int = 1,
    group: dist.ProcessGroup | None = None,
) -> list[dict]:
    """How well `nll` predicts each file's windows: one row a file, the same on every rank (collective over `group`).

    Data-parallel rank r is given microbatches r, r + dp_size, ... as [micro_batch, S], all ranks equally many: the last
    are filled up with windows whose mask is all False. Ranks of one `dp_rank` work together in `nll` on the same ones.

    Args:
        max_windows: how many windows of each file to take, spread evenly over it; None takes all.
        group: the data-parallel group, where dp_size > 1.

    Returns:
        rows {file, tokens, bytes, loss, perplexity, bits_per_byte, tokens_per_second}: predicted tokens and their
        bytes, loss in nats a token, speed of all ranks together.
    """
    rows = []
    for path, (tokens, mask, num_bytes) in cuts.items():
        if max_windows is not None and len(tokens) > max_windows:
            kept = torch.arange(max_windows) * len(tokens) // max_windows
            tokens, mask, num_bytes = tokens[kept], mask[kept], num_bytes[kept]
        start = time.monotonic()
        total = _sum_nll(os.path.basename(path), tokens, mask, nll, micro_batch, dp_rank, dp_size)
        if dp_size > 1:
            dist.all_reduce(total, group=group)
        count, size = int(mask.sum()), int(num_bytes.sum())
        loss = float(total) / count
        rows.append(
            {
                "file": path,
                "tokens": count,
                "bytes": size,
                "loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),  # beyond, a float overflows
                "bits_per_byte": float(total) / math.log(2) / size,
                "tokens_per_second": count / (time.monotonic() - start),
            }
        )
    return rows


def _sum_nll(name: str, tokens: Tensor, mask: Tensor, nll: Nll, micro_batch: int, dp_rank: int, dp_size: int) -> Tensor:
    """This data-parallel rank's part of the sum, fp64."""
    rows = -len(tokens) % (micro_batch * dp_size)
    tokens, mask = F.pad(tokens, (0, 0, 0, rows)), F.pad(mask, (0, 0, 0, rows))
    total = torch.zeros((), dtype=torch.float64, device=process_groups.device())
    progress = process_groups.Progress(f"evaluate {name}", len(tokens), "windows")
    for start in range(0, len(tokens), micro_batch * dp_size):
        part = slice(start + dp_rank * micro_batch, start + (dp_rank + 1) * micro_batch)
        total += nll(tokens[part].to(total.device), mask[part].to(total.device))
        progress.update(start + micro_batch * dp_size)
    return total


class HFModel:
    """A Hugging Face folder in plain transformers (no remote code, safetensors only), on this rank's device.

    Raises:
        UserError: a folder without config or weights; weights that are cut short or lack a parameter; an architecture
            that transformers doesn't know or that changes its logits after the head.
    """

    def __init__(self, folder: str, dtype: torch.dtype = torch.float32):
        _check_folder(folder)
        # On a CPU torch's product over all experts refuses rows that are no multiple of 16 bytes.
        experts = "eager" if cpu_backend.is_cpu() else None
        model = serving_compat.load(folder, dtype=dtype, experts_implementation=experts)
        self.model = model.to(process_groups.device()).eval()
        self.vocab_size = model.get_input_embeddings().num_embeddings
        self.parameters = model.num_parameters()
        """Number of parameters; tied ones count once."""
        probe = torch.arange(1, 9, device=process_groups.device())[None]
        with torch.inference_mode():
            logits = self.model(probe, use_cache=False).logits
            if not torch.allclose(self._head(self._body(probe)), logits, rtol=0, atol=0, equal_nan=True):
                raise UserError(
                    f"{folder}: {model.config.model_type} changes its logits after the head; not supported here."
                )

    def _body(self, tokens: Tensor) -> Tensor:
        return self.model.base_model(tokens, use_cache=False).last_hidden_state

    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden)

    @torch.inference_mode()
    def nll(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """See `Nll`. Logits exist for the predicted tokens only, a chunk at a time; log-softmax is fp32."""
        predicted = mask[:, 1:]
        hidden, targets = self._body(tokens)[:, :-1][predicted], tokens[:, 1:][predicted]
        rows = max(1, _CHUNK_LOGITS // self.vocab_size)
        total = torch.zeros((), dtype=torch.float64, device=tokens.device)
        for chunk, target in zip(hidden.split(rows), targets.split(rows), strict=True):
            total += F.cross_entropy(self._head(chunk).float(), target, reduction="none").double().sum()
        return total


def _check_folder(folder: str) -> None:
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise UserError(f"{folder} is no Hugging Face folder: it has no config.json.")
    if not any(name.endswith(".safetensors") for name in os.listdir(folder)):
        raise UserError(f"{folder} has no weights: put its *.safetensors there.")


class ShardedModel:
    """A model in the running layout; each rank holds its shards. `parameters` counts the whole model."""

    def __init__(self, model: Model, arch: Architecture):
        self.model, self.arch, self.parameters = model, arch, parameter_table.count(arch)

    def nll(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """See `Nll`; collective over the ranks of a model replica, the same on all of them. Logits are never held."""
        total = torch.zeros((), dtype=torch.float64, device=tokens.device)
        labels = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1)
        predicted = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
        whole = {"tokens": tokens, "labels": labels, "predicted": predicted}

        def on_output(hidden: Tensor, batch: dict) -> None:
            if self.model.config.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden, group=process_groups.tp_group())
            _, sums = distillation_loss(
                FactoredLogits(hidden.flatten(0, 1), self.model.head()),
                None,
                batch["labels"].t().reshape(-1),
                batch["predicted"].t().reshape(-1).float(),
                vocab_size=self.arch.vocab,
                tp_group=process_groups.tp_group(),
                config=LossConfig(kd_weight=0.0, lm_weight=1.0),
            )
            total.add_(sums[1])

        # Cut into as many micro-batches as there are pipeline ranks, so that none of them waits for another.
        parts = zip(*(x.chunk(process_groups.pp_group().size()) for x in whole.values()), strict=True)
        forward(self.model, [dict(zip(whole, part, strict=True)) for part in parts], on_output)
        dist.all_reduce(total, group=process_groups.cp_group())
        return process_groups.from_last_stage(total)


def open_model(config: EvaluateRun) -> tuple[HFModel | ShardedModel, Tokenizer]:
    """What lies at `config.source`, with the tokenizer to read text with (collective).

    A checkpoint of ours is sharded over the layout, a Hugging Face folder whole on each rank.

    Raises:
        UserError: neither; a Hugging Face folder in a layout that shards models; see `open_tokenizer`.
    """
    source, parallel = config.source, config.parallel
    if os.path.isfile(os.path.join(source, "model.json")):
        found = run_folder.open_checkpoint(source)
        refuse(
            ranges.positions(
                "evaluate.sequence_length", config.evaluate.sequence_length, model=found.arch.max_positions
            )
        )
        with process_groups.raise_on_all_ranks():
            tokenizer = open_tokenizer(config.data, found.hf, found.arch.vocab)
        return ShardedModel(run_folder.build_model(found, parallel, config.dtype.value), found.arch), tokenizer
    if parallel.tensor * parallel.pipeline * parallel.context > 1:
        raise UserError(
            f"{source} is no checkpoint of ours, and transformers shards nothing: convert it, or use parallel=single."
        )
    model = HFModel(source, DTYPES[config.dtype.value])
    most = getattr(model.model.config, "max_position_embeddings", None)
    if most is not None and config.evaluate.sequence_length > most:
        raise UserError(
            f"evaluate.sequence_length is {config.evaluate.sequence_length}, but the model in {source} has {most} positions "
            f"(max_position_embeddings): give at most {most}."
        )
    with process_groups.raise_on_all_ranks():
        return model, open_tokenizer(config.data, source, model.vocab_size)


def evaluate_run(model: HFModel | ShardedModel, tokenizer: Tokenizer, config: EvaluateRun) -> list[dict]:
    """The rows of `evaluate_text` for a run's held-out files (collective).

    Raises:
        UserError: no held-out files; see `evaluate_text`.
    """
    if not config.data.heldout:
        raise UserError("data.heldout is empty: give text files, data.heldout=[a.jsonl,b.txt].")
    dp = process_groups.dp_group()
    return evaluate_text(
        config.data.heldout,
        tokenizer,
        model.nll,
        sequence_length=config.evaluate.sequence_length,
        limits=Limits.of(config.data),
        micro_batch=config.evaluate.micro_batch,
        max_windows=config.evaluate.max_windows,
        dp_rank=dp.rank(),
        dp_size=dp.size(),
        group=dp,
    )
