"""Distillation: the losses, the frozen teacher and its hidden states, the training loop."""
