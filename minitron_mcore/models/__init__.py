"""Architectures, model families, the parameter table, and building models on megatron-core."""
