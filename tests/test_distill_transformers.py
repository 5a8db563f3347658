from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt.distill._attention_maps import (
    attention_distribution_loss,
    attention_score_loss,
    relation_loss,
)
from jopt.distill._divergences import jensen_shannon_loss, kd_loss, reverse_kd_loss
from jopt.distill._hidden_states import cosine_loss, hidden_state_loss, normalized_state_loss
from jopt.distill._layer_maps import last_layer_map, uniform_layer_map
from jopt.distill._logits import soft_cross_entropy
from jopt.distill._sequences import mix_on_policy, sample_tokens, token_mean, word_level_loss
from jopt.distill._triple import triple_loss
from tests import oracles_transformers as oracles

MASK = jnp.array([[True, True, True, True], [True, True, False, False], [True, False, True, False]])
NO_PADDING = np.ones((3, 4), bool)
LABELS = jnp.array([[2, -100, 0, 1], [-1, -1, 3, 0], [-100, 1, 4, -100]])


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


class Case(NamedTuple):
    loss: Any  # of student, teacher, mask
    oracle: object  # of student, teacher, booleans
    student: jax.Array
    teacher: jax.Array
    token_axes: tuple  # axes of an example's student array that run over tokens


STATES = draw(0, 3, 4, 6), 2 * draw(1, 3, 4, 6)
SCORES = draw(2, 3, 2, 4, 4), 2 * draw(3, 3, 2, 4, 4)
LOGITS = draw(4, 3, 4, 5), 2 * draw(5, 3, 4, 5)
CASES = {
    "hidden": Case(hidden_state_loss, oracles.hidden_state_loss, *STATES, (1,)),
    "normalized": Case(normalized_state_loss, oracles.normalized_state_loss, *STATES, (1,)),
    "cosine": Case(cosine_loss, oracles.cosine_loss, *STATES, (1,)),
    "scores": Case(attention_score_loss, oracles.attention_score_loss, *SCORES, (2, 3)),
    "distribution": Case(
        attention_distribution_loss,
        oracles.attention_distribution_loss,
        jax.nn.softmax(SCORES[0]),
        jax.nn.softmax(SCORES[1]),
        (2, 3),
    ),
    "relation": Case(
        lambda s, t, mask: relation_loss(s, t, 2, mask),
        lambda s, t, real: oracles.relation_loss(s, t, 2, real),
        STATES[0],
        2 * draw(6, 3, 4, 8),
        (1,),
    ),
    "words": Case(
        lambda s, t, mask: word_level_loss(s, t, mask, 3.0),
        lambda s, t, real: oracles.word_level_loss(s, t, 3.0, real),
        *LOGITS,
        (1,),
    ),
    "triple": Case(
        lambda s, t, mask: triple_loss(s, t, LABELS, *STATES, mask),
        lambda s, t, real: (
            5 * oracles.word_level_loss(s, t, 2.0, real)
            + 2 * oracles.masked_word_loss(s, LABELS, real)
            + oracles.cosine_loss(*STATES, real)
        ),
        *LOGITS,
        (1,),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def padding_of(case, array):
    """Return booleans that broadcast against an array, True where it holds padding."""
    padded = np.zeros(array.shape, bool)
    for axis in case.token_axes:
        shape = [1] * array.ndim
        shape[0], shape[axis] = MASK.shape
        padded |= ~np.asarray(MASK).reshape(shape)
    return padded


def test_losses_match_the_papers(variant, case):
    with jax.numpy_dtype_promotion("strict"):
        masked = variant(case.loss)(case.student, case.teacher, MASK)
        whole = variant(lambda s, t: case.loss(s, t, None))(case.student, case.teacher)
    assert masked.dtype == whole.dtype == jnp.float32
    assert masked.shape == (3,)
    expected = case.oracle(case.student, case.teacher, np.asarray(MASK))
    np.testing.assert_allclose(masked, expected, rtol=2e-5)
    np.testing.assert_allclose(
        whole, case.oracle(case.student, case.teacher, NO_PADDING), rtol=2e-5
    )


def test_padding_never_counts_even_if_it_is_nan(case):
    def total(student, teacher):
        losses = case.loss(student, teacher, MASK)
        return (losses * jnp.array([1.0, 2.0, 3.0])).sum(), losses

    gradients = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    padded = padding_of(case, case.student)
    (clean, to_teacher), losses = gradients(case.student, case.teacher)
    chex.assert_trees_all_equal(to_teacher, jnp.zeros_like(case.teacher))
    np.testing.assert_array_equal(np.asarray(clean)[padded], 0.0)
    assert np.count_nonzero(np.asarray(clean)[~padded]) > (~padded).sum() / 2
    for rubbish in [7.0, np.nan, np.inf, -np.inf]:
        student = jnp.where(padded, rubbish, case.student)
        teacher = jnp.where(padding_of(case, case.teacher), rubbish, case.teacher)
        (again, _), same = gradients(student, teacher)
        np.testing.assert_allclose(same, losses, rtol=1e-6)
        np.testing.assert_allclose(again, clean, rtol=1e-5, atol=1e-7)


def test_halves_are_computed_in_single_precision(case):
    dtype = jnp.float16
    student, teacher = case.student.astype(dtype), case.teacher.astype(dtype)
    with jax.numpy_dtype_promotion("strict"):
        losses = case.loss(student, teacher, MASK)
        gradient = jax.grad(lambda s: case.loss(s, teacher, MASK).sum())(student)
    assert losses.dtype == jnp.float32 and gradient.dtype == dtype
    exact = [each.astype(jnp.float32) for each in (student, teacher)]
    np.testing.assert_allclose(losses, case.oracle(*exact, np.asarray(MASK)), rtol=5e-5)


def test_each_word_may_be_judged_by_any_divergence():
    student, teacher = LOGITS
    for divergence in (kd_loss, reverse_kd_loss, jensen_shannon_loss, soft_cross_entropy):
        losses = word_level_loss(student, teacher, MASK, 2.0, divergence)
        each = divergence(student, teacher, temperature=2.0)
        np.testing.assert_allclose(losses, token_mean(each, MASK), rtol=1e-6)


def test_a_sequence_of_padding_costs_nothing(case):
    mask = MASK.at[1].set(False)

    def total(student):
        losses = case.loss(student, case.teacher, mask)
        return losses.sum(), losses

    student = case.student.at[1].set(jnp.nan)
    gradient, losses = jax.jit(jax.grad(total, has_aux=True))(student)
    assert losses[1] == 0 and (losses[jnp.array([0, 2])] > 0).all()
    np.testing.assert_array_equal(gradient[1], 0.0)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"triple"}))
