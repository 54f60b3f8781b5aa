"""Logits of every family, and attention, on a CUDA device: a failure means that users' models are other models on GPUs."""

import pytest
import torch

from minitron_mcore.models import layer_spec
from minitron_mcore.parallel import process_groups
from tests.gpu.world import alone, here
from tests.helpers import families, models
from tests.helpers.cutting import ONE, export
from tests.helpers.families import round_trip

from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip
from megatron.core.transformer import TransformerConfig  # isort: skip

pytestmark = pytest.mark.gpu


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("which", families.OF)
def test_logits_equal_transformers(tmp_path, which):
    """In fp32; weights are bit-equal after the way back."""
    folder, ids = families.tiny(which, tmp_path / "hf"), models.tokens()
    found = here(round_trip, folder, tmp_path, ONE, ids)
    assert (found - models.hf_logits(folder, ids)).abs().max() <= 2e-4
    given, back = models.weights(folder), export(tmp_path / "ckpt", tmp_path / "back")
    assert all(torch.equal(weight, given[name]) for name, weight in back.items())


@pytest.mark.parametrize("which", ["llama31", "nemotron", "qwen2", "mixtral"])
def test_bf16_logits_are_close(tmp_path, which):
    folder, ids = families.tiny(which, tmp_path / "hf"), models.tokens()
    here(models.import_hf, folder, tmp_path / "ckpt", ONE)
    found, expected = here(bf16_logits, tmp_path / "ckpt", ids).float(), models.hf_logits(folder, ids)
    # An expert chosen otherwise changes a token's logits, so the mean is compared and not the largest difference.
    assert (found - expected).abs().mean() <= 0.05 * expected.abs().mean()


def test_references_are_made_on_the_cpu(tmp_path):
    """By a process that sees no CUDA device and no layers but torch's, whatever is installed."""
    (found,) = alone(tmp_path / "reference", (here, layer_spec.describe))
    assert found.startswith("layers: torch") and found.endswith("device: cpu") and "torch.optim" in found


def bf16_logits(checkpoint, ids):
    from minitron_mcore.checkpoint.run_folder import build_model, open_checkpoint

    opened = open_checkpoint(checkpoint)
    return models.model_logits(build_model(opened, ONE, "bf16"), opened.arch, ids)


SHAPES = {
    # tokens, samples, window, query heads, groups, head_dim
    "one token": (1, 1, None, 4, 2, 8),
    "multi-head": (33, 2, None, 4, 4, 16),
    "grouped": (130, 2, None, 12, 3, 64),
    "window": (130, 2, 5, 12, 6, 32),
    "window, multi-head": (257, 1, 64, 4, 4, 128),
    "window longer than the sequence": (33, 2, 48, 8, 2, 64),
    "window of one": (20, 1, 1, 4, 2, 8),
    "several blocks of a window": (600, 2, 129, 4, 2, 16),
    "a window that is less than a block": (600, 1, 40, 4, 4, 64),
}


def attend(shape: tuple, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients of the spec's attention."""
    window, heads, groups, head_dim = shape[2:]
    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head_dim,
        window_size=(window - 1, 0) if window else None,
    )
    own = ProcessGroupCollection.use_mpu_process_groups()
    attention = layer_spec.TorchAttention(config=config, pg_collection=own, softmax_scale=head_dim**-0.5)
    *leaves, d_out = (tensor.to(process_groups.device()) for tensor in tensors)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = attention(*leaves)
    out.backward(d_out)
    return [out, *(leaf.grad for leaf in leaves)]


def dense_attention(shape: tuple, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same by the formula in fp64."""
    length, samples, window, heads, groups, head_dim = shape
    *leaves, d_out = (tensor.double() for tensor in tensors)
    q, k, v = leaves = [leaf.requires_grad_() for leaf in leaves]
    k, v = (x.repeat_interleave(heads // groups, 2) for x in (k, v))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= (window or length))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) * head_dim**-0.5
    out = torch.einsum("bnst,tbnd->sbnd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(2)
    out.backward(d_out)
    return [out, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_attention_equals_the_formula(dtype):
    g = torch.Generator().manual_seed(0)
    for name, shape in SHAPES.items():
        length, samples, _, heads, groups, head_dim = shape
        sizes = [(length, samples, n, head_dim) for n in (heads, groups, groups)] + [
            (length, samples, heads * head_dim)
        ]
        tensors = [torch.randn(size, generator=g).to(dtype) for size in sizes]
        expected = dense_attention(shape, tensors)
        limit = 2e-5 if dtype == torch.float32 else 2e-2
        for n, (x, y) in enumerate(zip(here(attend, shape, tensors), expected, strict=True)):
            # A query that sees one key has no gradient; what rounding leaves of it is compared with that of the values.
            scale = max(y.abs().max(), expected[3].abs().max() if n in (1, 2) else 0)
            assert x.dtype == dtype and (x.double() - y).abs().max() <= limit * scale, (name, n)
