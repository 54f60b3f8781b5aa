"""Distillation: the losses, the frozen teacher that hands over hidden states, the training loop."""
