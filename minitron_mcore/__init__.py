"""minitron_mcore: score, prune and distil large language models where they live, on Megatron-Core."""

__version__ = "0.1.0"
