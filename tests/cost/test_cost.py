"""The cost model against the traced program, and both against what was published.

Axes: N tokens before a cut, M after it, C width.
"""

import dataclasses
import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import pytest
from helpers import golden_vit, mostly_long
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from lib.cost import jaxpr as jaxpr_cost
from lib.cost import published
from lib.cost import vit as vit_cost
from lib.runtime.meter import DEVICES, Meter, floor_seconds
from models.backbones.bert import Bert
from models.backbones.text_tower import Text
from models.backbones.vit import ViT, make_vit
from models.families import PAIRS
from models.plan import make_plan, methods
from models.plans.events import make_events
from models.reduction import Reduction
from models.storage import unstack
from ops import platforms
from ops.budgets import Cut
from ops.reducers import REDUCERS

TINY = ViT(width=16, depth=3, mlp=24, heads=2, patch=4, image_size=20, channels=2, num_classes=5)
TEXT = Text(width=16, depth=3, mlp=24, heads=2, vocabulary=11, context=20, causal=True, pool='eot',
            projection=6)
BERT = Bert(width=16, depth=3, mlp=24, heads=2, vocabulary=11, context=20)
ALL_LAYERS, TWO_LAYERS = {'remove': 3}, {'keep_ratio': 0.6, 'layers': (1, 2)}


def planned(vit, **reduction):
  return vit.clone(plan=make_plan(reduction, vit.host))


def read_before_joining(vit):
  """Products of rows that a cut inside attention joins only after they have read."""
  return vit.width * sum(
      event.slots_in ** 2 - event.slots_out ** 2 for event in (vit.plan.events if vit.plan else ())
      if event.site == 'inside' and event.method.merges)


def cuts_by(merges, site, *cuts):
  """Events of a method that joins slots, or picks them."""
  method = REDUCERS['tome' if merges else 'topk']()
  return make_events(Reduction('any', method), site, cuts)


def agree(vit, *, extra=0):
  """The analytic model and the trace give the same integer; returns the trace."""
  found = jaxpr_cost.of_vit(vit)
  assert found.macs[''] == vit_cost.of(vit).macs + extra + read_before_joining(vit)
  assert not found.uncounted
  return found


# -- the analytic model equals the trace ---------------------------------------------------------


@pytest.mark.parametrize('settings', [
    {}, {'num_classes': 0}, {'registers': 2}, {'distilled': True, 'positions': 'sincos'},
    {'dtype': jnp.bfloat16}, {'mlp': 64, 'heads': 4}, {'remat': 'full'},
    {'activation': 'swiglu', 'layer_scale': 1.0}, {'projection': 7},
    {'class_token': False, 'pool': 'map'}, {'class_token': False, 'pool': 'map', 'num_classes': 0},
    {'class_token': False, 'pool': 'map', 'activation': 'swiglu', 'projection': 7},
    {'pre_norm': True, 'patch_bias': False, 'special_positions': False},
], ids=str)
def test_unreduced_macs_equal_the_trace(settings):
  assert agree(TINY.clone(**settings)).total == vit_cost.of(TINY.clone(**settings)).macs


@pytest.mark.parametrize('settings', [
    {}, {'causal': False, 'pool': 'last', 'projection_bias': True}, {'projection': 0},
    {'activation': 'swiglu'}], ids=str)
@pytest.mark.parametrize('reduction', mostly_long([None, {'method': 'tome', 'remove': 3},
                                       {'method': 'random', **TWO_LAYERS}], short=2), ids=str)
def test_text_towers_equal_the_trace(settings, reduction):
  text = TEXT.clone(**settings)
  agree(planned(text, **reduction) if reduction else text)


@pytest.mark.parametrize('reduction', [None, {'method': 'tome', 'remove': 3}], ids=str)
def test_an_encoder_of_texts_equals_the_trace(reduction):
  agree(BERT.clone(plan=reduction and make_plan(reduction, BERT.host(20))))


