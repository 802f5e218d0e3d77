"""Methods on the cache of a real model against kvpress 0.5.5: what stays, and what follows.

WINNOW_REAL names a folder with SmolLM2-135M-Instruct.Q4_1.gguf somewhere in it. The fixture holds,
for one prompt of 256 tokens, what each press leaves in each of 30 layers and 3 kv heads, and the
largest logits of the next four steps.

All heads keep the same entries, but for ties, which a sort may break either way:
* knorm, and chunk over it: copies of a token have equal keys before rotation in layer 0, whose
  lengths then differ in the last bit alone.
* lagkv: scores are ranks within a part, equal across parts; the last places go to equals.

Axes: L layers, K kv heads, N entries, d features a head.
"""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import recorded

from models.plan import make_cache_plan
from ops import signals
from ops.caches.heads import KVHeads, Pages
from ops.kv_cache import Cache, KVGather
from ops.tokens import TokenSet

FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'
PROMPT, STEPS, HEADS, DEPTH = 256, 3, 3, 30
SNAPKV = {'method': 'snapkv', 'args': {'window': 32}}
PRESSES = {
    'knorm': {'method': 'knorm'},
    'streaming_llm': {'method': 'streaming_llm'},
    'snapkv': SNAPKV,
    'tova': {'method': 'tova'},
    'expected_attention': {'method': 'expected_attention'},
    'observed_attention': {'method': 'observed_attention'},
    'keydiff': {'method': 'keydiff'},
    'lagkv': {'method': 'lagkv', 'args': {'lag': 32}},
    'cur': {'method': 'cur'},
    'pyramidkv': {'method': 'pyramidkv', 'args': {
        'beta': 3, 'inner': {'method': 'snapkv', 'args': {'window': 16}}}},
    'chunkkv_snapkv': {'method': 'chunkkv', 'args': {'inner': SNAPKV}},
    'criticalkv_snapkv': {'method': 'criticalkv', 'args': {'inner': SNAPKV}},
    'simlayerkv': {'method': 'simlayerkv', 'args': {'recent': 64}, 'keep_ratio': None},
    'chunk_knorm': {'method': 'chunk', 'args': {'length': 64, 'inner': {'method': 'knorm'}}},
    'adakv_snapkv': {'method': 'adakv', 'args': {'inner': SNAPKV}},
    'criticaladakv_snapkv': {'method': 'criticaladakv', 'args': {'inner': SNAPKV}},
    'adakv_expected_attention': {'method': 'adakv', 'args': {
        'inner': {'method': 'expected_attention'}}},
    # Of a file of their own; sketches are those that are drawn here.
    'leverage': {'method': 'compactor', 'args': {'by': 'leverage', 'sinks': 0, 'recent': 0}},
    'non_causal': {'method': 'compactor', 'args': {'by': 'attention', 'chunk': 96, 'sinks': 0,
                                                   'recent': 0}},
    'compactor': {'method': 'compactor'},
    'expected_attention_no_value': {'method': 'expected_attention', 'args': {'weigh': 'none'}},
}
# Heads that may differ, and in which layers.
TIES = {'knorm': (1, range(1)), 'chunk_knorm': (2, range(1)), 'lagkv': (90, range(30))}


def golden():
  return recorded.arrays('real/kvpress_smollm2') | recorded.arrays('real/kvpress_smollm2_more')


def kept_by(press):
  """The entries that a press leaves, one set a head: [L][K]."""
  raw = golden()
  if f'{press}_kept_mask' in raw:
    masks = np.unpackbits(raw[f'{press}_kept_mask'], axis=-1)
    return [[set(np.flatnonzero(head)) for head in layer] for layer in masks]
  layers = raw.get(f'{press}_kept')
  if layers is None:
    layers = [raw[f'{press}_kept_{layer:02d}'] for layer in range(DEPTH)]
  return [[set(head) for head in layer] for layer in layers]


def planned(lm, press):
  config = {'keep_ratio': 0.4, **PRESSES[press]}
  return lm.clone(cache_plan=make_cache_plan(config, lm.host(PROMPT)))


@functools.cache
def real():
  """The model and its parameters."""
  gguf = pytest.importorskip('gguf')
  assert gguf
  from models.checkpoints import gguf as files
  from models.checkpoints import load
  from models.checkpoints.lm_config import from_config
  folder = os.environ.get('WINNOW_REAL')
  if not folder:
    pytest.skip('WINNOW_REAL names no folder with the weights')
  found = sorted(pathlib.Path(folder).rglob(FILE))
  if not found:
    pytest.skip(f'{folder} has no {FILE}')
  lm = from_config(files.config(found[0]))
  return lm, {'params': load(lm, found[0], storage='unstacked')}


def read(lm, room=STEPS):
  weights = real()[1]
  ids = jnp.asarray(golden()['ids'][None, :PROMPT])
  return jax.jit(functools.partial(lm.apply, room=room, method='prefill'))(weights, ids)


@functools.cache
def whole():
  """Logits after the prompt, and the cache of all of it, without room."""
  return read(real()[0], room=0)


@functools.cache
def decoder():
  return jax.jit(functools.partial(real()[0].apply, method='decode'))


def logits_that_follow(logits, cache):
  raw = golden()
  rows = [logits]
  for step in range(STEPS):
    logits, cache = decoder()(real()[1], jnp.asarray(raw['ids'][PROMPT + step][None]), cache)
    rows.append(logits)
  return np.stack([np.asarray(row[0])[top] for row, top in zip(rows, raw['top'], strict=True)])


