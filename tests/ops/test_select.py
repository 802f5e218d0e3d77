"""Selection: ties, forced and excluded slots, scores that are no numbers, and order.

Axes: B batch, N slots now, M slots after.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops.primitives.select import keep_top, rank_of, ranks, top
from ops.tokens import SPECIAL, VISUAL, TokenSet, reduce

SLOTS = 8
# Few distinct values make ties; the rest is what arithmetic gone wrong leaves behind.
SCORES = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, 3e38, -3e38, np.inf, -np.inf, np.nan]),
                  min_size=SLOTS, max_size=SLOTS)
FLAGS = st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS)

jitted = jax.jit(top, static_argnames='num_slots')


def order_of(scores, forced, excluded):
  """The contract of `top` as a sort: class, then score, then slot."""

  def key(slot):
    score = -np.inf if np.isnan(scores[slot]) else scores[slot]
    rank = 2 if excluded[slot] else 0 if forced[slot] else 1
    # Beyond a quarter of the largest float, scores count as equal.
    return rank, 0.0 if rank != 1 else -np.clip(score, -8.5e37, 8.5e37), slot

  return sorted(range(SLOTS), key=key)


@given(scores=SCORES, forced=FLAGS, excluded=FLAGS, keep=st.sampled_from([1, 3, SLOTS]))
def test_top_sorts_by_class_then_score_then_slot(scores, forced, excluded, keep):
  picked = jitted(np.array([scores], np.float32), num_slots=keep, forced=np.array([forced]),
                  excluded=np.array([excluded]))
  assert picked.dtype == jnp.int32
  assert picked[0].tolist() == order_of(scores, forced, excluded)[:keep]


def test_top_without_flags_and_of_half_precision():
  scores = jnp.array([[1.0, 3.0, 3.0, 2.0]], jnp.bfloat16)
  assert top(scores, 4).tolist() == [[1, 2, 3, 0]]
  assert top(jnp.full((2, 4), jnp.nan), 2).tolist() == [[0, 1], [0, 1]]


@pytest.mark.long
@given(order=st.permutations(range(SLOTS)), picked=st.integers(1, SLOTS))
def test_ranks_invert_a_selection(order, picked):
  found = np.asarray(ranks(jnp.array([order[:picked]]), SLOTS))[0]
  assert [int(found[slot]) for slot in order[:picked]] == list(range(picked))
  assert all(found[slot] == picked for slot in order[picked:])


@given(flags=FLAGS)
def test_place_counts_what_came_before(flags):
  found = rank_of(jnp.array([flags]))
  assert found.dtype == jnp.int32
  assert found[0].tolist() == [sum(flags[:slot]) for slot in range(SLOTS)]


def tokens(valid=None):
  kind = jnp.array([[VISUAL, SPECIAL, VISUAL, VISUAL, SPECIAL, VISUAL]], jnp.int8)
  return TokenSet.create(jnp.zeros((1, 6, 2)), kind=kind, valid=valid)


def test_keep_top_keeps_what_it_may_not_touch_in_either_order():
  scores = jnp.array([[1.0, -9.0, 3.0, 2.0, -9.0, 3.0]])
  assert keep_top(tokens(), scores, num_slots=4).src.tolist() == [[1, 2, 4, 5]]
  assert keep_top(tokens(), scores, num_slots=5, order='score').src.tolist() == [[1, 4, 2, 5, 3]]


def test_keep_top_prefers_any_token_to_padding():
  valid = jnp.array([[True, True, False, True, False, False]])
  scores = jnp.array([[-jnp.inf, 0.0, 9.0, jnp.nan, 9.0, jnp.inf]])
  for order in ('slot', 'score'):
    kept = reduce(tokens(valid), keep_top(tokens(valid), scores, num_slots=3, order=order))
    assert sorted(kept.pos[0].tolist()) == [0, 1, 3]
    assert kept.valid.all()
    assert reduce(tokens(valid), keep_top(tokens(valid), scores, num_slots=5)).valid.sum() == 3


def test_keep_top_knows_two_orders():
  with pytest.raises(ValueError, match="order='best' is unknown: choose 'slot' or 'score'"):
    keep_top(tokens(), jnp.zeros((1, 6)), num_slots=2, order='best')
