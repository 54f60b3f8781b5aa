"""Forward passes over new tokens only: a key/value cache, and megatron-core's attention with it."""

from collections.abc import Sequence
from typing import Any

from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor


class KeyValueCache(StaticInferenceContext):
    """Keys and values of the tokens before `sequence_len_offset`, which all rows share as a position.

    A rank holds those of its layers and heads, by layer number: [capacity, B, G_r, D] each. `schedule.forward` passes it to the
    model; whoever calls that adds the pass's tokens to `sequence_len_offset`. What was written behind it is overwritten by the next
    pass.

    Args:
        capacity: positions, padding of the last pass included.
    """

    def __init__(self, capacity: int):
        super().__init__(max_batch_size=0, max_sequence_length=capacity)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [S, B, G_r, D]; returns those of all positions up to theirs."""
        held = self.key_value_memory_dict
        if layer not in held:
            held[layer] = tuple(new.new_empty(self.max_sequence_length, *new.shape[1:]) for new in (key, value))
        start, end = self.sequence_len_offset, self.sequence_len_offset + len(key)
        for buffer, new in zip(held[layer], (key, value), strict=True):
            buffer[start:end] = new
        keys, values = held[layer]
        return keys[:end], values[:end]

    def take_rows(self, rows: Sequence[int], capacity: int) -> "KeyValueCache":
        """A cache with copies of some rows, in this order; a row may repeat."""
        taken, seen = KeyValueCache(capacity), self.sequence_len_offset
        taken.sequence_len_offset = seen
        for layer, held in self.key_value_memory_dict.items():
            copies = tuple(buffer.new_empty(capacity, len(rows), *buffer.shape[2:]) for buffer in held)
            for copy, buffer in zip(copies, held, strict=True):
                copy[:seen] = buffer[:seen, list(rows)]
            taken.key_value_memory_dict[layer] = copies
        return taken


class CachedAttention(SelfAttention):
    """Self-attention that can use a `KeyValueCache`.

    megatron-core's own cache holds keys without their rotary embedding and applies it to all of them in each pass. After the first
    pass it masks nothing, so a pass over several new tokens would let each see the later ones.
    """

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        if inference_context is None:
            return super()._adjust_key_value_for_inference(
                inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
            )
        start = inference_context.sequence_len_offset
        of_queries, of_keys = (embedding[start : start + len(key)] for embedding in rotary_pos_emb)
        key = apply_rotary_pos_emb(key, of_keys, config=self.config, cp_group=self.pg_collection.cp)
        key, value = inference_context.append(self.layer_number, key, value)
        return query, key, value, (of_queries, None), AttnMaskType.causal_bottom_right, None