def test_attention_pooling_costs_less_after_a_cut():
  vit = TINY.clone(class_token=False, pool='map')
  cut = planned(vit, method='random', keep=12, layers=1)
  agree(cut)
  assert vit_cost.of(vit).pooling - vit_cost.of(cut).pooling == (25 - 12) * (2 * 16 * 16 + 2 * 16)


def test_mean_pooling_adds_one_product():
  vit = planned(TINY.clone(class_token=False, pool='mean'), method='tome', remove=3)
  # The weighted mean over the slots is written as a product; no convention counts it.
  agree(vit, extra=vit.plan.events[-1].slots_out * vit.width)


@pytest.mark.parametrize('name', mostly_long(sorted(methods(TINY.host).keys() - {'none'}), short=8))
@pytest.mark.parametrize(('site', 'budget'), mostly_long([
    (None, {'remove': 3, 'layers': (1, 2)}), ('inside', TWO_LAYERS)]))
def test_every_method_equals_the_trace(name, site, budget):
  """At its own site and inside attention, where joining and picking slots cost differently."""
  # As few as these slots allow.
  args = {'visionzip': {'contextual': 2}}.get(name, {})
  vit = planned(TINY, method=name, args=args, site=site, **budget)
  method = vit.plan.only.method
  both = site == 'inside' and method.merges and 'values' in method.needs
  agree(vit, extra=both * sum(cut.slots_in for cut in vit.plan.events) * vit.width ** 2)


@pytest.mark.parametrize('name', ['tome', 'random'])
@pytest.mark.parametrize('site', ['before', 'inside', 'between', 'after'])
@pytest.mark.parametrize('budget', mostly_long([
    ALL_LAYERS | {'layers': (1, 2)}, {'remove': (4, -1.0), 'layers': (1, 2)},
    {'keep': 14, 'layers': 2}]), ids=str)
def test_every_site_equals_the_trace(name, site, budget):
  agree(planned(TINY, method=name, site=site, **budget))


@pytest.mark.parametrize('parts', [
    pytest.param('both', marks=pytest.mark.long), pytest.param('mlp', marks=pytest.mark.long),
    'attention'])
def test_branches_equal_the_trace(parts):
  vit = planned(TINY, method='random', site='branch', parts=parts, keep=(12, 7), layers=(0, 2))
  agree(vit)
  # 13 of 26 slots run layer 0: [CLS] and 12 patches.
  saved = {'attention': 13 * 4 * 16 ** 2 + (26 ** 2 - 13 ** 2) * 2 * 16, 'mlp': 13 * 2 * 16 * 24}
  plain, ours = (vit_cost.of(model).layers[0] for model in (TINY, vit))
  assert plain.macs - ours.macs == sum(saved[part] for part in saved if parts in (part, 'both'))
  assert [layer.left for layer in vit_cost.of(vit).layers] == [26] * 3


