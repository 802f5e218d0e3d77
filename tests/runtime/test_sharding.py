"""Meshes of fake CPU devices: the same losses, no collective in a reduction, no extra bytes.

What needs a number of devices of its own runs in a process of its own.
"""

import re

import jaxlib.version
import pytest
from helpers.processes import COLLECTIVE, on_devices

from models.backbones.vit import make_vit
from models.plan import methods

REDUCTIONS = sorted(set(methods(make_vit('Ti/8').host)) - {'none'})


TRAIN = '''
def losses(axes, reduce):
  mesh = sharding.make_mesh(axes, jax.devices()[:8] if axes else jax.devices()[:1])
  vit = small(mesh, reduce)
  settings = digits.get_config().optimizer
  settings.accumulate = 2
  schedule = optax.constant_schedule(1e-3)
  optimizer = optax.adamw(schedule)
  def start(key):
    params = init(vit, key)
    return train.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), params)
  key = jax.random.key(0)
  places = sharding.make_shardings(jax.eval_shape(start, key), VIT_SHARDING, mesh,
                                   min_size_to_shard=0)
  state = jax.jit(start, out_shardings=places)(key)
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  step = jax.jit(functools.partial(train.update, functools.partial(loss, vit, settings),
                                   optimizer, settings, schedule),
                 in_shardings=(places, rows, whole, None), out_shardings=(places, whole))
  random = np.random.default_rng(0)
  batch = {'image': random.normal(size=(32, 32, 32, 1)).astype(np.float32),
           'label': random.integers(0, 10, 32).astype(np.int32)}
  found = []
  for _ in range(4):
    state, scalars = step(state, sharding.put(batch, mesh), key, None)
    found.append(float(scalars['loss']))
  sizes = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data.size / leaf.size, state.params)
  return found, sizes['stack']['blocks']['fc1']['kernel']

reduce = {'method': sys.argv[1], 'layers': (1,), 'keep_ratio': 0.6}
meshes = {'one': {}, 'data': dict(data=8), 'fsdp': dict(fsdp=8),
          'tensor': dict(data=2, tensor=4), 'mixed': dict(data=2, fsdp=2, tensor=2)}
print(json.dumps({name: losses(meshes[name], reduce) for name in sys.argv[2].split(',')}))
'''


@pytest.mark.long
@pytest.mark.parametrize(('method', 'meshes'), [('tome', 'one,data,fsdp,tensor,mixed'),
                                                ('patchmerger', 'one,mixed')])
def test_every_mesh_trains_as_one_device_does(method, meshes):
  found = on_devices(8, TRAIN, method, meshes)
  expected, _ = found.pop('one')
  assert expected[-1] < expected[0]
  for name, (losses, part) in found.items():
    assert losses == pytest.approx(expected, abs=1e-5), name
    assert part == {'data': 1, 'fsdp': 1 / 8, 'tensor': 1 / 4, 'mixed': 1 / 4}[name]


