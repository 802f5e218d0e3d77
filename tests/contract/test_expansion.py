"""Layers after which the tokens of before a cut are back."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contract, mostly_long
from helpers.processes import COLLECTIVE, on_devices
from helpers.tiny_lm import TINY, variables

from lib.cost import explain
from lib.cost import jaxpr as jaxpr_cost
from lib.cost import vit as vit_cost
from models.backbones.vit import ViT
from models.plan import make_plan
from ops import tokens as tk

VIT = ViT(width=16, depth=4, mlp=24, heads=2, patch=4, image_size=16, channels=1, num_classes=0,
          capture=True)
IMAGES = jax.random.normal(jax.random.key(0), (2, 16, 16, 1))
CUT = {'method': 'stride', 'site': 'before', 'layers': 1, 'keep': 6, 'expand': 2}


def run(config, vit=VIT):
  """Features of a tiny ViT after each layer, and what it tells."""
  vit = vit.clone(plan=make_plan(config, vit.host))
  params = VIT.init(jax.random.key(1), IMAGES)
  params = jax.tree.map(lambda x: x * 2 if x.ndim > 2 else x, params)
  _, out = jax.jit(vit.apply)(params, IMAGES)
  return out['hidden'], out, vit.plan


@pytest.mark.long
@pytest.mark.parametrize('name', ['topk', 'tome'])
def test_layers_that_change_nothing_give_every_token_back(name):
  """Picked or joined, kept in their slots or not: exactly what there was."""
  case = contract.random_case()
  before, signals = case.tokens(), case.signals(contract.method(name).needs)
  answer, _ = contract.ask(name, {}, before, signals, num_slots=13)
  for now in (tk.reduce(before, answer), tk.reduce_masked(before, answer)):
    np.testing.assert_allclose(tk.expand(before, now), before.x, atol=1e-6)
    later = now.replace(x=now.x + 1)
    went_on = tk.became(before, now).dst < now.slots
    assert went_on.all() == (name == 'tome')
    np.testing.assert_allclose(tk.expand(before, later), before.x + went_on[:, :, None], atol=1e-6)


@pytest.mark.long
def test_one_layer_on_fewer_tokens_is_a_branch():
  branch = {'method': 'stride', 'site': 'branch', 'parts': 'both', 'layers': 1, 'keep': 6}
  hidden, out, _ = run(CUT | {'expand': 1})
  wanted, _, _ = run(branch)
  for found, layer in zip(hidden, wanted, strict=True):
    np.testing.assert_allclose(found, layer, atol=1e-5)
  assert (out['cuts'][1].slots, out['expanded'][1].slots, out['tokens'].slots) == (7, 17, 17)


@pytest.mark.long
def test_what_was_dropped_comes_back_as_it_was():
  hidden, out, plan = run(CUT)
  there = np.asarray(tk.became(out['before'][1], out['cuts'][1]).dst) < 7
  np.testing.assert_array_equal(np.asarray(hidden[2])[~there], np.asarray(hidden[0])[~there])
  assert not np.isclose(np.asarray(hidden[2])[there], np.asarray(hidden[0])[there]).any(1).all()
  assert [layer.left for layer in plan.profile(4, 17)] == [17, 7, 17, 17]
  masked, _, _ = run(CUT | {'mode': 'mask'})
  np.testing.assert_allclose(masked[2], hidden[2], atol=1e-5)


@pytest.mark.long
def test_cuts_inside_and_after():
  """An inner pair of events, and a cut of what is back."""
  inner = {'method': 'tome', 'layers': 1, 'remove': 2, 'expand': 2}
  hidden, out, plan = run([CUT | {'layers': 0, 'keep': 12, 'expand': 2}, inner,
                           {'method': 'tome', 'layers': 3, 'remove': 4}])
  assert [(event.kind, event.slots_out) for event in plan.events] == [
      ('cut', 13), ('cut', 11), ('expand', 13), ('expand', 17), ('cut', 13)]
  assert out['tokens'].slots == hidden[3].shape[1] == 13


@pytest.mark.parametrize('config', [
    CUT, {'method': 'expedit', 'layers': 1, 'keep': 4, 'expand': 3},
    {'method': 'tome', 'layers': (0, 1), 'remove': 4, 'expand': 2}], ids=lambda c: c['method'])
def test_counts_equal_the_traced_program(config):
  vit = VIT.clone(plan=make_plan(config, VIT.host), capture=False)
  found = jaxpr_cost.of_vit(vit)
  assert not found.uncounted
  assert found.macs[''] == vit_cost.of(vit).macs < vit_cost.of(VIT).macs


def test_a_summary_says_where_tokens_come_back():
  vit = VIT.clone(plan=make_plan(CUT, VIT.host))
  assert explain.summary(vit).endswith(
      'stride (before) in layer 1: 17 to 7 tokens, all back after layer 2')


MESH = '''
settings = {'method': 'expedit', 'layers': 1, 'keep': 6, 'expand': 2}
params = init(small(None, depth=4), jax.random.key(0))
images = np.random.default_rng(0).normal(size=(8, 32, 32, 1)).astype(np.float32)
found = []
for mesh in (None, sharding.make_mesh(dict(data=8))):
  vit = small(mesh, settings, depth=4)
  places = {} if mesh is None else dict(
      in_shardings=(sharding.replicated(mesh), sharding.batch_sharding(mesh)),
      out_shardings=sharding.batch_sharding(mesh))
  run = jax.jit(lambda p, x: vit.apply({'params': p}, x)[1]['tokens'].x, **places)
  program = run.lower(params, images).compile()
  if mesh is not None:
    params, images = jax.device_put((params, images), places['in_shardings'])
  found.append([program(params, images).tolist(), re.findall(sys.argv[1], program.as_text())])
print(json.dumps(found))
'''


@pytest.mark.long
def test_on_a_mesh_rows_come_back_where_they_are():
  (alone, _), (together, collectives) = on_devices(8, MESH, COLLECTIVE)
  np.testing.assert_allclose(together, alone, atol=1e-5)
  assert collectives == []


# What contradicts itself.


@pytest.mark.parametrize(('config', 'message'), [
    (CUT | {'expand': 4}, 'layer 4 is out of range'),
    (CUT | {'expand': 0}, 'expand=0 of stride comes before its first cut, in layer 1'),
    (CUT | {'expand': 'end'}, 'expand'),
    (CUT | {'site': 'branch', 'parts': 'both'}, 'stride lets no token go, so expand=2'),
    ([CUT | {'expand': 3}, {'method': 'tome', 'layers': 2, 'remove': 2, 'expand': 3},
      {'method': 'tome_kth', 'layers': 1, 'remove': 1}],
     'needs layer 1 for itself, and tome_kth cuts there too'),
    ([CUT, {'method': 'topk', 'site': 'before', 'layers': 3, 'remove': 2}],
     'topk before layer 3 reads cls_attention of the layer above, which the tokens of stride have '
     'not run: cut from layer 4 on'),
    ([CUT, {'method': 'tome', 'layers': 2, 'remove': 2, 'expand': 3}],
     'brings the tokens of layer 2 back, which another reduction has brought back before')],
    ids=lambda value: re.sub(r'\W+', ' ', value)[:40] if isinstance(value, str) else '')
def test_contradictions_are_one_line(config, message):
  with pytest.raises(ValueError, match=message) as caught:
    make_plan(config, VIT.host)
  assert '\n' not in str(caught.value)


def test_nothing_is_cut_so_nothing_comes_back():
  assert not make_plan(CUT | {'keep': 16}, VIT.host).events


@pytest.mark.long
@pytest.mark.parametrize(('config', 'message'), mostly_long([
    ({'method': 'tome', 'layers': 1, 'remove': 2, 'expand': 2}, 'tome joins tokens in layer 1'),
    ({'method': 'stride', 'layers': 1, 'keep': 4, 'expand': 2, 'positions': 'compact'},
     "numbers what is left anew .positions='compact'.")]))
def test_what_causal_attention_forbids(config, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(TINY.clone(plan=make_plan(config, TINY.host(8))).apply, variables(),
                   jnp.zeros((1, 8), jnp.int32))


@pytest.mark.long
def test_no_token_is_told_what_stands_behind_it():
  lm = TINY.clone(plan=make_plan(CUT | {'keep': 4, 'layers': 0, 'expand': 1}, TINY.host(8)))
  ids = jnp.arange(8)[None]
  run = jax.jit(lm.apply)
  first, second = (run(variables(), change)[0] for change in (ids, ids.at[0, 6].set(20)))
  np.testing.assert_allclose(first[:, :6], second[:, :6], atol=1e-6)
  assert not np.allclose(first[:, 6:], second[:, 6:], atol=1e-3)