def test_the_methods_own_products_are_told_apart():
  matching = agree(planned(TINY, method='tome', remove=3))
  # Even against odd slots, by the mean of the keys over heads: 26, then 23, then 20 slots.
  assert matching.macs == {'': matching.macs[''],
                           'reduction': (13 * 13 + 12 * 11 + 10 * 10) * TINY.width // TINY.heads}
  rows = agree(planned(TINY, method='topk', **TWO_LAYERS))
  assert rows.macs == {'': rows.macs[''], 'signals': (26 + 16) * TINY.width}


def test_batches_multiply_and_both_forms_of_the_weights_count_the_same():
  vit = planned(TINY, method='random', keep=12, layers=1)
  assert jaxpr_cost.of_vit(vit, batch=3).total == 3 * vit_cost.of(vit).macs
  images = jax.ShapeDtypeStruct((1, 20, 20, 2), jnp.float32)
  params = jax.eval_shape(vit.init, jax.random.key(0), images)

  def unstacked(params, images):
    blocks = unstack(params['params']['stack']['blocks'], vit.depth)
    return vit.apply({'params': params['params'] | {'stack': {'blocks': blocks}}}, images)[0]

  assert jaxpr_cost.count(unstacked, params, images).total == vit_cost.of(vit).macs


@pytest.mark.long
def test_a_mesh_changes_nothing():
  axes = ('data', 'fsdp', 'tensor', 'sequence')
  mesh = AbstractMesh((2, 2, 1, 1), axes, axis_types=(AxisType.Auto,) * 4)
  vit = planned(TINY, method='tome', remove=3)
  assert jaxpr_cost.of_vit(vit.clone(mesh=mesh), batch=4) == jaxpr_cost.of_vit(vit, batch=4)


def test_masking_saves_nothing():
  vit = planned(TINY, method='topk', mode='mask', **TWO_LAYERS)
  assert agree(vit).macs[''] == vit_cost.of(TINY).macs


@pytest.mark.parametrize('reduction', mostly_long([None, {'method': 'tome', 'remove': 3},
                                       {'method': 'topk', **TWO_LAYERS},
                                       {'method': 'mctf', 'remove': 3, 'layers': (1, 2)}]), ids=str)
def test_training_takes_three_times_the_products_but_for_the_images_gradient(reduction):
  vit = planned(TINY, **reduction) if reduction else TINY
  images = jax.ShapeDtypeStruct((1, 20, 20, 2), jnp.float32)
  params = jax.eval_shape(vit.init, jax.random.key(0), images)
  found = jaxpr_cost.count(
      jax.grad(lambda p, x: jnp.sum(vit.apply(p, x)[0] ** 2)), params, images)
  assert found.macs[''] == vit_cost.of(vit).training_macs + 3 * read_before_joining(vit)
  assert vit_cost.of(vit).training_macs == 3 * vit_cost.of(vit).macs - vit_cost.of(vit).embed


@pytest.mark.parametrize('settings', [
    {}, {'num_classes': 0}, {'distilled': True}, {'registers': 3}, {'positions': 'sincos'},
    {'class_token': False, 'pool': 'mean'}, {'class_token': False, 'pool': 'map'},
    {'activation': 'swiglu', 'layer_scale': 1.0}, {'projection': 7, 'patch_bias': False},
    {'pool': 'cls_mean', 'last_norm': 'pooled'}, {'pool': 'cls_mean', 'projection': 7},
    {'pre_norm': True, 'distilled': True, 'special_positions': False},
    {'class_token': False, 'pool': 'map', 'layer_scale': 1.0, 'activation': 'swiglu'}], ids=str)
def test_parameters_and_weight_bytes_equal_the_models(settings):
  vit = TINY.clone(**settings)
  shapes = jax.eval_shape(vit.init, jax.random.key(0), jnp.zeros((1, 20, 20, 2)))
  sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)]
  assert vit_cost.of(vit).architecture.parameters == sum(sizes)
  assert vit_cost.of(vit).weight_bytes == 4 * sum(sizes)
  block = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes['params']['stack']))
  assert {layer.weight_bytes for layer in vit_cost.of(vit).layers} == {4 * block // vit.depth}


@pytest.mark.parametrize('text', [
    TEXT, TEXT.clone(projection=0), TEXT.clone(projection_bias=True), BERT],
    ids=['text', 'no projection', 'bias', 'bert'])
def test_parameters_of_text_towers_equal_the_models(text):
  shapes = jax.eval_shape(text.init, jax.random.key(0), jnp.zeros((1, 20), jnp.int32))
  sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)]
  assert vit_cost.of(text).architecture.parameters == sum(sizes)


# -- the counter itself --------------------------------------------------------------------------


def square(x):
  return x @ x


X = jax.ShapeDtypeStruct((4, 4), jnp.float32)
CUBE = 4 ** 3