COMPILED = '''
def measure(mesh, reduce):
  vit = small(mesh, reduce, variant='B/16', width=768, heads=12, mlp=3072, image_size=224)
  abstract = jax.eval_shape(functools.partial(init, vit), jax.random.key(0))
  abstract['stack']['blocks'] = jax.eval_shape(
      functools.partial(unstack, depth=vit.depth), abstract['stack']['blocks'])
  rows = sharding.batch_sharding(mesh)
  run = jax.jit(lambda params, images: vit.apply({'params': params}, images)[0],
                in_shardings=(sharding.replicated(mesh), rows), out_shardings=rows)
  images = jax.ShapeDtypeStruct((2 * mesh.size, 224, 224, 1), jnp.float32)
  program = run.lower(abstract, images).compile()
  memory = program.memory_analysis()
  return {'temporaries': memory.temp_size_in_bytes, 'output': memory.output_size_in_bytes,
          'collectives': re.findall(sys.argv[1], program.as_text())}

found = {}
for count, wanted in zip((8, 64, 512), sys.argv[2:]):
  mesh = sharding.make_mesh(dict(data=count), jax.devices()[:count])
  full = measure(mesh, None)
  for method in wanted.split(','):
    found[f'{method} on {count}'] = [full, measure(mesh, {
        'method': method, 'layers': (1,), 'keep_ratio': 0.6})]
print(json.dumps(found))
'''
# Positions, kinds, owners and scores of the 2 x 197 tokens of a device.
BOOKKEEPING = 2 * 197 * 64
# Who reads rows of attention may hold the keys, and a chunk of rows, beside the layer's own map;
# DTEM the normed features, which its own products read; PruMerge queries and keys of all heads. The
# keys that VisionZip, and DUET's form of it, read wait, in copies, for the end of the layer; so
# does what ToDRE and VMTC compare. HoloV holds each chunk's features between those beside it.
# DyMU's similarities are found
# larger than the rest of what it holds.
# DToP's head holds tokens and masks of its own, TextMonkey's resampler projected tokens. What
# FlowCut watches of layer 0, its queries, keys and values and copies of two, waits for the cut.
READING = {'evit': 2 * 197 * 768 * 4, 'dtem': 2 * 197 * 768 * 4,
           'token_transforming': 2 * 197 * 768 * 4, 'kmedoids': 2 * 12 * 128 * 197 * 4,
           'dtop': 2 * 197 * (768 + 150) * 4, 'textmonkey_resampler': 2 * 197 * 1024 * 4,
           'flowcut': 5 * 2 * 197 * 768 * 4, 'prumerge': 2 * 2 * 197 * 768 * 4,
           'visionzip': 3 * 2 * 197 * 768 * 4, 'duet_zip': 3 * 2 * 197 * 768 * 4,
           'todre': 3 * 2 * 197 * 768 * 4, 'vmtc': 3 * 2 * 197 * 768 * 4,
           'dart': 2 * 2 * 197 * 768 * 4,  # Keys, and features of length one.
           'framefusion_prune': 2 * 2 * 197 * 768 * 4,  # Queries and keys of the layer before.
           'holov': 4 * 2 * 197 * 768 * 4, 'dymu': 2 * 99 * 98 * 4}
# From 0.11 on, XLA for CPU copies what a method reads of queries, keys and values out of their one
# product before attention, and holds the copies beside the product; before, it read the product.
COPIES = {'atc': 1, 'hiprune': 1, 'pitome': 1, 'tome': 1, 'tome_kth': 1, 'crossget': 2,
          'vid_tldr': 2}
if jaxlib.version.__version_info__ >= (0, 11):
  READING |= {name: copies * 2 * 197 * 768 * 4 for name, copies in COPIES.items()}


@pytest.mark.long
def test_a_reduction_adds_no_bytes_a_device_and_no_collective():
  # CPU's default order of operations buys concurrency with memory, more or less of it by luck.
  found = on_devices(512, COMPILED, COLLECTIVE, ','.join(REDUCTIONS), 'tome,topk', 'tome,topk',
                     flags='--xla_cpu_enable_concurrency_optimized_scheduler=false')
  assert {name: reduced['collectives'] for name, (_, reduced) in found.items()
          if reduced['collectives']} == {}
  beyond = {name: reduced['temporaries'] - full['temporaries'] - BOOKKEEPING
            for name, (full, reduced) in found.items()}
  assert {name: more for name, more in beyond.items()
          if more > READING.get(name.split()[0], 0)} == {}
  assert all(reduced['output'] <= full['output'] for full, reduced in found.values())
  for method in ('tome', 'topk'):
    assert found[f'{method} on 8'] == found[f'{method} on 64'] == found[f'{method} on 512']