def held(kv):
  """The entries of a layer's cache, one set a head."""
  if hasattr(kv, 'prompt'):
    assert isinstance(kv.prompt, Pages)
    head, pos, valid = (np.asarray(x[0]) for x in (kv.prompt.head, kv.prompt.pos, kv.prompt.valid))
    return [set(pos[head == h][valid[head == h]]) for h in range(HEADS)]
  pos, valid = (np.broadcast_to(np.asarray(x[0])[..., :kv.filled], (HEADS, kv.filled))
                for x in (kv.pos, kv.valid))
  return [set(p[v]) for p, v in zip(pos, valid, strict=True)]


@pytest.mark.long
@pytest.mark.parametrize('press', PRESSES)
def test_every_head_keeps_what_the_press_keeps(press):
  lm = planned(real()[0], press)
  logits, cache = read(lm)
  wanted, differing = kept_by(press), []
  for layer, kv in enumerate(cache.layers):
    for head, (got, want) in enumerate(zip(held(kv), wanted[layer], strict=True)):
      assert len(got) == len(want)
      if got != want:
        differing.append(layer)
        mine, theirs = sorted(got - want), sorted(want - got)
        scores = ranking(lm, layer)[head]
        np.testing.assert_allclose(np.sort(scores[mine]), np.sort(scores[theirs]), rtol=2e-6)
  most, layers = TIES.get(press, (0, ()))
  assert len(differing) <= most
  assert set(differing) <= set(layers)
  if not differing:
    np.testing.assert_allclose(logits_that_follow(logits, cache), golden()[f'{press}_logits'],
                               atol=1e-3, rtol=0)


def ranking(lm, layer):
  """A method's scores in a layer, by the whole prompt's keys and values, float32[K, N]."""
  kv = whole()[1].layers[layer]
  tokens = TokenSet.create(jnp.zeros((1, PROMPT, 1)), pos=kv.pos)
  told = signals.Signals(keys=jnp.swapaxes(kv.k, 1, 2), values=jnp.swapaxes(kv.v, 1, 2))
  method = lm.cache_plan.only.method
  method = getattr(method, 'inner', method)  # A part's scores by length are the prompt's.
  return np.asarray(method.ranking(tokens, told, num_slots=102)[0])


@pytest.mark.long
@pytest.mark.parametrize('press', PRESSES)
def test_a_cache_of_what_the_press_keeps_gives_its_logits(press):
  logits, cache = whole()
  lm, layers = real()[0], []
  for kv, heads in zip(cache.layers, kept_by(press), strict=True):
    mask = np.zeros((1, HEADS, PROMPT), bool)
    for head, entries in enumerate(heads):
      mask[0, head, list(entries)] = True
    counts = mask.sum(axis=2)
    if len(set(counts[0])) > 1:
      answer = KVHeads.create(jnp.asarray(mask), int(counts.sum()))
    else:
      answer = KVGather(jnp.asarray(np.nonzero(mask)[2].reshape(1, HEADS, -1), jnp.int32))
    layers.append(answer.shrink(kv, positions='keep', rope=lm.rope).with_room(STEPS))
  np.testing.assert_allclose(logits_that_follow(logits, Cache(tuple(layers), cache.steps)),
                             golden()[f'{press}_logits'], atol=1e-3, rtol=0)


@pytest.mark.parametrize('press', ['pyramidkv', 'adakv_snapkv', 'criticaladakv_snapkv'])
def test_the_numbers_of_layers_are_those_of_the_press(press):
  from helpers import tiny_lm
  lm = planned(tiny_lm.TINY.clone(depth=DEPTH, context=512), press)
  counts = [sum(map(len, layer)) for layer in kept_by(press)]
  assert [HEADS * event.slots_out for event in lm.cache_plan.events] == counts


@pytest.mark.long
def test_periodic_compression_while_decoding_is_the_press():
  """DecodingPress over Knorm: the prompt whole, then every 16 given tokens down to 96 entries.

  In layer 0 more than a dozen copies of a comma have keys of one length, across the threshold: the
  press itself keeps others of them on another CPU, and its logits then differ from those recorded
  by as much as these.
  """
  raw, lm = golden(), real()[0]
  config = {'method': 'periodic', 'args': {'every': 16, 'inner': {'method': 'knorm'}},
            'keep_ratio': 1.0, 'capacity': 96}
  _, cache = read(lm.clone(cache_plan=make_cache_plan(config, lm.host(PROMPT))))
  found, ids = [], raw['ids']
  for token, top in zip(ids[PROMPT:], raw['decoding_knorm_top'], strict=True):
    logits, cache = decoder()(real()[1], jnp.asarray(token[None]), cache)
    found.append(np.asarray(logits[0])[top])
  np.testing.assert_allclose(found[:16], raw['decoding_knorm_logits'][:16], atol=1e-3)
  assert [int(kv.valid.sum(axis=2).max()) for kv in cache.layers] == list(
      raw['decoding_knorm_lengths'])
  kv = cache.layers[0]
  for pos, valid, wanted in zip(*(np.asarray(x[0]) for x in (kv.pos, kv.valid)),
                                raw['decoding_knorm_layer0_prompt_positions'], strict=True):
    kept, wanted = set(pos[valid].tolist()), set(wanted[wanted >= 0].tolist())
    exchanged = ids[sorted({place for place in kept ^ wanted if place < PROMPT})]
    # A copy that was decoded may be in the place of one of the prompt, too.
    assert all(np.sum(ids == token) > 1 for token in exchanged)
    assert len(exchanged) <= 8