@pytest.mark.parametrize(('function', 'times'), [
    (square, 1),
    (jax.jit(square), 1),
    (lambda x: jax.lax.scan(lambda c, _: (square(c), None), x, length=5)[0], 5),
    (lambda x: jax.lax.scan(lambda c, _: (jax.jit(square)(c), None), x, length=5)[0], 5),
    (lambda x: jax.lax.fori_loop(0, 7, lambda _, c: square(c), x), 7),
    (lambda x: jax.lax.cond(x[0, 0] > 0, square, lambda x: square(square(x)), x), 2),
    (jax.checkpoint(square), 1),
        (lambda x: jax.vmap(lambda row: x @ row)(x), 1),
    (lambda x: x + 1, 0),
    (lambda x: (x, square(x))[0], 0),
    (jax.grad(lambda x: square(x).sum()), 2),
    # Two products forward, the first again to go back, and two for each to go back.
    (jax.grad(lambda x: (jax.checkpoint(lambda x: square(square(x)))(x) ** 2).sum()), 7),
], ids=['plain', 'jit', 'scan', 'jit in scan', 'loop', 'dearest branch', 'remat', 'vmap',
        'none', 'unused', 'gradient', 'remat gradient'])
def test_counter_enters_every_call(function, times):
  assert jaxpr_cost.count(function, X).total == times * CUBE


def test_counter_knows_custom_gradients_and_shard_map():
  h = jax.custom_jvp(square)
  h.defjvp(lambda primals, tangents: (h(*primals), tangents[0] @ primals[0]))
  assert jaxpr_cost.count(h, X).total == CUBE
  assert jaxpr_cost.count(jax.grad(lambda x: (h(x) ** 2).sum()), X).total == 2 * CUBE
  f = jax.custom_vjp(square)
  f.defvjp(lambda x: (square(x), x), lambda x, g: (g @ x.T + x.T @ g,))
  assert jaxpr_cost.count(f, X).total == CUBE
  assert jaxpr_cost.count(jax.grad(lambda x: (f(x) ** 2).sum()), X).total == 3 * CUBE
  mesh = AbstractMesh((2, 2), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)
  rows = PartitionSpec(('data', 'fsdp'))
  shared = jax.shard_map(lambda x: x @ jnp.ones((4, 4)), mesh=mesh, in_specs=rows, out_specs=rows,
                         axis_names={'data', 'fsdp'}, check_vma=False)
  assert jaxpr_cost.count(shared, X).total == CUBE


@pytest.mark.parametrize(('groups', 'strides', 'outputs'), [(1, 1, 9), (2, 1, 9), (1, 2, 4)])
def test_counter_knows_convolutions(groups, strides, outputs):
  x = jax.ShapeDtypeStruct((2, 4, 4, 6), jnp.float32)
  kernel = jax.ShapeDtypeStruct((2, 2, 6 // groups, 8), jnp.float32)

  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (strides, strides), 'VALID',
                                        feature_group_count=groups,
                                        dimension_numbers=('NHWC', 'HWIO', 'NHWC'))

  assert jaxpr_cost.count(convolve, x, kernel).total == 2 * outputs * 8 * 4 * 6 // groups


def test_counter_names_what_it_cannot_count():
  def unknown(x):
    return jax.lax.while_loop(lambda c: c[0, 0] > 0, square, x)

  def harmless(x):
    return jax.lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c - 1, square(x))

  @jax.named_scope('reduction')
  def factor(x):
    return jnp.linalg.svd(x)[0]

  assert jaxpr_cost.count(unknown, X) == jaxpr_cost.Products({}, frozenset({('', 'while')}))
  assert jaxpr_cost.count(harmless, X) == jaxpr_cost.Products({'': CUBE})
  assert jaxpr_cost.count(factor, X).uncounted == {('reduction', 'svd')}


def test_scopes_reach_through_loops_and_gradients():
  named = jax.named_scope('reduction')(square)

  def loop(x):
    return jax.lax.scan(lambda c, _: (named(c) @ x, None), x, length=3)[0].sum()

  assert jaxpr_cost.count(loop, X).macs == {'reduction': 3 * CUBE, '': 3 * CUBE}
  gradient = jaxpr_cost.count(jax.grad(lambda x: named(x).sum()), X)
  assert gradient.macs == {'reduction': 2 * CUBE}

  @jax.named_scope('signals')
  def outer(x):
    return jax.jit(named)(x)

  assert jaxpr_cost.count(outer, X).macs == {'signals': CUBE}


