"""vid-TLDR against the outputs of released code: exact indices, floats within 1e-5."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_vit

from ops import attention
from ops import tokens as tk
from ops.reducers.vision import vid_tldr
from ops.reducers.vision.vid_tldr import VidTLDR, negative_entropy, saliency
from ops.signals import Signals
from ops.tokens import TokenSet

CLOSE = {'atol': 1e-5, 'rtol': 0}


def projections(attn):
  """Queries and keys whose attention, without any bias, is float[B, H, N, N]."""
  slots = attn.shape[-1]
  queries = np.log(attn).transpose(0, 2, 1, 3) * np.sqrt(slots)
  keys = np.broadcast_to(np.eye(slots, dtype=np.float32)[None, :, None], queries.shape)
  return jnp.asarray(queries), jnp.asarray(keys)


@pytest.mark.long
@pytest.mark.parametrize('case', ['a', 'b'])
def test_op(case):
  raw = golden_vit.load('vidtldr')
  x, attn, size = (raw[f'{case}_{name}'] for name in ('x', 'attn', 'size'))
  slots, keep = x.shape[1], raw[f'{case}_out'].shape[1]
  queries, keys = projections(attn)
  np.testing.assert_allclose(attention.eager(queries, keys), attn, **CLOSE)

  tokens = TokenSet.create(jnp.asarray(x), size=size[..., 0])
  scores = saliency(negative_entropy(queries, keys, bias=None), tokens.free)
  np.testing.assert_allclose(scores, raw[f'{case}_scores'][..., 0], **CLOSE)

  method = jax.jit(functools.partial(VidTLDR(), num_slots=keep))
  assignment = method(tokens, Signals(queries=queries, keys=keys))
  reduced = tk.reduce(tokens, assignment)
  np.testing.assert_allclose(reduced.x, raw[f'{case}_out'], **CLOSE)
  np.testing.assert_allclose(reduced.size, raw[f'{case}_out_size'][..., 0], **CLOSE)
  # How much of each token every slot holds.
  member = np.asarray(assignment.dst)[:, None] == np.arange(keep)[None, :, None]
  np.testing.assert_allclose(member * np.asarray(assignment.size_weights)[:, None],
                             raw[f'{case}_source'], **CLOSE)
  removed = float(raw[f'{case}_r'])
  assert slots - keep == (int(slots * removed) if removed < 1 else removed)


@pytest.mark.parametrize('rows', [1, 5, 24, 100])
def test_entropy_in_chunks(rows, monkeypatch):
  monkeypatch.setattr(vid_tldr, 'ROWS', rows)
  raw = golden_vit.load('vidtldr')
  mean = raw['a_attn'].mean(axis=1)
  found = negative_entropy(*projections(raw['a_attn']), bias=None)
  np.testing.assert_allclose(found, np.sum(mean * np.log(mean), axis=2), **CLOSE)


def test_half_of_the_tokens_go_at_most():
  assert VidTLDR().min_slots(24, 0) == 12
  assert VidTLDR().min_slots(25, 2) == 14


def test_equal_tokens_have_no_saliency():
  found = saliency(jnp.full((1, 5), -1.25), jnp.arange(5)[None] < 4)
  np.testing.assert_array_equal(found, np.zeros((1, 5)))