def test_nothing_is_learned_from_a_teacher_that_agrees(name):
    case = CASES[name]
    value, gradient = jax.jit(jax.value_and_grad(lambda s: case.loss(s, case.student, MASK).sum()))(
        case.student
    )
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    np.testing.assert_allclose(gradient, np.zeros(gradient.shape), atol=1e-6)


def test_losses_under_vmap_equal_losses_of_each_batch(case):
    students = jnp.stack([case.student, case.teacher if case.token_axes != (1,) else -case.student])
    together = jax.jit(jax.vmap(case.loss, in_axes=(0, None, None)))(students, case.teacher, MASK)
    for losses, student in zip(together, students, strict=True):
        expected = case.oracle(student, case.teacher, np.asarray(MASK))
        np.testing.assert_allclose(losses, expected, rtol=2e-5, atol=1e-6)


def test_uniform_map_is_tinyberts_where_layers_divide():
    assert uniform_layer_map(4, 12) == tuple(3 * m - 1 for m in range(1, 5))
    assert uniform_layer_map(6, 12)[:-1] == (1, 3, 5, 7, 9)  # PKD-skip: {2, 4, 6, 8, 10} from 1
    assert uniform_layer_map(1, 7) == (6,)


@pytest.mark.parametrize("layers", [(5, 12), (4, 6), (7, 9), (3, 3)])
def test_maps_rise_from_layer_to_layer_and_end_at_the_last(layers):
    student, teacher = layers
    for chosen in (uniform_layer_map(student, teacher), last_layer_map(student, teacher)):
        assert len(chosen) == student and chosen[0] >= 0 and chosen[-1] == teacher - 1
        assert (np.diff(chosen) >= 1).all()
    steps = np.diff((-1, *uniform_layer_map(student, teacher)))
    assert steps.max() - steps.min() <= 1
    assert (np.diff(last_layer_map(student, teacher)) == 1).all()


