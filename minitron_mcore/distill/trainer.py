"""One student's training step: megatron-core's schedule, DDP, optimizer and learning-rate schedule around the distillation
loss."""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minitron_mcore.checkpoint import run_folder, sharded
from minitron_mcore.checkpoint.run_folder import Checkpoint
from minitron_mcore.checkpoint.sharded import Shard
from minitron_mcore.checkpoint.step_saver import StepSaver
from minitron_mcore.config.performance import PerformanceConfig
from minitron_mcore.config.settings import DataConfig, DistillConfig, Dtype, ParallelConfig
from minitron_mcore.data import datasets
from minitron_mcore.distill import checks, failures, optimizer_state, phases, teachers, vocabulary
from minitron_mcore.distill.cache import Cache, CachedTeacher
from minitron_mcore.distill.failures import BadStep
from minitron_mcore.distill.hidden_state_loss import HiddenStateLoss
from minitron_mcore.distill.loss_fn import LossFunction
from minitron_mcore.distill.teacher import Teacher
from minitron_mcore.distill.teachers import SeveralTeachers
from minitron_mcore.errors import refuse
from minitron_mcore.models import build, flops, performance_checks, tuning
from minitron_mcore.parallel import process_groups, schedule
from minitron_mcore.parallel.megatron_patches import training
from minitron_mcore.parallel.schedule import Batch

from megatron.core.distributed import DistributedDataParallel, finalize_model_grads  # isort: skip
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # isort: skip
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # isort: skip


def check(
    student: Checkpoint,
    teacher: Checkpoint | None,
    config: DistillConfig,
    parallel: ParallelConfig,
    dtype: str,
    performance: PerformanceConfig,
    prefix: str = checks.DISTILL,
) -> None:
    """Check a run before a model is built; `prefix`: of the names of its settings, for messages.

    Raises:
        UserError: see `checks.problems`, `checks.several_teachers`, `performance_checks.problems`, `vocabulary.problems` and
            `Cache.problems`.
    """
    dp_size, kernels = process_groups.dp_group().size(), tuning.available_kernels()
    each_teacher = teachers.members(teacher)
    problems = [*checks.several_teachers([each.arch for each in each_teacher], config)]
    for each in each_teacher or [None]:
        arch = each and each.arch
        problems += checks.problems(student.arch, arch, config, parallel, dp_size, prefix)
        live = None if isinstance(each, Cache) else arch
        run = performance_checks.Run(performance, student.arch, live, config, parallel, Dtype(dtype), kernels)
        problems += performance_checks.problems(run)
        problems += vocabulary.problems(student.arch, each.arch, student.hf, each.hf) if each else []
        problems += each.problems(student.arch, config) if isinstance(each, Cache) else []
    refuse(dict.fromkeys(problems))


