"""FlowCut against its authors' code: exact indices, floats within 1e-5, features to scale.

Axes: B batch, N slots now, H heads, d features a head.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import invariants, mostly_long, recorded
from helpers.golden_vit import arrays

from models.backbones.vit import OFFERS, Block
from models.plan import Host, make_plan
from models.stack import Stack
from ops import tokens as tk
from ops.reducers import REDUCERS
from ops.reducers.projector.flowcut import FlowCut, flow, surplus
from ops.signals import Signals
from ops.tokens import SPECIAL, VISUAL, TokenSet

CLOSE = {'atol': 1e-5, 'rtol': 0}
DEPTH, WIDTH, HEADS, MLP = 8, 24, 3, 32


def load(name):
  return recorded.arrays(f'vlm_pre/flowcut_{name}')


def to_scale(found, expected):
  np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def image_tokens(x):
  """[CLS], then patches in raster order."""
  batch, slots, _ = x.shape
  kind = np.where(np.arange(slots) < 1, SPECIAL, VISUAL).astype(np.int8)
  pos = np.arange(-1, slots - 1).astype(np.int32)
  return TokenSet.create(jnp.asarray(x), kind=np.tile(kind, (batch, 1)),
                         pos=np.tile(pos, (batch, 1)), protected=1)


def test_components():
  raw = load('components')
  free = np.ones(raw['cls_attn'].shape, bool)
  length = np.abs(raw['value_metric']).sum(axis=2)
  shares = np.asarray(jax.jit(flow)(raw['cls_attn'], raw['semantic_attn'], free))
  np.testing.assert_allclose(shares * length, raw['score'], **CLOSE)
  table = [tuple(map(int, row)) for row in raw['prune_table_rpl_target_num']]
  found = jax.jit(lambda attention, free: [
      surplus(attention, free, target=target, left=left) for left, target, _ in table])(
          raw['cls_attn'], free)
  # The release prunes all rows of a batch by the largest count.
  assert [np.asarray(each).max() for each in found] == [lost for _, _, lost in table]


@pytest.mark.long
def test_steps(monkeypatch):
  """Layer after layer: the memory, what is kept, and how many by themselves."""
  raw = load('steps_case0')
  target = int(raw['target_incl_cls']) - 1
  tokens = image_tokens(raw['hidden0'])
  for layer in range(6):
    attention, semantic, metric = (jnp.asarray(raw[f'L{layer}_{name}']) for name in (
        'cls_attn', 'semantic_attn', 'value_metric'))
    # What the values' own attention would be is given here; the encoder below computes it.
    monkeypatch.setattr('ops.reducers.projector.flowcut.value_attention',
                        lambda tokens, values, given=semantic: given)
    signals = Signals(cls_attention=attention, values=metric[:, :, None], layer=layer, depth=8)
    method = FlowCut(target=target)
    tokens = tokens.replace(stats=method.watch(tokens, signals))
    if layer % 2:
      capacity = tokens.slots - 1 if layer < 5 else target + 1
      answer = method(tokens, signals, num_slots=capacity)
      count = int(answer.valid.sum())
      assert answer.valid[:, :count].all()
      fixed = FlowCut()(tokens, signals, num_slots=count)
      np.testing.assert_array_equal(answer.src[:, :count], fixed.src)
      tokens = tk.reduce(tokens, fixed)
    np.testing.assert_allclose(tokens.stats['flow'][:, 1:], raw[f'L{layer}_cum_score_out'], **CLOSE)
    # Before the first cut the release numbers all slots, [CLS] included.
    places = tokens.pos + 1 if layer == 0 else tokens.pos[:, 1:]
    np.testing.assert_array_equal(places, raw[f'L{layer}_keep_out'])
  np.testing.assert_array_equal(tokens.pos[:, 1:], raw['final_keep'])
  np.testing.assert_array_equal(tokens.x, raw['final_hidden'])


def block_weights(raw):
  """The eight blocks of the release's encoder, stacked, in our layout."""
  def stack(name, shape):
    arrays = [raw[f'w.layers.{layer}.{name}'] for layer in range(DEPTH)]
    return np.stack([(a.T if a.ndim == 2 else a).reshape(shape) for a in arrays])

  head = WIDTH // HEADS
  parts = [f'self_attn.{name}_proj' for name in 'qkv']
  return {
      **{f'norm{i}': {'scale': stack(f'layer_norm{i}.weight', (WIDTH,)),
                      'bias': stack(f'layer_norm{i}.bias', (WIDTH,))} for i in (1, 2)},
      'qkv': {'kernel': np.stack([stack(f'{p}.weight', (WIDTH, HEADS, head)) for p in parts], 2),
              'bias': np.stack([stack(f'{p}.bias', (HEADS, head)) for p in parts], 1)},
      'out': {'kernel': stack('self_attn.out_proj.weight', (HEADS, head, WIDTH)),
              'bias': stack('self_attn.out_proj.bias', (WIDTH,))},
      'fc1': {'kernel': stack('mlp.0.weight', (WIDTH, MLP)), 'bias': stack('mlp.0.bias', (MLP,))},
      'fc2': {'kernel': stack('mlp.2.weight', (MLP, WIDTH)), 'bias': stack('mlp.2.bias', (WIDTH,))},
  }


@functools.partial(jax.jit, static_argnums=0)
def run(stack, params, x):
  return stack.apply({'params': params}, image_tokens(x))


