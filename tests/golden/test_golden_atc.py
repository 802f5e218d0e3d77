"""ATC against the outputs of released code: exact clusters, floats within 1e-5."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_vit, mostly_long
from sklearn.cluster import AgglomerativeClustering

from ops import tokens as tk
from ops.reducers.vision.atc import ATC, LINKAGES
from ops.signals import Signals
from ops.tokens import SPECIAL, VISUAL, TokenSet

CLOSE = {'atol': 1e-5, 'rtol': 0}


def operate(linkage, x, size, keys, *, protected, keep):
  """The reduced tokens; keys float[B, N, d]."""
  kind = np.where(np.arange(x.shape[1]) < protected, SPECIAL, VISUAL).astype(np.int8)
  tokens = TokenSet.create(jnp.asarray(x), kind=np.tile(kind, (len(x), 1)), size=size,
                           protected=protected)
  method = jax.jit(functools.partial(ATC(linkage=linkage), num_slots=keep))
  return tk.reduce(tokens, method(tokens, Signals(keys=keys[:, :, None])))


def same_partition(ours, theirs):
  """Numbers of clusters may differ, who is with whom may not."""
  np.testing.assert_array_equal(ours[:, None] == ours[None], theirs[:, None] == theirs[None])


@pytest.mark.long
@pytest.mark.parametrize('case', ['a', 'b', 'c'])
def test_op(case):
  raw = golden_vit.load('atc')
  x, size, metric = (raw[f'{case}_{name}'] for name in ('x', 'size', 'metric'))
  labels, protected = raw[f'{case}_labels'], int(raw[f'{case}_class_token'])
  keep = int(raw[f'{case}_num_clusters']) + protected
  reduced = operate(str(raw[f'{case}_linkage']), x, size[..., 0], metric, protected=protected,
                    keep=keep)
  for row in range(len(x)):
    owner = np.asarray(reduced.owner[row])
    same_partition(owner, labels[row])
    # Their number of each of our clusters, by any of its members.
    number = labels[row][[np.flatnonzero(owner == slot)[0] for slot in range(keep)]]
    np.testing.assert_allclose(reduced.x[row], raw[f'{case}_out'][row][number], **CLOSE)
    np.testing.assert_allclose(reduced.size[row], raw[f'{case}_out_size'][row, number, 0], **CLOSE)
    # In the order of their lowest slots.
    assert (np.diff([np.flatnonzero(owner == slot)[0] for slot in range(keep)]) > 0).all()


@pytest.mark.parametrize('linkage', LINKAGES)
@pytest.mark.parametrize('keep', mostly_long([1, 4, 17], short=3))
def test_every_linkage_clusters_as_scikit_learn_does(linkage, keep):
  metric = np.random.default_rng(keep).normal(size=(2, 24, 6)).astype(np.float32)
  reduced = operate(linkage, metric, None, metric, protected=0, keep=keep)
  unit = metric / np.linalg.norm(metric, axis=2, keepdims=True)
  for row in range(2):
    theirs = AgglomerativeClustering(n_clusters=keep, metric='precomputed', linkage=linkage).fit(
        1 - unit[row] @ unit[row].T).labels_
    same_partition(np.asarray(reduced.owner[row]), theirs)


def test_unknown_linkage():
  with pytest.raises(ValueError, match="linkage='ward' is unknown: choose one of single, complete"):
    ATC(linkage='ward')