def test_last_map_is_pkds():
    assert last_layer_map(6, 12)[:-1] == (6, 7, 8, 9, 10)  # {7, ..., 11} counted from 1


@pytest.mark.parametrize("layer_map", [uniform_layer_map, last_layer_map])
def test_maps_need_a_teacher_that_is_as_deep(layer_map):
    with pytest.raises(ValueError, match="must not exceed teacher_layers, but 7 > 6"):
        layer_map(7, 6)
    with pytest.raises(ValueError, match="student_layers must be at least 1, not 0"):
        layer_map(0, 6)


def test_only_the_direction_of_normalized_states_counts():
    student, teacher = STATES
    scaled = cosine_loss(3 * student, 0.5 * teacher, MASK)
    np.testing.assert_allclose(scaled, cosine_loss(student, teacher, MASK), rtol=1e-5)
    np.testing.assert_allclose(
        normalized_state_loss(-student, student), jnp.full(3, 4.0), rtol=1e-6
    )


def test_a_state_of_zeros_has_a_finite_gradient():
    student = STATES[0].at[0, 0].set(0.0)
    gradient = jax.grad(lambda s: cosine_loss(s, STATES[1]).sum())(student)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[0, 0], 0.0)
    zeros = jnp.zeros((1, 1, 6))
    np.testing.assert_allclose(cosine_loss(zeros, STATES[1][:1, :1]), [0.5], rtol=1e-6)
    np.testing.assert_array_equal(cosine_loss(zeros, zeros), [0.0])


def test_attention_that_a_causal_mask_made_zero_is_no_trouble():
    causal = jnp.tril(jnp.ones((4, 4), bool))[None, None]
    student, teacher = (jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)) for scores in SCORES)
    value, gradient = jax.value_and_grad(
        lambda s: attention_distribution_loss(s, teacher, MASK).sum()
    )(student)
    expected = oracles.attention_distribution_loss(student, teacher, np.asarray(MASK)).sum()
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    assert np.isfinite(gradient).all()


