"""Pruning: scores say what matters, masks say what stays, optax transforms hold it.

`topk_masks(magnitude_scores(params), 0.9)` gives masks, `apply_masks` sets the rest to zero,
`keep_masked` keeps it at zero in fine-tuning, `prune_gradually` prunes while training.
"""

from jopt.prune._masks import apply_masks, global_topk_masks, sparsity, topk_masks
from jopt.prune._scores import magnitude_scores, random_scores
from jopt.prune._transforms import (
    KeepMaskedState,
    PruneGraduallyState,
    current_masks,
    keep_masked,
    prune_gradually,
)

__all__ = [
    "KeepMaskedState",
    "PruneGraduallyState",
    "apply_masks",
    "current_masks",
    "global_topk_masks",
    "keep_masked",
    "magnitude_scores",
    "prune_gradually",
    "random_scores",
    "sparsity",
    "topk_masks",
]