class Trainer:
    """Student, teacher, optimizer and learning-rate schedule of one run, sharded by megatron-core in the run's layout."""

    def __init__(
        self,
        student: Checkpoint,
        teacher: Checkpoint | None,
        config: DistillConfig,
        parallel: ParallelConfig,
        dtype: str,
        source: Teacher | SeveralTeachers | None = None,
        performance: PerformanceConfig | None = None,
    ):
        """Build both models and load their weights (collective).

        Args:
            source: the loaded `teacher` of another trainer on these ranks, whose student has the same vocabulary.

        Raises:
            UserError: see `check`; a layout that does not divide a model; a damaged checkpoint.
        """
        self.performance = performance = performance or PerformanceConfig()
        check(student, teacher, config, parallel, dtype, performance)
        self.config, self.arch, self.step = config, student.arch, 0
        self.phases = [phases.first(config)]
        self.step_start = self.work_seconds = 0.0
        """When the last step began, and for how long this rank computed before it reduced gradients."""
        self.saver = StepSaver(config)
        if performance.tp_comm_overlap:
            tokens = config.micro_batch * config.sequence_length // parallel.context
            tuning.start_user_buffers(performance, tokens, student.arch.hidden, parallel.tensor)
        model = run_folder.build_model(student, parallel, dtype, performance)
        self.vocab = vocabulary.shared(student.arch, teacher.arch if teacher else None)
        ddp = tuning.ddp_config(performance)
        self.hidden_loss = (
            HiddenStateLoss(model, student.arch, teacher.arch, config, parallel, ddp)
            if config.hidden_state_loss.weight
            else None
        )
        self.teacher = source
        if teacher and source is None:
            self.teacher = teachers.load(teacher, student.arch, config, parallel, dtype, performance)
        if self.hidden_loss:
            self.teacher.routes = sorted({*self.teacher.routes, *self.hidden_loss.routes})
        self.loss_fn = LossFunction(model, self.teacher, self.vocab, config, performance.loss_chunk_mb)
        self.model, self.chunks = model, [DistributedDataParallel(model.config, ddp, chunk) for chunk in model.chunks]
        if performance.overlap_param_gather:
            _wait_for_weights(model, self.chunks)
        self.optimizer = self._make_optimizer(dtype)
        model.config.finalize_model_grads_func = self._finalize_gradients
        model.config.grad_scale_func = self.optimizer.scale_loss
        no_sync = [chunk.no_sync for chunk in self.chunks]
        model.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=config.peak_lr,
            min_lr=config.min_lr,
            lr_warmup_steps=config.warmup_steps,
            lr_decay_steps=config.steps,
            lr_decay_style="cosine",
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,  # a resumed run has the same values, or begins a phase with others
        )

    def _make_optimizer(self, dtype: str):
        """megatron-core's, of the student and the projection; it raises BadStep (collective)."""
        config = self.config
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=config.peak_lr,
                min_lr=config.min_lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.adam_beta1,
                adam_beta2=config.adam_beta2,
                clip_grad=config.clip_grad,
                bf16=dtype == "bf16",
                params_dtype=build.DTYPES[dtype],
                use_distributed_optimizer=True,
                **tuning.optimizer_options(self.performance),
            ),
            [*self.chunks, *(self.hidden_loss.ddp_modules if self.hidden_loss else [])],
            use_gloo_process_groups=False,
        )
        failures.guard_gradient(optimizer)
        return optimizer

    def train_batches(self, data: DataConfig, prefixes: list[str], weights: list[float] | None) -> Iterator[Batch]:
        """This rank's microbatches from the sample at which the next step begins (collective). See `datasets.train_batches`.

        With a teacher cache the order is that of the cache's samples, and repeats after its last one.
        """
        config, phase, dp = self.config, self.phases[-1], process_groups.dp_group()
        cached = isinstance(self.teacher, CachedTeacher)
        count = self.teacher.cache.index["samples"] if cached else phase.order_samples
        order = datasets.SampleOrder.of(data, prefixes, weights, config.sequence_length, count)
        return datasets.train_batches(
            datasets.Samples(order, data.cache, self.vocab),
            micro_batch_size=config.micro_batch,
            global_batch_size=config.global_batch,
            num_samples=phase.sample(config.steps),
            consumed_samples=phase.sample(self.step),
            dp_rank=dp.rank(),
            dp_size=dp.size(),
            prefetch=data.prefetch,
        )

    def train_step(self, batches: list[Batch], with_teacher_outputs: Sequence[Batch] | None = None) -> dict[str, float]:
        """One optimizer step on this data-parallel rank's micro-batches (collective).

        A step whose tokens are all masked counts, but changes no weight, not even by weight decay.

        Args:
            with_teacher_outputs: the micro-batches of `add_teacher_outputs`; None: the teacher runs now.

        Returns:
            The step's figures, the same on all ranks; losses in nats a token. Speeds are those of this call.

        Raises:
            BadStep: on all ranks, for a loss or gradient that is not finite; weights, optimizer and schedule are unchanged.
        """
        self.step_start = time.monotonic()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        if self.hidden_loss:
            self.hidden_loss.begin()
        self.optimizer.zero_grad()
        if with_teacher_outputs is None:
            with_teacher_outputs = self.teacher.add_teacher_outputs(batches) if self.teacher else batches
        on_batch = [self.hidden_loss.set_batch] if self.hidden_loss else []
        parts = schedule.forward_backward(
            self.chunks, with_teacher_outputs, self.loss_fn, batches[0], len(batches), *on_batch
        )
        sums = torch.zeros(4, device=process_groups.device())
        for part in parts:
            sums += part
        kd, lm, entropy, tokens = self._total(sums).tolist()
        if not math.isfinite(kd + lm + tokens):
            raise BadStep("loss", kd + lm + tokens, parts)
        hidden_figures = {}
        if self.hidden_loss:
            hidden_figures = {
                "hidden_state_loss": self.hidden_loss.total() / max(tokens, 1.0),
                "hidden_state_weight": self.hidden_loss.weight,
            }
            if not math.isfinite(hidden_figures["hidden_state_loss"]):
                raise BadStep("loss of intermediate states", hidden_figures["hidden_state_loss"], parts)
        self.scheduler.step(increment=1)  # before the optimizer: the first step's learning rate is not 0
        try:
            norm = self.optimizer.step()[1] if tokens else 0.0
        except BadStep as bad:
            self.scheduler.step(increment=-1)
            raise BadStep(bad.what, bad.value, parts) from None
        self.step += 1
        if hidden_figures:
            kd_term = self.config.kd_weight * self.config.temperature**2 * kd / max(tokens, 1.0)
            self.hidden_loss.update_weight(kd_term, hidden_figures["hidden_state_loss"])
        count = max(tokens, 1.0)
        return {
            "step": self.step,
            "tokens": self.phases[-1].tokens(self.step),
            "kd_loss": kd / count,
            "lm_loss": lm / count,
            **hidden_figures,
            "teacher_entropy": entropy / count,
            "grad_norm": float(norm),
            "lr": self.optimizer.param_groups[0]["lr"],
            **self.speeds(time.monotonic() - self.step_start),
        }

    def speeds(self, seconds: float) -> dict[str, float]:
        """Tokens and operations per second of a step of this length; masked and padded positions are computed, so they count."""
        length = self.config.sequence_length
        speed = self.config.global_batch * length / seconds
        teacher_flops = sum(flops.forward_flops(arch, length) for arch in teachers.run_here(self.teacher))
        return {
            "step_seconds": seconds,
            "tokens_per_second": speed,
            "student_tflops": 3 * flops.forward_flops(self.arch, length) * speed / 1e12,
            "teacher_tflops": teacher_flops * speed / 1e12,
        }

    def _finalize_gradients(self, *args, **kwargs) -> None:
        """Reduce gradients over the replicas; megatron-core calls this after the last backward pass."""
        if process_groups.device().type == "cuda":
            torch.cuda.current_stream().synchronize()  # not those of reductions that overlap the backward pass
        self.work_seconds = time.monotonic() - self.step_start
        (self.hidden_loss.finalize if self.hidden_loss else finalize_model_grads)(*args, **kwargs)

    def teacher_losses(self, batch: Batch) -> list[float]:
        """Each teacher's own cross-entropy on the data-parallel ranks' micro-batches, nats a token (collective)."""
        count = len(self.teacher.weights) if isinstance(self.teacher, SeveralTeachers) else 1
        sums = torch.zeros(count + 1, device=process_groups.device())
        with torch.no_grad():
            for with_teacher_outputs in self.teacher.add_teacher_outputs([batch]):
                if process_groups.is_last_stage():
                    sums += self.loss_fn.teacher_losses(schedule.cp_shard(with_teacher_outputs))
        *losses, tokens = self._total(sums).tolist()
        return [loss / max(tokens, 1.0) for loss in losses]

    def skip_step(self) -> None:
        """Count a bad step: advance the data position and the learning-rate schedule."""
        self.scheduler.step(increment=1)
        self.step += 1

    def bad_gradient(self) -> str:
        """Name of this rank's first parameter with a gradient that is not finite; empty if there is none."""
        extra = self.hidden_loss.ddp_modules if self.hidden_loss else []
        parameters = [
            *build.named_parameters(self.model),
            *(pair for part in extra for pair in part.named_parameters()),
        ]
        return next((name for name, parameter in parameters if not parameter.main_grad.isfinite().all()), "")

    def _total(self, sums: Tensor) -> Tensor:
        dist.all_reduce(sums, group=process_groups.dp_cp_group())
        return process_groups.from_last_stage(sums)

    def _weights(self) -> dict:
        return {"weights": sharded.tensors(self._shards())}

    def _shards(self) -> dict[nn.Parameter, Shard]:
        """Of all parameters that the optimizer trains."""
        return sharded.model_shards(self.model, self.arch) | (self.hidden_loss.shards() if self.hidden_loss else {})

    def gather_weights(self) -> None:
        """Complete the gathers of updated weights that overlap_param_gather leaves to the next forward pass (collective)."""
        if self.performance.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def save(self, out_dir: Path) -> None:
        """Write a checkpoint of this step, or begin to in the background (collective). See `StepSaver.begin`."""
        self.gather_weights()
        optimizer = optimizer_state.sharded_state(self.optimizer.chained_optimizers, self._shards())
        # There is no dropout: the data position, which follows from the step, is the only random state.
        counted = {"step": self.step, "phases": phases.values(self.phases)}
        counted |= {"states_ratio": self.hidden_loss.ratio} if self.hidden_loss else {}
        state = self._weights() | {"optimizer": optimizer, "scheduler": self.scheduler.state_dict()} | counted
        gradients = sum(parameter.main_grad.nbytes for _, parameter in build.named_parameters(self.model))
        self.saver.begin(out_dir, self.step, state, gradients)

    def finish_save(self, wait: bool = True) -> None:
        """Publish the save that is being written, if it is written or with `wait` (collective). See `StepSaver.finish`."""
        self.saver.finish(wait)

    def resume(self, out_dir: Path) -> None:
        """Load the newest valid step of this run, in place (collective).

        Raises:
            UserError: see `run_folder.newest_valid_step` and `phases.resumed`.
        """
        files = run_folder.newest_valid_step(out_dir)
        loading = optimizer_state.StateLoader(self.optimizer.chained_optimizers, self._shards())
        state = run_folder.read_step(files, self._weights() | {"optimizer": loading.request})
        loading.finish(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step = state["step"]
        self.phases = phases.resumed(state.get("phases"), self.config, self.step)
        if self.hidden_loss:
            self.hidden_loss.ratio = state["states_ratio"]


def _wait_for_weights(model: build.Model, chunks: Sequence[DistributedDataParallel]) -> None:
    """Complete the gathers that megatron-core overlaps with the forward pass before their weights are used."""
    if process_groups.is_last_stage():
        training.wait_for_head(chunks[-1], model.chunks[-1].decoder.final_norm, model.head())
    if chunks[0].ddp_config.align_param_gather:
        model.config.param_sync_func = [chunk.start_param_sync for chunk in chunks]