def test_a_student_that_rules_out_a_teachers_key_pays_a_finite_price():
    student, teacher = jnp.array([[[[1.0, 0.0]]]]), jnp.array([[[[0.5, 0.5]]]])
    value, gradient = jax.value_and_grad(lambda s: attention_distribution_loss(s, teacher).sum())(
        student
    )
    tiny = float(jnp.finfo(jnp.float32).tiny)
    np.testing.assert_allclose(value, 0.5 * np.log(0.5) + 0.5 * np.log(0.5 / tiny), rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_attention_may_look_at_another_sequence():
    student, teacher = SCORES[0][..., :3], SCORES[1][..., :3]
    np.testing.assert_allclose(
        attention_score_loss(student, teacher),
        np.square(np.asarray(student) - np.asarray(teacher)).mean((1, 2, 3)),
        rtol=1e-5,
    )
    with pytest.raises(ValueError, match="mask needs as many queries as keys, but scores have 4"):
        attention_score_loss(student, teacher, MASK)


@pytest.mark.parametrize("heads", [1, 3])
def test_relations_split_the_width_into_any_number_of_heads(heads):
    teacher = draw(7, 3, 4, 9)
    np.testing.assert_allclose(
        relation_loss(STATES[0], teacher, heads, MASK),
        oracles.relation_loss(STATES[0], teacher, heads, np.asarray(MASK)),
        rtol=2e-5,
    )


def test_triple_loss_is_the_weighted_sum_of_its_parts():
    real = np.asarray(MASK)
    parts = [
        oracles.word_level_loss(*LOGITS, 4.0, real),
        oracles.masked_word_loss(LOGITS[0], LABELS, real),
        oracles.cosine_loss(*STATES, real),
    ]
    for weights, expected in zip(np.eye(3), parts, strict=True):
        a, b, c = (float(weight) for weight in weights)
        loss = triple_loss(*LOGITS, LABELS, *STATES, MASK, 4.0, (a, b, c))
        np.testing.assert_allclose(loss, expected, rtol=2e-5)
    assert parts[1][1] == 0.0  # the second sequence has labels on padding alone


def test_states_of_the_triple_loss_learn_but_not_the_teachers():
    def loss(student, teacher):
        return triple_loss(*LOGITS, LABELS, student, teacher, MASK).sum()

    to_student, to_teacher = jax.grad(loss, argnums=(0, 1))(*STATES)
    chex.assert_trees_all_equal(to_teacher, jnp.zeros_like(STATES[1]))
    expected = jax.grad(lambda s: cosine_loss(s, STATES[1], MASK).sum())(STATES[0])
    chex.assert_trees_all_close(to_student, expected, rtol=1e-6)
    assert np.count_nonzero(to_student[0]) == to_student[0].size


def test_token_mean_counts_real_tokens_only(variant):
    losses = jnp.arange(12.0).reshape(3, 4).at[1, 2].set(jnp.inf)
    means = variant(token_mean)(losses, MASK.at[2].set(False))
    np.testing.assert_allclose(means, [1.5, 4.5, 0.0])
    np.testing.assert_allclose(token_mean(losses[::2]), [1.5, 9.5])


def test_another_divergence_replaces_the_default():
    def squares(student, teacher, temperature):
        return temperature * jnp.sum((student - teacher) ** 2, axis=-1)

    expected = 2.0 * 5 * oracles.hidden_state_loss(*LOGITS, np.asarray(MASK))
    loss = word_level_loss(*LOGITS, MASK, 2.0, squares)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    to_teacher = jax.grad(lambda t: word_level_loss(LOGITS[0], t, MASK, 2.0, squares).sum())
    chex.assert_trees_all_equal(to_teacher(LOGITS[1]), jnp.zeros_like(LOGITS[1]))


def prefix_logits(tokens, table):
    """Look up logits by a running sum, in which every earlier token counts."""
    places = jnp.arange(1, 1 + tokens.shape[1])[None]
    return table[jnp.cumsum(tokens * places + 1, axis=1) % table.shape[0]]


def test_cold_sampling_is_greedy_decoding(variant):
    logits_fn = partial(prefix_logits, table=draw(8, 11, 5))
    prompt = jnp.array([[1, 2], [4, 0], [3, 3]])
    with jax.numpy_dtype_promotion("strict"):
        tokens = variant(lambda key, p: sample_tokens(key, logits_fn, p, 6, 1e-4))(
            jax.random.key(0), prompt
        )
    assert tokens.dtype == prompt.dtype
    np.testing.assert_array_equal(tokens, oracles.greedy(logits_fn, prompt, 6))


def test_sampled_frequencies_are_those_of_the_model():
    table, temperature, batch = draw(9, 3, 3), 1.5, 6000
    prompt = jnp.zeros((batch, 1), jnp.int32)

    @jax.jit
    def sample(key, table, temperature):
        return sample_tokens(key, lambda tokens: table[tokens], prompt, 2, temperature)

    tokens = sample(jax.random.key(1), table, temperature)
    np.testing.assert_array_equal(tokens[:, 0], 0)
    counts = np.zeros((3, 3))
    np.add.at(counts, (tokens[:, 1], tokens[:, 2]), 1)
    follow = np.exp(oracles.log_softmax(np.asarray(table, np.float64) / temperature))
    expected = batch * follow[0][:, None] * follow
    # Chi-square with 8 degrees of freedom: a right sampler exceeds 26 once in a thousand keys.
    assert (np.square(counts - expected) / expected).sum() < 26
    cold = np.exp(oracles.log_softmax(np.asarray(table, np.float64)))
    unlike = batch * cold[0][:, None] * cold
    assert (np.square(counts - unlike) / unlike).sum() > 100  # the temperature is seen
    assert (tokens != sample(jax.random.key(2), table, temperature)).any()


def test_no_gradient_flows_through_the_draws():
    teacher, prompt, key = draw(10, 4, 4), jnp.array([[0], [3]]), jax.random.key(3)

    def continuation(table):
        return sample_tokens(key, lambda tokens: table[tokens], prompt, 3)

    def loss(table, tokens):
        return word_level_loss(table[tokens], teacher[tokens]).sum()

    table = draw(11, 4, 4)
    inside = jax.jit(jax.grad(lambda table: loss(table, continuation(table))))(table)
    outside = jax.grad(loss)(table, continuation(table))
    np.testing.assert_allclose(inside, outside, rtol=1e-5, atol=1e-7)


def test_mixing_takes_all_or_nothing_at_the_ends(variant):
    given, sampled = jnp.arange(20).reshape(10, 2), -jnp.arange(20).reshape(10, 2)
    mix = variant(lambda fraction: mix_on_policy(jax.random.key(0), fraction, given, sampled))
    chex.assert_trees_all_equal(mix(0.0), given)
    chex.assert_trees_all_equal(mix(1.0), sampled)


def test_mixing_takes_whole_sequences_at_the_rate_asked_for():
    given, sampled = jnp.zeros((5000, 3), jnp.int32), jnp.ones((5000, 3), jnp.int32)
    mixed = mix_on_policy(jax.random.key(4), 0.3, given, sampled)
    np.testing.assert_array_equal(mixed.min(1), mixed.max(1))
    assert abs(float(mixed[:, 0].mean()) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 5000)
    masks = mix_on_policy(jax.random.key(4), 0.3, given[:, 0] > 0, sampled[:, 0] > 0)
    np.testing.assert_array_equal(masks, mixed[:, 0] == 1)  # one key, one choice


@pytest.mark.parametrize("loss", [hidden_state_loss, normalized_state_loss, cosine_loss])
def test_states_must_fit(loss):
    with pytest.raises(ValueError, match=r"student_states and teacher_states .* \(3, 4, 5\)"):
        loss(STATES[0], STATES[1][..., :5])
    with pytest.raises(ValueError, match="of 3 axes or more"):
        loss(STATES[0][0], STATES[1][0])
    with pytest.raises(ValueError, match=r"mask must have shape \(3, 4\), .* not \(3, 2\)"):
        loss(*STATES, MASK[:, :2])
    with pytest.raises(TypeError, match="mask must be booleans, .* not int32"):
        loss(*STATES, MASK.astype(jnp.int32))


def test_attention_must_fit():
    with pytest.raises(ValueError, match="student_scores and teacher_scores must have the same"):
        attention_score_loss(SCORES[0], SCORES[1][:, :1])
    with pytest.raises(ValueError, match="student_probs and teacher_probs must have the same"):
        attention_distribution_loss(SCORES[0], SCORES[1][:, :1])
    with pytest.raises(ValueError, match=r"mask must have shape \(3, 4\)"):
        attention_distribution_loss(*SCORES, MASK[:2])


def test_relations_must_fit():
    with pytest.raises(ValueError, match="heads must divide the student's width 6, but 4 does not"):
        relation_loss(STATES[0], draw(0, 3, 4, 8), 4)
    with pytest.raises(ValueError, match="heads must divide the teacher's width 8, but 3 does not"):
        relation_loss(STATES[0], draw(0, 3, 4, 8), 3)
    with pytest.raises(ValueError, match="heads must divide the student's width 6, but 0 does not"):
        relation_loss(*STATES, 0)
    with pytest.raises(ValueError, match=r"same batch and tokens, not \(3, 4\) and \(3, 2\)"):
        relation_loss(STATES[0], STATES[1][:, :2], 2)
    with pytest.raises(ValueError, match=r"shape \(batch, tokens, width\), not \(4, 6\)"):
        relation_loss(STATES[0][0], STATES[1], 2)
    with pytest.raises(ValueError, match=r"mask must have shape \(3, 4\)"):
        relation_loss(*STATES, 2, MASK[:2])


def test_the_triple_losss_arguments_must_fit():
    with pytest.raises(ValueError, match="student_logits and teacher_logits must have the same"):
        triple_loss(LOGITS[0], LOGITS[1][..., :3], LABELS, *STATES)
    with pytest.raises(ValueError, match=r"labels must have shape \(3, 4\), .* not \(3,\)"):
        triple_loss(*LOGITS, LABELS[:, 0], *STATES)
    with pytest.raises(TypeError, match="labels must be whole numbers, not float32"):
        triple_loss(*LOGITS, LABELS.astype(jnp.float32), *STATES)
    with pytest.raises(ValueError, match=r"must have batch and tokens \(3, 4\) .* not \(3, 2\)"):
        triple_loss(*LOGITS, LABELS, STATES[0][:, :2], STATES[1][:, :2])
    with pytest.raises(ValueError, match="weights must be three, .* not 2"):
        triple_loss(*LOGITS, LABELS, *STATES, weights=(1.0, 2.0))  # pyright: ignore
    with pytest.raises(ValueError, match="temperature must be positive, not 0"):
        triple_loss(*LOGITS, LABELS, *STATES, temperature=0)
    with pytest.raises(ValueError, match=r"mask must have shape \(3, 4\)"):
        triple_loss(*LOGITS, LABELS, *STATES, MASK[:2])


def test_sequences_must_fit():
    with pytest.raises(ValueError, match=r"losses must have shape \(batch, tokens\), not \(4,\)"):
        token_mean(jnp.zeros(4), MASK[0])
    with pytest.raises(ValueError, match=r"mask must have shape \(3, 2\)"):
        token_mean(jnp.zeros((3, 2)), MASK)
    with pytest.raises(ValueError, match="student_logits and teacher_logits must have the same"):
        word_level_loss(LOGITS[0], LOGITS[1][:2])
    with pytest.raises(ValueError, match="temperature must be positive, not -1"):
        word_level_loss(*LOGITS, temperature=-1)


def test_bad_sampling_arguments_are_named():
    key, prompt = jax.random.key(0), jnp.array([[1]])

    def logits_fn(tokens):
        return jnp.zeros((*tokens.shape, 3))

    with pytest.raises(ValueError, match="length must be at least 1, not 0"):
        sample_tokens(key, logits_fn, prompt, 0)
    with pytest.raises(ValueError, match=r"shape \(batch, at least 1\), not \(1, 0\)"):
        sample_tokens(key, logits_fn, prompt[:, :0], 2)
    with pytest.raises(TypeError, match="prompt must be whole numbers, not float32"):
        sample_tokens(key, logits_fn, prompt.astype(jnp.float32), 2)
    with pytest.raises(ValueError, match="temperature must be positive, not 0.0"):
        sample_tokens(key, logits_fn, prompt, 2, 0.0)
    with pytest.raises(ValueError, match=r"logits_fn must return shape \(1, 3, .* not \(1, 3\)"):
        sample_tokens(key, lambda tokens: tokens * 1.0, prompt, 2)


def test_bad_mixing_arguments_are_named():
    key, tokens = jax.random.key(0), jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(ValueError, match=r"fraction must lie in \[0, 1\], not 1.5"):
        mix_on_policy(key, 1.5, tokens, tokens)
    with pytest.raises(ValueError, match=r"same shape \(batch, ...\), not \(2, 3\) and \(2, 2\)"):
        mix_on_policy(key, 0.5, tokens, tokens[:, :2])
    with pytest.raises(TypeError, match="same dtype, not int32 and float32"):
        mix_on_policy(key, 0.5, tokens, tokens.astype(jnp.float32))
