"""Language models compiled by the real TPU and GPU compilers, for devices that are not attached.

Skipped where the compilers are missing (requirements-targets.txt); tools/targets_lm.py compiles a
model of 7B.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from helpers.targets import mesh_of

from configs.parts import LM_SHARDING, VLM_SHARDING
from lib.cost import decode_step, hlo, topology
from lib.cost import lm as lm_cost
from lib.runtime import sharding
from models.backbones.images import Images
from models.backbones.lm import LM
from models.checkpoints.lm_config import make_lm
from models.checkpoints.vlm_config import from_config
from models.plan import make_plan
from models.projectors import make_projector
from models.storage import to_storage
from ops.attention import pick
from ops.rope import Rope
from ops.tokens import TEXT, VISUAL, TokenSet
from tools import targets_lm

pytestmark = pytest.mark.long

ROWS, SLOTS, VISUALS, ROOM = 2, 256, 192, 64
SIZES = {'hidden_size': 256, 'intermediate_size': 384, 'num_hidden_layers': 2,
         'num_attention_heads': 4}
VLM = {'model_type': 'llava', 'image_token_id': 1,
       'text_config': {'model_type': 'llama', 'vocab_size': 512, **SIZES},
       'vision_config': {'model_type': 'clip_vision_model', 'image_size': 32, 'patch_size': 4,
                         **SIZES}}


def built(name, tensor, plan=None):
  """A model whose heads are as wide as those of 7B models, its mesh and its platform."""
  mesh = mesh_of(name, data=topology.count(name) // tensor, fsdp=1, tensor=tensor)
  platform = mesh.devices.flat[0].platform
  lm = LM(vocabulary=512, width=256, depth=4, mlp=512, heads=4, kv_heads=4, head_width=128,
          context=4096, rope=Rope(128), dtype=jnp.bfloat16, mesh=mesh,
          implementation=pick(platform, jnp.bfloat16))
  if plan:
    lm = lm.clone(plan=make_plan({'token_kinds': 'visual', **plan}, lm.host(SLOTS, visual=VISUALS)))
  return lm, mesh, platform


def shapes_of(lm, *, blocks):
  plain = lm.clone(mesh=None, plan=None, implementation='xla')
  found = jax.eval_shape(plain.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))['params']
  return jax.eval_shape(functools.partial(to_storage, storage=blocks), found)


def placed(lm, mesh, blocks):
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16),
                        shapes_of(lm, blocks=blocks))
  return {'params': sharding.shapes(shapes, sharding.make_shardings(shapes, LM_SHARDING, mesh))}


def prompt(mesh, batch, slots=SLOTS):
  """A padded prompt, padding behind the text."""
  rows = sharding.batch_sharding(mesh)
  tokens = jax.eval_shape(lambda: TokenSet.create(
      jnp.zeros((batch, slots, 256), jnp.bfloat16), valid=jnp.ones((batch, slots), bool),
      kind=jnp.broadcast_to(jnp.where(jnp.arange(slots) < VISUALS, VISUAL, TEXT).astype(jnp.int8),
                            (batch, slots)), padding='last'))
  return sharding.shapes(tokens, jax.tree.map(lambda _: rows, tokens))


@pytest.mark.parametrize('name', ['v5e:2x4', 'h100:8'])
def test_cuts_of_a_padded_prompt_add_scores_alone(name):
  found = []
  for plan in (None, {'method': 'fastv', 'layers': 2, 'keep_ratio': 0.5}):
    lm, mesh, platform = built(name, 4, plan)
    run = functools.partial(lm.apply, room=ROOM, method='prefill')
    program = jax.jit(run).lower(placed(lm, mesh, 'unstacked'), prompt(mesh, 4)).compile(
        compiler_options=hlo.OPTIONS[platform])
    text = program.as_text()
    assert 'tpu_custom_call' in text or 'fmha' in text
    found.append((lm_cost.of(lm, SLOTS).kv_bytes, program.memory_analysis().output_size_in_bytes,
                  [one for one in hlo.collectives(text) if 'reduction' not in one.scope]))
  (full_bytes, full_output, full), (bytes_, output, reduced) = found
  assert len(reduced) <= len(full)
  assert {one.kind for one in reduced} == {'all-reduce'}
  # Two rows a device, heads over four.
  assert full_output - output >= 0.9 * ROWS * (full_bytes - bytes_) / 4


@pytest.mark.parametrize('name', ['v5e:2x4', 'h100:1'])
def test_a_step_moves_weights_and_what_heads_hold_and_copies_no_cache(name):
  mesh_of(name, data=topology.count(name))
  lm = make_lm('llama3.1_8b', depth=2, vocabulary=512, dtype=jnp.bfloat16)
  row = decode_step.measure(lm, name, 'adakv', rows=1, slots=32768, room=ROOM, ratio=0.25)
  assert row['allocated_mb'] <= 1.1 * (row['held_mb'] + row['room_mb'])
  assert row['updated_in_place_mb'] >= row['allocated_mb'] - 0.1
  assert row['temporary_mb'] <= 0.3 * row['held_mb']
  assert 1 <= row['ratio'] <= 1.2


@pytest.mark.parametrize('name', ['v5e:2x4', 'h100:8'])
def test_a_decode_step_copies_no_cache(name):
  lm, mesh, platform = built(name, 4)
  weights, rows = placed(lm, mesh, 'unstacked'), sharding.batch_sharding(mesh)

  def memory(slots):
    _, cache = jax.eval_shape(functools.partial(lm.apply, room=ROOM, method='prefill'), weights,
                              prompt(mesh, 4, slots))
    places = jax.tree.map(lambda leaf: jax.NamedSharding(mesh, jax.P(
        sharding.BATCH_AXES, *(('tensor',) if leaf.ndim == 4 else ()))) if leaf.ndim
        else sharding.replicated(mesh), cache)
    run = jax.jit(functools.partial(lm.apply, method='decode'), donate_argnums=2,
                  out_shardings=(rows, places))
    program = run.lower(weights, jax.ShapeDtypeStruct((4,), jnp.int32, sharding=rows),
                        sharding.shapes(cache, places)).compile(
                            compiler_options=hlo.OPTIONS[platform])
    held = ROWS * lm_cost.of(lm, slots, room=ROOM).allocated_bytes / 4
    found = program.memory_analysis()
    assert found.alias_size_in_bytes >= held
    return held, found.temp_size_in_bytes

  # A program has temporaries of its own, such as four megabytes for products on a GPU.
  short, long = memory(SLOTS), memory(2048)
  assert long[1] - short[1] < 0.1 * (long[0] - short[0])


@pytest.mark.parametrize(('name', 'args'), [
    ('tokenpacker', {'side': 2, 'heads': 2, 'levels': (0,)}),
    ('quecc', {'side': 2, 'heads': 2, 'levels': (0,)})])
def test_training_a_compressor_gathers_parameters_and_never_the_batch(name, args):
  mesh = mesh_of('h100:8', data=1, fsdp=8, tensor=1)
  platform = mesh.devices.flat[0].platform
  shared = {'dtype': jnp.bfloat16, 'mesh': mesh, 'implementation': 'xla'}
  vlm = from_config(VLM)
  vlm = vlm.clone(
      tower=vlm.tower.clone(**shared), lm=vlm.lm.clone(**shared), projection='',
      compressor=make_projector({'name': name, 'args': args}, width=256, dtype=jnp.bfloat16))
  shapes = jax.eval_shape(functools.partial(targets_lm.fresh, vlm), jax.random.key(0))
  places = sharding.make_shardings(shapes, VLM_SHARDING, mesh, min_size_to_shard=0)
  rows = sharding.batch_sharding(mesh)

  def loss(params, ids, images):
    return jnp.square(vlm.apply({'params': params}, ids, ids > 0, Images(images))[0]).mean()

  program = jax.jit(jax.grad(loss), out_shardings=places).lower(
      sharding.shapes(shapes, places), jax.ShapeDtypeStruct((16, 24), jnp.int32, sharding=rows),
      jax.ShapeDtypeStruct((16, 1, 32, 32, 3), jnp.float32, sharding=rows)).compile(
          compiler_options=hlo.OPTIONS[platform])
  sizes = targets_lm.parameter_sizes(shapes, 1)
  found = [one for one in hlo.collectives(program.as_text()) if one.kind == 'all-gather']
  assert found
  assert [one.shape for one in found if one.size not in sizes] == []
