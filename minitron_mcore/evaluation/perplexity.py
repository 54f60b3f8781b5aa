"""Perplexity and bits per byte on text, of sharded checkpoints and of Hugging Face folders."""

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minitron_mcore.checkpoint import run_folder
from minitron_mcore.config import ranges
from minitron_mcore.config.stages import EvaluateRun
from minitron_mcore.data.loss_mask import loss_mask
from minitron_mcore.data.text_reader import Limits, documents, is_prefix
from minitron_mcore.data.tokenizer import Spans, Tokenizer, open_tokenizer
from minitron_mcore.distill.losses import FactoredLogits, LossConfig, distillation_loss
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.export import transformers_check
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.build import DTYPES, Model
from minitron_mcore.parallel import hang_watchdog, process_groups, stop_signal
from minitron_mcore.parallel.hang_watchdog import Phase
from minitron_mcore.parallel.megatron_patches import cpu_backend
from minitron_mcore.parallel.schedule import forward

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region  # isort: skip

Nll = Callable[[Tensor, Tensor], Tensor]
"""(tokens [B, S], mask [B, S]) -> the sum, in nats, of -log p(tokens[b, s] | tokens[b, :s]) where the mask is True."""

_CHUNK_LOGITS = 2**25  # fp32 logits held at once: 128 MB


class Windows(NamedTuple):
    """A text as n windows of S tokens. Each token where `mask` is True is predicted from the tokens before it in its window."""

    tokens: Tensor
    """[n, S] int64"""
    mask: Tensor
    """[n, S] bool; False on the first token of a window, on added EOS and BOS, on padding, and where a token does not count"""
    num_bytes: Tensor
    """[n] int64, UTF-8 bytes of the predicted tokens"""