def encode(x, *, depth=DEPTH, **config):
  """CLIP's first blocks under a plan: (tokens, what the stack tells)."""
  block = Block(WIDTH, HEADS, MLP, norm_eps=1e-5, activation='quick_gelu', parent=None)
  plan = make_plan({'method': 'flowcut', 'layers': (1, 3, 5)} | config,
                   Host(depth, 65, 1, OFFERS | {'cls_attention'}))
  params = {'blocks': jax.tree.map(lambda leaf: leaf[:depth], block_weights(load('encoder_B1')))}
  return arrays(run(Stack(block, depth, plan, capture=True), params, x))


@pytest.mark.long
@pytest.mark.parametrize(('name', 'site'), [
    ('encoder_B1', 'between'), ('encoder_B1', 'after'), ('encoder_B2', 'between')])
def test_encoder(name, site):
  """With the release's counts as the schedule, where a batch of it shares them."""
  raw = load(name)
  lens = raw['lens']
  assert raw['select_layer'] == 6
  keep = tuple(int(n) - 1 for n in lens[[2, 4, 6]])
  tokens, out = encode(raw['x'], keep=keep, site=site)
  assert [x.shape[1] for x in out['hidden']] == list(lens[1:])
  np.testing.assert_array_equal(tokens.pos[:, 1:], raw['keep_indices'])
  to_scale(out['hidden'][-2][:, 1:], raw['features'])


@pytest.mark.long
def test_encoder_finds_its_own_counts():
  """Alone in its batch a row is cut as the release cuts it; what is left over is padding."""
  raw = load('encoder_B1')
  tokens, out = encode(raw['x'], keep=(60, 58, 20), args={'target': 16})
  assert [int(cut.valid.sum()) for cut in out['cuts'].values()] == list(raw['lens'][[2, 4, 6]])
  assert tokens.slots == 21
  np.testing.assert_array_equal(tokens.pos[:, 1:17], raw['keep_indices'])
  to_scale(out['hidden'][-2][:, 1:17], raw['features'])


@pytest.mark.long
def test_rows_do_not_share_their_counts():
  """In a batch of the release they do: it takes the largest loss for all."""
  raw = load('encoder_B2')
  settings = {'keep': (60, 58, 20), 'args': {'target': 16}}
  _, out = encode(raw['x'], **settings)
  counts = {layer: cut.valid.sum(axis=1) for layer, cut in out['cuts'].items()}
  assert counts[1].min() == raw['lens'][2]
  assert counts[1].max() > counts[1].min()
  np.testing.assert_array_equal(counts[5], 17)
  _, alone = encode(raw['x'][1:], **settings)
  for layer, cut in alone['cuts'].items():
    together = out['cuts'][layer]
    np.testing.assert_array_equal(cut.valid[0], together.valid[1])
    np.testing.assert_array_equal(cut.pos[0], together.pos[1])


def test_without_a_class_token():
  """The release's score for Qwen2-VL, from its formula: received attention times |value|."""
  rng = np.random.default_rng(0)
  first, second = (rng.uniform(size=(2, 3, 9)).astype(np.float32) for _ in range(2))
  values = rng.normal(size=(2, 9, 3, 4)).astype(np.float32)
  length = np.abs(values.mean(axis=2)).sum(axis=2)
  method = FlowCut(by='received_attention')
  assert method.needs == method.watch_needs == {'received_attention', 'values'}

  @jax.jit
  def watched(values, *attentions):
    tokens = TokenSet.create(jnp.zeros((2, 9, 4)))
    for attention in attentions:
      tokens = tokens.replace(stats=method.watch(tokens, Signals(
          received_attention=attention, values=values)))
    return tokens.stats['flow'], method(tokens, Signals(), num_slots=4)

  memory, answer = watched(values, first, second)
  expected = (first.mean(axis=1) + second.mean(axis=1)) / 2 * length
  np.testing.assert_allclose(memory, expected, **CLOSE)
  np.testing.assert_array_equal(answer.src, np.sort(np.argsort(-expected, axis=1)[:, :4], axis=1))


@dataclasses.dataclass(frozen=True)
class Adaptive(FlowCut):
  """FlowCut as it is where it finds its own counts, which sharper attention makes differ."""

  target: int | None = 5
  spare: int = 0

  def attention(self, signals):
    return super().attention(signals) ** 3


@dataclasses.dataclass(frozen=True)
class Received(FlowCut):
  """FlowCut as it is on a backbone without [CLS]."""

  by: str = 'received_attention'


@pytest.mark.parametrize('form', [Adaptive, Received], ids=lambda form: form.__name__)
@pytest.mark.parametrize('invariant', mostly_long([
    pytest.param(name, marks=pytest.mark.long if name == 'budgets' else [])
    for name in invariants.INVARIANTS], short=6))
def test_other_forms_keep_the_contract(form, invariant, monkeypatch):
  monkeypatch.setitem(REDUCERS, f'flowcut_{form.__name__}', form)
  invariants.INVARIANTS[invariant](f'flowcut_{form.__name__}')


def test_memory_counts():
  """Without a watch a cut goes by its own layer alone; with one, by all up to it."""
  x = load('encoder_B1')['x']
  watched, alone = (encode(x, depth=3, keep=30, layers=2, watch=watch)[0] for watch in (None, ()))
  assert not alone.stats
  assert set(watched.stats) == {'flow'}
  kept = [set(np.asarray(tokens.pos[0]).tolist()) for tokens in (watched, alone)]
  assert kept[0] != kept[1]


@pytest.mark.parametrize(('args', 'message'), [
    ({'target': 0}, 'target=0 must be at least 1, or None to fill every slot'),
    ({'by': 'cls'}, "by='cls' is unknown: choose one of cls_attention, received_attention")])
def test_errors(args, message):
  with pytest.raises(ValueError, match=message):
    FlowCut(**args)
