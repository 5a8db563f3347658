"""Distillation: losses that let a small student learn from a large teacher's outputs."""

from jopt.distill._logits import distillation_loss, soft_cross_entropy

__all__ = ["distillation_loss", "soft_cross_entropy"]