def _token_bytes(text: str, spans: Spans) -> np.ndarray:
    """UTF-8 bytes of each token [T]; the sum is that of the text.

    Characters without a token count for the next token, or for the last one. A character split over tokens counts for one of them.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    utf8_ends = np.cumsum(np.concatenate([[0], 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)]))
    token_ends = np.maximum.accumulate(np.asarray(spans.ends, dtype=np.int64))
    text_tokens = np.flatnonzero(~np.asarray(spans.special, dtype=bool))
    if len(text_tokens):
        token_ends[text_tokens[-1] :] = len(text)
    return np.diff(utf8_ends[token_ends], prepend=0)


def windows(path: str, tokenizer: Tokenizer, sequence_length: int, limits: Limits | None = None) -> Windows:
    """The windows of a text file: its documents, each followed by EOS, as one stream that is split every S tokens.

    The last window is padded with EOS. Windows without a predicted token are dropped.

    Args:
        limits: on documents; None for the default.

    Raises:
        UserError: the file is missing, not text, above the limits, or has no token to predict.
    """
    if is_prefix(path):
        raise UserError(
            f"{path} is a .bin/.idx pair, which does not store the bytes of the text: evaluate on the text itself."
        )
    ids, predicted, sizes = [], [], []
    for texts, _ in documents(path, limits):
        for text, spans in zip(texts, tokenizer.spans(texts), strict=True):
            ids.append(np.asarray(spans.ids, dtype=np.int64))
            predicted.append(~np.asarray(spans.special, dtype=bool) & (loss_mask(text, spans) > 0))
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


def spread(windows: Windows, limit: int | None) -> Windows:
    """At most `limit` of the windows, spread evenly over the text; None keeps all."""
    count = len(windows.tokens)
    if limit is None or count <= limit:
        return windows
    kept = torch.arange(limit) * count // limit
    return Windows(*(column[kept] for column in windows))


def evaluate_windows(
    cuts: Mapping[str, Windows],
    nll: Nll,
    *,
    micro_batch: int,
    max_windows: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> list[dict[str, Any]]:
    """Loss, perplexity and bits per byte of each file's windows; the same on every rank (collective over `group`).

    Rank r of the group's n evaluates micro-batches r, r + n, ... as [micro_batch, S]. All ranks have the same number; the last are
    padded with windows whose mask is False.

    Args:
        cuts: file -> its windows.
        max_windows: per file, spread evenly over it; None for all.
        group: the data-parallel group; None for one process.

    Returns:
        One row per file {file, tokens, bytes, loss, perplexity, bits_per_byte, tokens_per_second}: predicted tokens and their
        bytes, loss in nats per token, speed of all ranks together.
    """
    rows = []
    for path, file_windows in cuts.items():
        tokens, mask, num_bytes = spread(file_windows, max_windows)
        start = time.monotonic()
        total = _sum_nll(os.path.basename(path), tokens, mask, nll, micro_batch, group)
        count, size = int(mask.sum()), int(num_bytes.sum())
        loss = float(total) / count
        rows.append(
            {
                "file": path,
                "tokens": count,
                "bytes": size,
                "loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),  # avoids an overflow
                "bits_per_byte": float(total) / math.log(2) / size,
                "tokens_per_second": count / (time.monotonic() - start),
            }
        )
    return rows


def _sum_nll(
    name: str, tokens: Tensor, mask: Tensor, nll: Nll, micro_batch: int, group: dist.ProcessGroup | None
) -> Tensor:
    """Sum over all windows, fp64 (collective over `group`)."""
    rank, size = (group.rank(), group.size()) if group else (0, 1)
    padding = -len(tokens) % (micro_batch * size)
    tokens, mask = F.pad(tokens, (0, 0, 0, padding)), F.pad(mask, (0, 0, 0, padding))
    total = torch.zeros((), dtype=torch.float64, device=process_groups.device())
    progress = process_groups.Progress(f"evaluate {name}", len(tokens), "windows")
    with (
        stop_signal.at_stop_points(resumes=False),
        hang_watchdog.phase(Phase.step, lambda: f"the evaluation of {name}"),
    ):
        for start in range(0, len(tokens), micro_batch * size):
            stop_signal.stop_point(f"in the evaluation of {name} after {start} of {len(tokens)} windows")
            part = slice(start + rank * micro_batch, start + (rank + 1) * micro_batch)
            total += nll(tokens[part].to(total.device), mask[part].to(total.device))
            progress.update(start + micro_batch * size)
    if size > 1:
        dist.all_reduce(total, group=group)
    return total


class HFModel:
    """A Hugging Face folder in transformers (no remote code, safetensors only), unsharded on this rank's device.

    Raises:
        UserError: the folder has no config or no weights; weights are truncated or incomplete; transformers does not support the
            architecture, or it transforms logits after the head.
    """

    def __init__(self, folder: str, dtype: torch.dtype = torch.float32):
        _check_folder(folder)
        # On a CPU torch's grouped product over experts requires rows of a multiple of 16 bytes.
        experts = "eager" if cpu_backend.is_cpu() else None
        model = transformers_check.load(folder, dtype=dtype, experts_implementation=experts)
        self.model = model.to(process_groups.device()).eval()
        self.vocab_size = model.get_input_embeddings().num_embeddings
        self.parameters = model.num_parameters()
        """Number of parameters; tied ones count once."""
        probe = torch.arange(1, 9, device=process_groups.device())[None]
        with torch.inference_mode():
            logits = self.model(probe, use_cache=False).logits
            if not torch.allclose(self._head(self._body(probe)), logits, rtol=0, atol=0, equal_nan=True):
                raise UserError(
                    f"{folder}: {model.config.model_type} changes its logits after the head, which is not supported."
                )

    def _body(self, tokens: Tensor) -> Tensor:
        return self.model.base_model(tokens, use_cache=False).last_hidden_state

    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden)

    @torch.inference_mode()
    def nll(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """See `Nll`. Logits are computed for predicted tokens only, in chunks; log-softmax is fp32."""
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
    """A sharded model; each rank holds its shards. `parameters` counts the whole model."""

    def __init__(self, model: Model, arch: Architecture):
        self.model, self.arch, self.parameters = model, arch, parameter_table.count(arch)

    def nll(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """See `Nll`; collective over the ranks of a model replica, the same on all of them. Full logits are never in memory."""
        total = torch.zeros((), dtype=torch.float64, device=tokens.device)
        labels = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1)
        predicted = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
        whole = {"tokens": tokens, "labels": labels, "predicted": predicted}

        def on_output(hidden: Tensor, batch: dict[str, Any]) -> None:
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

        # One micro-batch per pipeline rank fills the pipeline.
        parts = zip(*(x.chunk(process_groups.pp_group().size()) for x in whole.values()), strict=True)
        forward(self.model, [dict(zip(whole, part, strict=True)) for part in parts], on_output)
        dist.all_reduce(total, group=process_groups.cp_group())
        return process_groups.from_last_stage(total)


def open_model(config: EvaluateRun) -> tuple[HFModel | ShardedModel, Tokenizer]:
    """The model at `config.source` and its tokenizer (collective).

    A checkpoint of this package is sharded over the layout; a Hugging Face folder is loaded whole on each rank.

    Raises:
        UserError: the source is neither; a Hugging Face folder in a layout that shards models; see `open_tokenizer`.
    """
    source, parallel = config.source, config.parallel
    if os.path.isfile(os.path.join(source, "model.json")):
        checkpoint = run_folder.open_checkpoint(source, step=config.step)
        arch, length = checkpoint.arch, config.evaluate.sequence_length
        refuse(ranges.positions("evaluate.sequence_length", length, model=arch.max_positions))
        with process_groups.raise_on_all_ranks():
            tokenizer = open_tokenizer(config.data, checkpoint.hf, arch.vocab)
        return ShardedModel(run_folder.build_model(checkpoint, parallel, config.dtype.value), arch), tokenizer
    if parallel.tensor * parallel.pipeline * parallel.context > 1:
        raise UserError(
            f"{source} is a Hugging Face folder, which cannot be sharded: convert it, or use parallel=single."
        )
    model = HFModel(source, DTYPES[config.dtype.value])
    limit = getattr(model.model.config, "max_position_embeddings", None)
    refuse(ranges.positions("evaluate.sequence_length", config.evaluate.sequence_length, model=limit))
    with process_groups.raise_on_all_ranks():
        return model, open_tokenizer(config.data, source, model.vocab_size)


def evaluate_run(model: HFModel | ShardedModel, tokenizer: Tokenizer, config: EvaluateRun) -> list[dict[str, Any]]:
    """`evaluate_windows` of a run's held-out files (collective).

    Raises:
        UserError: data.heldout is empty; see `windows`.
    """
    refuse(ranges.text_files("data.heldout", config.data.heldout))
    settings, limits = config.evaluate, Limits.of(config.data)
    return evaluate_windows(
        {path: windows(path, tokenizer, settings.sequence_length, limits) for path in config.data.heldout},
        model.nll,
        micro_batch=settings.micro_batch,
        max_windows=settings.max_windows,
        group=process_groups.dp_group(),
    )
