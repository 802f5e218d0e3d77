"""Costs of vision-language models against the traced program and the shapes of their parameters."""

import functools

import jax
import jax.numpy as jnp
import pytest
from helpers import mostly_long, parity_vlm

from lib.cost import jaxpr as jaxpr_cost
from lib.cost import vlm as vlm_cost
from models import checkpoints
from models.backbones.images import Images
from models.checkpoints.vlm_config import from_config
from models.reduce_config import with_plans

PROMPT, ROOM = 10, 4
# Crops, images and tokens of an image.
LAYOUTS = {'llava': (2, 2, 16), 'llava_next': (5, 1, 60), 'llava_onevision': (3, 1, 40),
           'qwen2_vl': (1, 1, 36), 'qwen2_5_vl': (1, 1, 36)}
REDUCTIONS = {
    'none': {},
    'language and cache': {
        'language': {'method': 'random', 'token_kinds': 'visual', 'layers': 1, 'keep_ratio': 0.5,
                     'site': 'before'},
        'cache': {'method': 'streaming_llm', 'keep': 12}},
    'projector': {'projector': {'method': 'random', 'keep': 8}},
    'tower': {'vision': {'method': 'random', 'layers': 1, 'keep': 12}},
}


def images_of(vlm, layout):
  """Shapes of a row's images."""
  crops, images, tokens = layout
  shape, integer = jax.ShapeDtypeStruct, jnp.int32
  index = shape((1, images, tokens, 1), integer), shape((1, images, tokens, 1), jnp.float32)
  if vlm.projection:
    side = vlm.tower.image_size
    return Images(shape((1, crops, side, side, 3), jnp.float32), None, *index)
  patches = shape((1, crops, *vlm.tower.grid, vlm.tower.numbers), jnp.float32)
  return Images(patches, shape((1, crops, 2), integer), *index,
                shape((1, images, tokens, 3), integer), shape((1, images), integer))


def model(family):
  return from_config(parity_vlm.config_of(family), grid=parity_vlm.GRID)


@functools.cache
def parameters(family):
  """Shapes of the parameters of a model without reductions."""
  flat = checkpoints._shapes(model(family))
  return checkpoints.nest({name: jax.ShapeDtypeStruct(shape, jnp.float32)
                           for name, shape in flat.items()})


CASES = [(family, 'none') for family in LAYOUTS] + [('llava', 'composite'), (
    'llava_next', 'composite')] + [
    ('llava', name) for name in REDUCTIONS if name != 'none'] + [
        ('qwen2_5_vl', 'language and cache')]


@pytest.mark.parametrize(('family', 'name'), mostly_long(CASES, short=2))
def test_counts_equal_the_traced_program(family, name):
  layout = LAYOUTS[family]
  vlm = model(family)
  if name == 'composite':
    vlm = vlm.clone(lm=vlm.lm.clone(mask='composite'))
  vlm = with_plans(vlm, **REDUCTIONS.get(name, {}))(PROMPT, layout)
  cost = vlm_cost.of(vlm, PROMPT, layout, room=ROOM)
  run = functools.partial(vlm.apply, room=ROOM, method='prefill')
  ids = jax.ShapeDtypeStruct((1, PROMPT), jnp.int32), jax.ShapeDtypeStruct((1, PROMPT), jnp.bool_)
  args = {'params': parameters(family)}, *ids, images_of(vlm, layout)
  products = jaxpr_cost.count(run, *args)
  assert not products.uncounted
  assert products.macs[''] == cost.macs
  _, cache = jax.eval_shape(run, *args)
  held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))
  assert held == cost.lm.allocated_bytes
  assert [kv.filled for kv in cache.layers] == [layer.cached for layer in cost.lm.layers]


@pytest.mark.parametrize('family', LAYOUTS)
def test_weight_bytes_equal_the_models(family):
  cost = vlm_cost.of(model(family), PROMPT, LAYOUTS[family])
  assert cost.weight_bytes == 4 * sum(leaf.size for leaf in jax.tree.leaves(parameters(family)))


def test_activations_add_up():
  cost = vlm_cost.of(model('llava'), PROMPT, LAYOUTS['llava'])
  projector = 2 * 16 * (24 + 3 * 32) * 4
  assert cost.projector_activation_bytes == projector
  assert cost.activation_bytes == (
      2 * cost.tower.activation_bytes + projector + cost.lm.activation_bytes)
