"""Pruning: scores say what matters, masks say what stays, optax transforms hold it.

`topk_masks(magnitude_scores(params), 0.9)` gives masks, `apply_masks` sets the rest to zero,
`keep_masked` keeps it at zero in fine-tuning, `prune_gradually` prunes while training. A score is a
tree like the parameters, higher keeps; a mask is a tree of booleans that broadcast against them,
True keeps. Every score goes with every way of making masks, and these with every transform.

- Scores: of the weights (`magnitude_scores`, `lamp_scores`, `filter_norm_scores`, `fpgm_scores`,
  `batch_norm_scale_scores`), of a batch (`saliency_scores`, `snip_scores`, `grasp_scores`,
  `synflow_scores`, `taylor_scores`, `fisher_scores`), of the inputs of layers (`wanda_scores`,
  `activity`), of a whole training (a `Criterion`: `movement`, `fisher`, `saliency`).
- Masks: `topk_masks`, `global_topk_masks`, `output_topk_masks`, `n_m_masks`, `block_topk_masks`.
- Budgets: `uniform_sparsities`, `erdos_renyi_sparsities`, `sensitivity_sparsities`;
  `masks_to_budget` for a number of parameters, of multiply-adds, of bytes.
- While training: `sparse_training` with `gradual`, `set_rule` or `rigl`; `network_surgery`; learned
  masks (`str_params`, `l0_params`, `variational_params`, `movement_params`); rewinding (`remember`,
  `iterative_pruning`).
- Once, with second order: `sparse_gpt`, `obc`, `reconstruct`, `prune_calibrated_params`.
- Networks that really shrink: `find_groups`, `unit_scores`, `round_units`, `unit_masks`, `shrink`.
"""

from jopt.prune._activity import Activity, activity, channel_scores
from jopt.prune._blocks import block_topk_masks, pool_scores
from jopt.prune._budgets import (
    erdos_renyi_kernel_sparsities,
    erdos_renyi_sparsities,
    uniform_sparsities,
)
from jopt.prune._by_path import one_each, one_per_input, one_per_layer, one_per_output
from jopt.prune._criterion import Criterion
from jopt.prune._filter_scores import (
    batch_norm_scale_scores,
    filter_norm_scores,
    fpgm_scores,
    scale_penalty,
)
from jopt.prune._fisher import fisher_scores, squared_gradients
from jopt.prune._gathered import fisher, movement, saliency
from jopt.prune._gradient_scores import grasp_scores, saliency_scores, snip_scores, taylor_scores
from jopt.prune._gradual import cubic_schedule, gradual, one_shot_schedule
from jopt.prune._hard_concrete import (
    hard_concrete_gates,
    hard_concrete_penalty,
    hard_concrete_sample,
    l0_gated_params,
    l0_init,
    l0_masks,
    l0_params,
    l0_penalty,
)
from jopt.prune._lamp import lamp_scores
from jopt.prune._masks import apply_masks, global_topk_masks, sparsity, topk_masks
from jopt.prune._moments import clear_moments
from jopt.prune._movement import movement_params, movement_penalty, soft_movement_masks
from jopt.prune._multiply_adds import MultiplyAdds, kept_multiply_adds, multiply_adds
from jopt.prune._n_m import Skipped, n_m_mask, n_m_masks
from jopt.prune._obc import obc, removed_by_loss, removed_evenly
from jopt.prune._output_masks import output_topk_masks
from jopt.prune._reconstruct import reconstruct
from jopt.prune._rewind import (
    PruningRound,
    RememberState,
    iterative_pruning,
    iterative_sparsities,
    keep_weights,
    remember,
    rewind_weights,
    rewound,
)
from jopt.prune._rigl import rigl
from jopt.prune._scores import magnitude_scores, random_scores
from jopt.prune._second_order import prune_calibrated_params, reconstruct_params
from jopt.prune._sensitivity import Sensitivity, sensitivity, sensitivity_sparsities
from jopt.prune._set import set_rule
from jopt.prune._shrink._groups import (
    Group,
    Groups,
    Member,
    find_groups,
    unit_masks,
    unit_scores,
)
from jopt.prune._shrink._round import round_units
from jopt.prune._shrink._shrink import Shrunk, shrink, shrunk_apply
from jopt.prune._sparse_gpt import sparse_gpt
from jopt.prune._sparse_training import (
    SparseChange,
    SparseRule,
    SparseStep,
    SparseTrainingState,
    sparse_training,
)
from jopt.prune._straight_through import masked_out_penalty, masked_params
from jopt.prune._surgery import (
    SurgeryState,
    inverse_decay,
    network_surgery,
    surgery_mask,
    surgery_threshold,
)
from jopt.prune._synflow import synflow_masks, synflow_scores
from jopt.prune._threshold_reparameterization import soft_threshold, str_init, str_masks, str_params
from jopt.prune._to_budget import Budgeted, kept_parameters, masks_to_budget
from jopt.prune._transforms import (
    KeepMaskedState,
    PruneGraduallyState,
    current_masks,
    keep_masked,
    prune_gradually,
)
from jopt.prune._variational import (
    dropout_divergence,
    dropout_log_alpha,
    local_reparameterization,
    variational_init,
    variational_masks,
    variational_params,
    variational_penalty,
)
from jopt.prune._wanda import wanda_scores

