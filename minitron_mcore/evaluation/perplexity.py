"""Perplexity and bits per byte on text, of sharded checkpoints and of Hugging Face folders."""

import itertools
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minitron_mcore.checkpoint import run_folder
from minitron_mcore.config import ranges
from minitron_mcore.config.stages import EvaluateRun
from minitron_mcore.data.tokenizer import Tokenizer, open_tokenizer
from minitron_mcore.distill import checks
from minitron_mcore.distill.loss_fn import LossFunction
from minitron_mcore.distill.losses import FactoredLogits, LossConfig, distillation_loss
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.evaluation.windows import Windows, heldout_windows, spread
from minitron_mcore.export import transformers_check
from minitron_mcore.models import parameter_table, tuning
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.build import DTYPES, Model
from minitron_mcore.parallel import hang_watchdog, process_groups, stop_signal
from minitron_mcore.parallel.hang_watchdog import Phase
from minitron_mcore.parallel.megatron_patches import cpu_backend
from minitron_mcore.parallel.schedule import forward

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region  # isort: skip

Nll = Callable[..., Tensor]
"""(tokens [B, S], mask [B, S] and, if the windows have them, document starts [B, S]) -> the sum [], in nats, of
-log p(tokens[b, s] | tokens[b, :s]) where the mask is True; or [2] with the sum of the divergences from a teacher."""

_CHUNK_LOGITS = 2**25  # fp32 logits held at once: 128 MB


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
        bytes (None if they are not known), loss in nats per token, speed of all ranks together; with a teacher also "kl", its
        divergence in nats per token.
    """
    rows = []
    for path, file_windows in cuts.items():
        kept = spread(file_windows, max_windows)
        start, count = time.monotonic(), int(kept.mask.sum())
        size = None if kept.num_bytes is None else int(kept.num_bytes.sum())
        total, *divergence = _sum_nll(os.path.basename(path), kept, nll, micro_batch, group).reshape(-1).tolist()
        loss = total / count
        rows.append(
            {
                "file": path,
                "tokens": count,
                "bytes": size,
                "loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),  # avoids an overflow
                "bits_per_byte": size and total / math.log(2) / size,
                "tokens_per_second": count / (time.monotonic() - start),
            }
            | ({"kl": divergence[0] / count} if divergence else {})
        )
    return rows


def _sum_nll(name: str, windows: Windows, nll: Nll, micro_batch: int, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over all windows, fp64 (collective over `group`)."""
    rank, size = (group.rank(), group.size()) if group else (0, 1)
    whole = [x for x in (windows.tokens, windows.mask, windows.document_starts) if x is not None]
    padded = [F.pad(column, (0, 0, 0, -len(column) % (micro_batch * size))) for column in whole]
    total = torch.zeros((), dtype=torch.float64, device=process_groups.device())
    count = len(padded[0])
    progress = process_groups.Progress(f"evaluate {name}", count, "windows")
    with (
        stop_signal.at_stop_points(resumes=False),
        hang_watchdog.phase(Phase.step, lambda: f"the evaluation of {name}"),
    ):
        for start in range(0, count, micro_batch * size):
            stop_signal.stop_point(f"in the evaluation of {name} after {start} of {count} windows")
            part = slice(start + rank * micro_batch, start + (rank + 1) * micro_batch)
            total = total + nll(*(column[part].to(total.device) for column in padded))
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
        check_folder(folder)
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

    def _body(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.model.base_model(tokens, position_ids=positions, use_cache=False).last_hidden_state

    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden)

    @torch.inference_mode()
    def nll(self, tokens: Tensor, mask: Tensor, document_starts: Tensor | None = None) -> Tensor:
        """See `Nll`. Logits are computed for predicted tokens only, in chunks; log-softmax is fp32."""
        predicted, positions = mask[:, 1:], None
        if document_starts is not None:  # from positions that begin anew transformers masks other documents
            positions = torch.arange(tokens.shape[1], device=tokens.device) - document_starts
        hidden, targets = self._body(tokens, positions)[:, :-1][predicted], tokens[:, 1:][predicted]
        rows = max(1, _CHUNK_LOGITS // self.vocab_size)
        total = torch.zeros((), dtype=torch.float64, device=tokens.device)
        for chunk, target in zip(hidden.split(rows), targets.split(rows), strict=True):
            total += F.cross_entropy(self._head(chunk).float(), target, reduction="none").double().sum()
        return total


def check_folder(folder: str) -> None:
    """Refuse what is no Hugging Face folder with weights in safetensors."""
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise UserError(f"{folder} is no Hugging Face folder: it has no config.json.")
    if not any(name.endswith(".safetensors") for name in os.listdir(folder)):
        raise UserError(f"{folder} has no weights: put its *.safetensors there.")


class ShardedModel:
    """A sharded model; each rank holds its shards. `parameters` counts the whole model."""

    def __init__(self, model: Model, arch: Architecture, loss_fn: LossFunction | None = None):
        """`loss_fn`: of the training of `model`, whose live teacher's divergence KL(teacher || model) is to be measured too."""
        self.model, self.arch, self.parameters = model, arch, parameter_table.count(arch)
        self.loss_fn = loss_fn

    def nll(self, tokens: Tensor, mask: Tensor, document_starts: Tensor | None = None) -> Tensor:
        """See `Nll`; collective over the ranks of a model replica, the same on all of them. Full logits are never in memory.

        With a teacher collective over all ranks, which call it equally often with equal shapes.
        """
        total = torch.zeros((2,) if self.loss_fn else (), dtype=torch.float64, device=tokens.device)
        labels = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1)
        predicted = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
        whole = {"tokens": tokens, "labels": labels, "predicted": predicted}
        whole |= {} if document_starts is None else {"document_starts": document_starts}

        def on_output(hidden: Tensor, batch: dict[str, Any]) -> None:
            if self.model.config.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden, group=process_groups.tp_group())
            _, sums = distillation_loss(
                FactoredLogits(hidden.flatten(0, 1), self.model.head()),
                self.loss_fn and self.loss_fn.teacher_logits(batch),
                batch["labels"].t().reshape(-1),
                batch["predicted"].t().reshape(-1).float(),
                vocab_size=self.arch.vocab,
                tp_group=process_groups.tp_group(),
                config=LossConfig(kd_weight=1.0 if self.loss_fn else 0.0, lm_weight=1.0),
            )
            total.add_(sums[[1, 0]] if self.loss_fn else sums[1])

        # One micro-batch per pipeline rank fills the pipeline.
        parts = zip(*(x.chunk(process_groups.pp_group().size()) for x in whole.values()), strict=True)
        batches = [dict(zip(whole, part, strict=True)) for part in parts]
        if self.loss_fn:  # the teacher takes micro-batches of one shape
            groups = itertools.groupby(batches, key=lambda batch: batch["tokens"].shape)
            add = self.loss_fn.teacher.add_teacher_outputs
            batches = [batch for _, group in groups for batch in add(list(group))]
        forward(self.model, batches, on_output)
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
        refuse(checks.document_problems(config.data, tuning.available_kernels()))
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
    """`evaluate_windows` of a run's held-out texts (collective).

    Raises:
        UserError: see `heldout_windows`.
    """
    settings = config.evaluate
    texts, _ = heldout_windows(config.data, tokenizer, settings.sequence_length, settings.max_windows)
    return evaluate_windows(
        texts,
        model.nll,
        micro_batch=settings.micro_batch,
        max_windows=settings.max_windows,
        group=process_groups.dp_group(),
    )