# -- tokens and MACs of the analytic model -------------------------------------------------------


ONE = vit_cost.Architecture(width=8, depth=1, mlp=32, heads=2, kv_heads=2, slots=10, patches=9,
                            patch=2, channels=3, classes=5)
N, M, C = 10, 6, 8


@pytest.mark.parametrize(('site', 'merges', 'macs'), [
    ('before', True, 12 * M * C ** 2 + 2 * M ** 2 * C),
    ('between', True, 4 * N * C ** 2 + 2 * N ** 2 * C + 8 * M * C ** 2),
    ('after', True, 12 * N * C ** 2 + 2 * N ** 2 * C),
    ('inside', True, 2 * N * C ** 2 + N ** 2 * C + 2 * M * C ** 2 + M ** 2 * C + 8 * M * C ** 2),
    ('inside', False, 3 * N * C ** 2 + N ** 2 * C + M * N * C + M * C ** 2 + 8 * M * C ** 2),
])
def test_sites_follow_their_formulas(site, merges, macs):
  found = vit_cost.compute(ONE, cuts_by(merges, site, Cut(0, N, M)))
  assert found.layers[0].macs == macs
  assert found.macs == macs + 9 * 12 * C + 5 * C
  assert found.layers[0].left == M


def test_shared_keys_shrink_only_their_projections():
  alone = vit_cost.compute(ONE).layers[0]
  shared = vit_cost.compute(dataclasses.replace(ONE, kv_heads=1)).layers[0]
  assert alone.qkv - shared.qkv == N * C * C
  assert dataclasses.replace(shared, qkv=alone.qkv, weight_bytes=alone.weight_bytes,
                             activation_bytes=alone.activation_bytes) == alone
  assert alone.weight_bytes - shared.weight_bytes == 4 * (C * C + C)


def test_activation_bytes_count_each_operand_once():
  layer = vit_cost.compute(ONE).layers[0]
  features = N * C + 3 * N * C + 3 * N * C + N * C + 2 * N * C + 2 * N * (C + 32)
  assert layer.activation_bytes == 4 * features
  half = vit_cost.compute(dataclasses.replace(ONE, activation_bytes=2)).layers[0]
  assert half.activation_bytes == 2 * features
  picked = vit_cost.compute(ONE, cuts_by(False, 'inside', Cut(0, N, M))).layers[0]
  inside = N * C + 3 * N * C + 3 * N * C + M * C + 2 * M * C + 2 * M * (C + 32)
  assert picked.activation_bytes == 4 * inside + 4 * 2 * 2 * (N * N + M * N)


@pytest.mark.parametrize(('cuts', 'site', 'message'), [
    ((Cut(0, 9, 5),), 'between', 'goes from 9 to 5 tokens, but 10 are there'),
    ((Cut(0, 10, 11),), 'between', 'goes from 10 to 11'),
    ((Cut(3, 10, 5),), 'between', 'an event in layer 3 does not fit: the layers are 0 to 0'),
    ((Cut(0, 10, 5), Cut(0, 6, 4)), 'between', 'goes from 6 to 4 tokens, but 5 are there'),
    ((Cut(0, 10, 5),), 'amid', "site 'amid' is unknown: choose one of before, branch, "
                                "inside, between, after"),
])
def test_impossible_cuts_are_errors(cuts, site, message):
  with pytest.raises(ValueError, match=message):
    vit_cost.compute(ONE, cuts_by(True, site, *cuts))


@pytest.mark.parametrize('name', ['tome', 'mctf', 'ats', 'topk'])
@pytest.mark.parametrize('site', [None, 'before'])
def test_budgets_in_flops_are_met_at_the_methods_own_site(name, site):
  vit = make_vit('S/16')
  reduction = {'method': name, 'site': site, 'layers': (3, 6, 9), 'flops_ratio': 0.7}
  vit = vit.clone(plan=make_plan(reduction, vit.host, macs=vit_cost.solver(vit)))
  ratio = vit_cost.of(vit).macs / vit_cost.of(vit.clone(plan=None)).macs
  assert 0.69 < ratio <= 0.7


