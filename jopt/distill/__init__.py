"""Distillation: losses that let a small student learn from a large teacher.

Every loss is a pure function of activations that returns one number for each example; the caller
reduces (`.mean()`), weights (`weighted_sum`) and differentiates. No gradient flows into a teacher;
`contrastive_loss` alone trains a projection of the teacher's features beside the student's.
A student may be the pruned or quantized teacher itself, since all of jopt is functions of
parameters:

    def loss(params, images, labels):
        few_bits = jopt.quant.fake_quantize_params(params["student"], spec)  # or masked, or neither
        student_logits = student.apply({"params": few_bits}, images)
        teacher_logits = teacher.apply(teacher_variables, images)
        return jopt.distill.kd_loss(student_logits, teacher_logits, temperature=4.0).mean()

Intermediate activations come out of a Flax model in one way for each API, which no loss depends on.
Linen: name the modules, and

    logits, state = model.apply(
        variables, images, capture_intermediates=True, mutable=["intermediates"]
    )
    features = state["intermediates"]["block_2"]["__call__"][0]

or `self.sow("intermediates", "attention", scores)` inside a module for what no module returns. Nnx:
`self.sow(nnx.Intermediate, "features", hidden)` inside a module, then

    logits, state = nnx.capture(model, nnx.Intermediate)(images)
    features = state["block_2"]["features"][0]

Where widths differ, the student's features go through a projector (`init_projector`, `project`)
whose parameters are trained in the same tree as the student's.
"""

from jopt.distill._attention_maps import (
    attention_distribution_loss,
    attention_score_loss,
    relation_loss,
)
from jopt.distill._cache import TeacherCache, cache_teacher, open_teacher_cache
from jopt.distill._chain import distill_chain
from jopt.distill._contrastive import (
    ContrastiveState,
    contrastive_init,
    contrastive_loss,
    contrastive_negatives,
    contrastive_update,
)
from jopt.distill._decoupled import dkd_loss
from jopt.distill._dist import dist_loss
from jopt.distill._divergences import jensen_shannon_loss, kd_loss, reverse_kd_loss
from jopt.distill._features import (
    attention_map,
    attention_transfer_loss,
    flow_loss,
    flow_matrix,
    hint_loss,
    neuron_selectivity_loss,
    vid_loss,
)
from jopt.distill._hidden_states import cosine_loss, hidden_state_loss, normalized_state_loss
from jopt.distill._layer_maps import last_layer_map, uniform_layer_map
from jopt.distill._logits import distillation_loss, soft_cross_entropy
from jopt.distill._mutual import mutual_loss
from jopt.distill._projectors import init_projector, project, resize_maps
from jopt.distill._relational import rkd_angle_loss, rkd_distance_loss
from jopt.distill._sequences import mix_on_policy, sample_tokens, token_mean, word_level_loss
from jopt.distill._similarity import (
    correlation_congruence_loss,
    pkt_loss,
    similarity_preserving_loss,
)
from jopt.distill._standardize import standardize_logits
from jopt.distill._teachers import ensemble_logits, smoothed_label_logits, stack_params
from jopt.distill._top_k import TopKLogits, expand_top_k, top_k_logits
from jopt.distill._triple import triple_loss
from jopt.distill._weighted import weighted_sum

__all__ = [
    "ContrastiveState",
    "TeacherCache",
    "TopKLogits",
    "attention_distribution_loss",
    "attention_map",
    "attention_score_loss",
    "attention_transfer_loss",
    "cache_teacher",
    "contrastive_init",
    "contrastive_loss",
    "contrastive_negatives",
    "contrastive_update",
    "correlation_congruence_loss",
    "cosine_loss",
    "dist_loss",
    "distill_chain",
    "distillation_loss",
    "dkd_loss",
    "ensemble_logits",
    "expand_top_k",
    "flow_loss",
    "flow_matrix",
    "hidden_state_loss",
    "hint_loss",
    "init_projector",
    "jensen_shannon_loss",
    "kd_loss",
    "last_layer_map",
    "mix_on_policy",
    "mutual_loss",
    "neuron_selectivity_loss",
    "normalized_state_loss",
    "open_teacher_cache",
    "pkt_loss",
    "project",
    "relation_loss",
    "resize_maps",
    "reverse_kd_loss",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "sample_tokens",
    "similarity_preserving_loss",
    "smoothed_label_logits",
    "soft_cross_entropy",
    "stack_params",
    "standardize_logits",
    "token_mean",
    "top_k_logits",
    "triple_loss",
    "uniform_layer_map",
    "vid_loss",
    "weighted_sum",
    "word_level_loss",
]