__all__ = [
    "Group",
    "Groups",
    "Member",
    "Shrunk",
    "find_groups",
    "shrink",
    "shrunk_apply",
    "unit_masks",
    "unit_scores",
    "Activity",
    "Budgeted",
    "Criterion",
    "KeepMaskedState",
    "MultiplyAdds",
    "PruneGraduallyState",
    "PruningRound",
    "RememberState",
    "Sensitivity",
    "Skipped",
    "SparseChange",
    "SparseRule",
    "SparseStep",
    "SparseTrainingState",
    "SurgeryState",
    "activity",
    "apply_masks",
    "batch_norm_scale_scores",
    "block_topk_masks",
    "channel_scores",
    "clear_moments",
    "cubic_schedule",
    "current_masks",
    "dropout_divergence",
    "dropout_log_alpha",
    "erdos_renyi_kernel_sparsities",
    "erdos_renyi_sparsities",
    "filter_norm_scores",
    "fisher",
    "fisher_scores",
    "fpgm_scores",
    "global_topk_masks",
    "gradual",
    "grasp_scores",
    "hard_concrete_gates",
    "hard_concrete_penalty",
    "hard_concrete_sample",
    "inverse_decay",
    "iterative_pruning",
    "iterative_sparsities",
    "keep_masked",
    "keep_weights",
    "kept_multiply_adds",
    "kept_parameters",
    "l0_gated_params",
    "l0_init",
    "l0_masks",
    "l0_params",
    "l0_penalty",
    "lamp_scores",
    "local_reparameterization",
    "magnitude_scores",
    "masked_out_penalty",
    "masked_params",
    "masks_to_budget",
    "movement",
    "movement_params",
    "movement_penalty",
    "multiply_adds",
    "n_m_mask",
    "n_m_masks",
    "network_surgery",
    "obc",
    "one_each",
    "one_per_input",
    "one_per_layer",
    "one_per_output",
    "one_shot_schedule",
    "output_topk_masks",
    "pool_scores",
    "prune_calibrated_params",
    "prune_gradually",
    "random_scores",
    "reconstruct",
    "reconstruct_params",
    "remember",
    "removed_by_loss",
    "removed_evenly",
    "rewind_weights",
    "rewound",
    "rigl",
    "round_units",
    "saliency",
    "saliency_scores",
    "scale_penalty",
    "sensitivity",
    "sensitivity_sparsities",
    "set_rule",
    "snip_scores",
    "soft_movement_masks",
    "soft_threshold",
    "sparse_gpt",
    "sparse_training",
    "sparsity",
    "squared_gradients",
    "str_init",
    "str_masks",
    "str_params",
    "surgery_mask",
    "surgery_threshold",
    "synflow_masks",
    "synflow_scores",
    "taylor_scores",
    "topk_masks",
    "uniform_sparsities",
    "variational_init",
    "variational_masks",
    "variational_params",
    "variational_penalty",
    "wanda_scores",
]