# -- what was published --------------------------------------------------------------------------


@pytest.mark.parametrize(('variant', 'image_size', 'gmacs'), [
    ('Ti/16', 224, 1.254), ('S/16', 224, 4.599), ('B/16', 224, 17.564), ('L/16', 224, 61.555),
    ('H/14', 224, 167.295), ('B/16', 384, 55.484), ('L/16', 384, 191.066), ('L/16', 512, 361.986),
    ('H/14', 518, 1016.717)])
def test_bases(variant, image_size, gmacs):
  assert vit_cost.of(make_vit(variant, image_size=image_size)).macs / 1e9 == pytest.approx(gmacs,
                                                                                           abs=5e-4)


def label(row):
  return f'{row.variant}@{row.image_size}-{row.method}-{row.quantity}-{row.value:.4g}'


@pytest.mark.parametrize('row', published.TABLE, ids=label)
def test_published_figures(row):
  assert row.quantity in published.QUANTITIES
  distance = abs(row.ours(vit_cost.of(row.model())) - row.value)
  # A mismatch that has gone away is as wrong as one that is not told.
  assert (distance > row.tolerance) == bool(row.mismatch), distance
  # Printed digits; a figure of speed is held to 6 %.
  assert row.tolerance <= (0.06 * row.value if row.quantity == 'speedup' else 0.05)


def test_the_table_holds_every_row_of_the_sources():
  rows = [(row.method, row.quantity) for row in published.TABLE]
  assert rows.count(('tome', 'speedup')) == 10
  assert rows.count(('tome', 'gmacs')) == 7
  assert rows.count(('evit', 'gmacs')) == rows.count(('topk', 'gmacs')) == 5
  assert rows.count(('mctf', 'gmacs')) == 4
  assert rows.count(('dynamicvit', 'gmacs')) == 1


