"""Our token transforming against plain numpy, within 1e-5; there is no released output."""

import numpy as np
import pytest
from helpers import contract

from ops.reducers.vision.token_transforming import TokenTransforming

CLOSE = {'atol': 1e-5, 'rtol': 0}
KEEP = 8


def oracle(case, attention, *, tau):
  """The matrix, row by row: float[B, KEEP, N]."""
  matrix = np.zeros((len(case.x), KEEP, case.x.shape[1]))
  for row in range(len(case.x)):
    patches, sizes = np.arange(1, case.x.shape[1]), case.size[row].astype(np.float64)
    keys = case.k[row].astype(np.float64).mean(1)
    keys = keys - np.average(keys[1:], axis=0, weights=sizes[1:])
    keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    scores = attention[row].mean(0)
    chosen = sorted(patches, key=lambda n, scores=scores: -scores[n])[:KEEP - 1]
    matrix[row, 0, 0] = 1
    for token in patches:
      if token in chosen:
        matrix[row, 1 + chosen.index(token), token] = sizes[token]
      else:
        share = np.exp(tau * keys[chosen] @ keys[token])
        matrix[row, 1:, token] = sizes[token] * share / share.sum()
    matrix[row, 1:] /= matrix[row, 1:].sum(axis=1, keepdims=True)
  return matrix


@pytest.mark.long
@pytest.mark.parametrize('by', ['cls_attention', 'received_attention'])
@pytest.mark.parametrize('tau', [20.0, 1.0])
def test_matrix(by, tau):
  case = contract.random_case()
  method = TokenTransforming(by=by, tau=tau)
  assert method.needs == {'keys', by}
  signals = case.signals(method.needs)
  found = method(case.tokens(), signals, num_slots=KEEP).matrix()
  np.testing.assert_allclose(found, oracle(case, getattr(signals, by), tau=tau), **CLOSE)


def test_a_sharp_similarity_merges():
  """At a large tau a token goes to its nearest, and those that stay keep to themselves."""
  case = contract.random_case()
  case = case.change(size=np.ones_like(case.size))
  method = TokenTransforming(tau=1e7)
  signals = case.signals(method.needs)
  found = np.asarray(method(case.tokens(), signals, num_slots=KEEP).matrix())
  order = np.argsort(-signals.cls_attention.mean(1)[:, 1:], axis=1)[:, :KEEP - 1] + 1
  np.testing.assert_array_equal((found > 0).sum(1), 1)
  for row, chosen in enumerate(order):
    assert (found[row, np.arange(1, KEEP), chosen] > 0).all()


def test_what_all_keys_have_in_common_does_not_count():
  """As on pretrained weights, where cosines of the keys themselves are all near one."""
  case = contract.random_case()
  method = TokenTransforming()
  told = [method(each.tokens(), each.signals(frozenset({'keys'})).replace(
      cls_attention=case.signals(method.needs).cls_attention), num_slots=KEEP).matrix()
          for each in (case, case.change(k=case.k + 50))]
  np.testing.assert_allclose(*told, atol=1e-3)


@pytest.mark.long
def test_nothing_to_remove():
  """A row with as many tokens as there is room for keeps them, beside rows that are mixed."""
  case = contract.random_case()
  case = contract.spread(case, [np.arange(KEEP), np.arange(21), np.arange(3)])
  method = TokenTransforming()
  answer = method(case.tokens(), case.signals(method.needs), num_slots=KEEP)
  np.testing.assert_array_equal(answer.matrix()[0], np.eye(KEEP, 24))
  np.testing.assert_array_equal(answer.matrix()[2][:3], np.eye(3, 24))
  np.testing.assert_array_equal(answer.matrix()[2][3:], 0)
  # Itself, and all that go.
  assert ((np.asarray(answer.matrix()[1, 1:]) > 0).sum(1) == 1 + 20 - (KEEP - 1)).all()


def test_bad_settings():
  with pytest.raises(ValueError, match='tau=0'):
    TokenTransforming(tau=0)
  with pytest.raises(ValueError, match='choose one of cls_attention, received_attention'):
    TokenTransforming(by='attention')