LANGUAGE = '''
from configs.parts import LM_SHARDING
from lib.cost import hlo
from models.backbones.lm import LM
from ops.rope import Rope
mesh = sharding.make_mesh(dict(fsdp=4, tensor=2))
rows = sharding.batch_sharding(mesh)

def gathered(tied):
  lm = LM(vocabulary=96, width=64, depth=2, mlp=80, heads=4, kv_heads=2, head_width=16, context=64,
          rope=Rope(16), tied=tied, mesh=mesh)
  ids = jax.ShapeDtypeStruct((16, 24), jnp.int32, sharding=rows)
  shapes = jax.eval_shape(lm.clone(mesh=None).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
  places = sharding.make_shardings(shapes, LM_SHARDING, mesh, min_size_to_shard=0)
  def loss(variables, ids):
    return optax.softmax_cross_entropy_with_integer_labels(lm.apply(variables, ids)[0], ids).mean()
  program = jax.jit(jax.grad(loss), out_shardings=places).lower(
      sharding.shapes(shapes, places), ids).compile()
  sizes = {leaf.size // (2 if leaf.shape[0] == 2 else 1) for leaf in jax.tree.leaves(shapes)}
  sizes |= {size // 2 for size in sizes}
  found = [one for one in hlo.collectives(program.as_text()) if one.kind == 'all-gather']
  return [len(found), [one.shape for one in found if one.size not in sizes]]

print(json.dumps([gathered(tied) for tied in (False, True)]))
'''


@pytest.mark.long
def test_a_language_model_gathers_parameters_and_never_the_batch():
  for count, others in on_devices(8, LANGUAGE):
    assert count > 0
    assert others == []


SAVE = '''
from lib.runtime import checkpoint
mesh = sharding.make_mesh(dict(data=2, fsdp=-1))
params = {'stack': {'blocks': {'fc1': {'kernel': jnp.arange(4096.0).reshape(2, 32, 64)}}}}
places = sharding.make_shardings(params, VIT_SHARDING, mesh, min_size_to_shard=0)
template = jax.tree.map(lambda a, p: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=p),
                        params, places)
store = checkpoint.Checkpoints(sys.argv[1], parts=['params'])
if sys.argv[2] == 'save':
  store.save(1, {'params': jax.device_put(params, places)}, {'place': 3})
  print(json.dumps('saved'))
else:
  step, parts, data = store.restore({'params': template})
  kernel = parts['params']['stack']['blocks']['fc1']['kernel']
  equal = bool((kernel == params['stack']['blocks']['fc1']['kernel']).all())
  print(json.dumps([step, data, equal, len(kernel.sharding.device_set)]))
store.close()
'''


@pytest.mark.long
def test_a_checkpoint_of_eight_devices_restores_on_fewer(tmp_path):
  assert on_devices(8, SAVE, tmp_path / 'run', 'save') == 'saved'
  for count in (2, 4):
    assert on_devices(count, SAVE, tmp_path / 'run', 'restore') == [1, {'place': 3}, True, count]
  one = SAVE.replace('data=2, fsdp=-1', 'data=1')
  assert on_devices(1, one, tmp_path / 'run', 'restore') == [1, {'place': 3}, True, 1]


def test_placement_errors_name_the_parameter():
  import jax
  import jax.numpy as jnp

  from lib.runtime import sharding
  mesh = sharding.make_mesh({'data': 1})
  leaf = jax.ShapeDtypeStruct((4, 6), jnp.float32)
  with pytest.raises(ValueError, match=r"'odd/kernel' .* matches no sharding rule"):
    sharding.make_shardings({'odd': {'kernel': leaf}}, (('bias', ()),), mesh)
  with pytest.raises(ValueError, match=r"'odd/kernel' of shape \(4, 6\) has fewer dimensions"):
    sharding.make_shardings({'odd': {'kernel': leaf}}, (('kernel', (None, None, 'tensor')),), mesh)
  for sizes, message in [({'data': 1000}, 'needs 1000 devices'), ({'date': 1}, "'date' is unknown"),
                         ({'data': -1, 'fsdp': -1}, 'one may be -1'), ({'data': 0}, 'positive')]:
    with pytest.raises(ValueError, match=re.escape(message)):
      sharding.make_mesh(sizes)