@pytest.mark.parametrize('row', [row for row in published.TABLE if row.method == 'mctf'], ids=label)
def test_mctf_figures_come_out_once_the_matching_is_counted(row):
  vit = row.model()
  compared = sum(-(-cut.slots_in // 2) * (cut.slots_in // 2) for cut in vit.plan.events) * vit.width
  full = vit_cost.fvcore(vit_cost.of(vit)) + compared
  assert full / 1e9 == pytest.approx(row.value, abs=0.005)
  assert f'{full / 1e9:.3f}' in row.mismatch or not row.mismatch


def test_mctf_compares_even_with_odd_tokens():
  found = agree(planned(TINY, method='mctf', remove=3, layers=(1, 2)))
  assert found.macs['reduction'] == (13 * 13 + 12 * 11) * TINY.width


def test_find_gives_the_figures_of_this_model_and_budget_only():
  vit = planned(make_vit('S/16'), method='tome', remove=13)
  assert [(row.quantity, round(ours, 2)) for row, ours in published.find(vit)] == [
      ('gmacs', 2.70), ('speedup', 1.70)]
  same = planned(make_vit('S/16', dtype=jnp.bfloat16), method='tome',
                 keep=tuple(183 - 13 * i for i in range(12)), args={'proportional': False})
  assert len(published.find(same)) == 2
  for other in (planned(make_vit('S/16'), method='tome', remove=12),
                planned(make_vit('S/16'), method='tome', remove=13, site='after'),
                planned(make_vit('S/16'), method='pitome', remove=13),
                planned(make_vit('S/16'), method='tome', remove=13, mode='mask'),
                planned(make_vit('S/16', num_classes=10), method='tome', remove=13),
                make_vit('S/32')):
    assert published.find(other) == []
  assert {row.quantity for row, _ in published.find(make_vit('B/16'))} == {'gmacs', 'parameters'}


def test_pitome_counts_as_its_release():
  # The release's own counter on the tiny ViT of the golden files, ratio 0.9.
  vit = planned(golden_vit.model(), method='pitome', keep_ratio=0.9)
  assert [cut.slots_in for cut in vit.plan.events] == [65, 59, 54, 49]
  assert vit_cost.pitome_repo(vit_cost.of(vit)) == 12824448


@pytest.mark.long
@pytest.mark.parametrize(('remove', 'share', 'ours'), [
    (8, 0.80, 0.783), (12, 0.69, 0.676), (16, 0.58, 0.572)])
def test_crossget_on_clip_comes_out_once_the_matching_is_counted(remove, share, ours):
  """CLIP-B/16, the text tower unreduced (CrossGET, arXiv:2305.17455: about 80, 69 and 58 %).

  The release carries one cross token more, which nothing here counts.
  """
  vit, text = make_vit('clip_b16'), vit_cost.of(Text(**PAIRS['clip_b16']['text'])).macs
  small = planned(vit, method='crossget', remove=remove)
  whole, products = vit_cost.of(vit).macs + text, jaxpr_cost.of_vit(small).macs
  assert products[''] == vit_cost.of(small).macs
  assert (products[''] + text) / whole == pytest.approx(ours, abs=5e-4)
  assert abs(ours - share) > 0.01 * share
  assert (sum(products.values()) + text) / whole == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize(('layer', 'side', 'gmacs', 'ours'), [
    (15, 28, 529.81, None), (9, 28, 443.84, None), (7, 20, 309.4, 318.647)])
def test_expedit_saves_what_is_published(layer, side, gmacs, ours):
  """Segmenter ViT-L/16 at 640 pixels, from the published 658.98 (Expedit, arXiv:2210.01035).

  Our savings alone, as the decoder is not here. The release's layers 16, 10 and 8 are counted from
  one: 9, 15 and 17 layers run on clusters. Its last figure is lower than that, by 3 %; that
  decoding 400 tokens costs less than decoding 1,600, as reconstruction comes after, may be why.
  """
  vit = make_vit('L/16', image_size=640)
  cut = planned(vit, method='expedit', keep=side ** 2, layers=layer)
  found = 658.98 - (vit_cost.of(vit).macs - vit_cost.of(cut).macs) / 1e9
  assert (abs(found - gmacs) <= 0.01 * gmacs) == (ours is None)
  assert found == pytest.approx(ours or gmacs, rel=0.01 if ours is None else 1e-5)


def test_segvits_backbone():
  """ViT-B/16 at 512 pixels: 109.9 GMACs with its heads (DToP, arXiv:2308.01045), ours without."""
  vit = make_vit('B/16', image_size=512, class_token=False, pool='mean', num_classes=0)
  found = vit_cost.of(vit).macs / 1e9
  assert found == pytest.approx(106.904, abs=0.001)
  assert 0.02 * 109.9 < 109.9 - found < 0.03 * 109.9


@pytest.mark.parametrize(('variant', 'gmacs'), [
    ('S/16', (3.44, 2.99, 2.59, 2.29)), ('B/16', (13.19, 11.49, 9.97, 8.78)),
    ('L/16', (36.2, 28.65, 23.06, 19.07)), ('H/14', (83.8, 62.6, 49.2, 39.8))])
def test_pitome_by_ratio(variant, gmacs):
  """Worked out apart from this code, from the release's rule floor(T (1 - ratio)) a layer."""
  for ratio, expected in zip((0.95, 0.925, 0.9, 0.875), gmacs, strict=True):
    found = vit_cost.of(planned(make_vit(variant), method='pitome', keep_ratio=ratio)).macs / 1e9
    assert found == pytest.approx(expected, abs=0.05 if expected > 30 else 0.005)


@pytest.mark.parametrize('variant', ['S/16', 'B/16', 'L/16', 'H/14'])
def test_diffrate_embeds_cls_as_a_patch_and_is_else_the_same(variant):
  vit = planned(make_vit(variant), method='tome', remove=5)
  found = vit_cost.of(vit)
  assert vit_cost.diffrate_paper(found) - found.macs == 3 * vit.patch ** 2 * vit.width


@pytest.mark.skipif('DIFFRATE_RATES' not in os.environ,
                    reason='set DIFFRATE_RATES to compression_rate.json of the DiffRate release')
@pytest.mark.parametrize(('variant', 'name', 'target', 'gmacs'), [
    ('S/16', 'ViT-S-DeiT', '2.9', 2.905), ('B/16', 'ViT-B-DeiT', '11.5', 11.517),
    ('B/16', 'ViT-B-MAE', '11.5', 11.517), ('L/16', 'ViT-L-MAE', '42.3', 42.290),
    ('H/14', 'ViT-H-MAE', '103.4', 103.337)])
def test_diffrate_schedules(variant, name, target, gmacs):
  rates = json.loads(pathlib.Path(os.environ['DIFFRATE_RATES']).read_text())[name][target]
  made = vit_cost.architecture(make_vit(variant))
  slots, cuts = made.slots, []
  for layer, pair in enumerate(zip(*(json.loads(kept) for kept in rates.values()), strict=True)):
    cuts.append(Cut(layer, slots, min(slots, *pair)))
    slots = cuts[-1].slots_out
  found = vit_cost.compute(made, cuts_by(True, 'between', *cuts))
  assert vit_cost.diffrate_paper(found) / 1e9 == pytest.approx(gmacs, abs=5e-4)


# -- devices and training speed ------------------------------------------------------------------


def test_floor_is_the_slower_of_computing_and_moving():
  assert floor_seconds(1e12, 1e9, peak_flops=1e12, bandwidth=1e9) == 2.0
  assert floor_seconds(1e12, 3e9, peak_flops=1e12, bandwidth=1e9) == 3.0


def test_devices_are_plausible():
  for name, device in DEVICES.items():
    assert device.source, name
    # Operations a byte at which computing and moving take equally long: hundreds on all of them.
    assert 150 < device.flops / device.bandwidth < 600, name


SLOTS, TRAINING = vit_cost.of(TINY).layers[0].attention_in, vit_cost.of(TINY).training_macs


@dataclasses.dataclass
class FakeDevice:
  device_kind: str


def test_meter_leaves_out_compilation_and_pauses():
  now = [0.0]
  meter = Meter(SLOTS, batch_size=8, device=FakeDevice('TPU v5p'), devices=4,
                clock=lambda: now[0])
  now[0] = 100.0
  assert meter.lap(10, kept=13.0, macs=TRAINING) == {'kept_ratio': 0.5}
  with meter.paused():
    now[0] = 150.0
  now[0] = 152.0
  rates = meter.lap(20, kept=26.0, macs=TRAINING)
  assert rates['kept_ratio'] == 1.0
  assert rates['examples_per_second'] == 10 * 8 / 2
  used = 2 * TRAINING * 8 * 5 / (4 * 459e12)
  assert rates['mfu'] == pytest.approx(used, rel=1e-12)
  assert meter.seconds == 102.0
  assert rates['tokens_per_second'] == rates['examples_per_second'] * SLOTS


def test_meter_measures_the_peak_of_a_device_that_nobody_published():
  now = [0.0]
  device = jax.devices()[0]
  meter = Meter(SLOTS, batch_size=8, device=device, devices=1, clock=lambda: now[0])
  meter.lap(1, kept=1.0, macs=TRAINING)
  now[0] += 1
  share = meter.lap(2, kept=1.0, macs=TRAINING)['mfu']
  peak = 2 * TRAINING * 8 / share
  assert 1e9 < peak < 1e13


def test_of_forms_for_platforms_that_of_the_platform_counts():
  x = jnp.ones((4, 4))

  def run(x):
    return jax.lax.platform_dependent(x, tpu=lambda x: x @ x @ x, cuda=lambda x: x,
                                      default=lambda x: x @ x)

  for platform, products in (('cpu', 1), ('gpu', 0), ('tpu', 2)):
    with platforms.made_for(platform):
      assert jaxpr_cost.count(run, x).total == products * 64
