"""Attention compiled by the real TPU and GPU compilers, for devices that are not attached.

Axes: B batch, N tokens, H heads, d features a head.

Skipped where the compilers are missing (requirements-targets.txt). What is asserted is memory, as
the compiler plans it; speed needs a device.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from helpers.targets import mesh_of
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from lib.cost import topology
from ops import attention

pytestmark = pytest.mark.long

BATCH, TOKENS = 8, 2880


def eager(q, k, v, bias):
  """Reads [CLS] attention off the whole map, as a host without rows would."""
  scores = attention.eager(q, k, bias=bias)
  return jnp.einsum('bhns,bshd->bnhd', scores.astype(v.dtype), v), scores[:, :, 0]


def beside(implementation, q, k, v, bias):
  got = attention.attend(q, k, v, bias=bias, implementation=implementation)
  return got.out, attention.rows(q[:, :1], k, got.lse[:, :1], bias=bias)[:, :, 0]


def beside_received(implementation, q, k, v, bias):
  got = attention.attend(q, k, v, bias=bias, implementation=implementation)
  return got.out, attention.received(q, k, got.lse, bias=bias, implementation=implementation)


def gradient(function):
  def loss(inputs):
    return sum(jnp.sum(part.astype(jnp.float32) ** 2) for part in function(*inputs))

  return lambda *inputs: jax.grad(loss)(inputs)


def temporaries(mesh, function, heads, features, with_bias):
  """Bytes beside inputs and outputs that one device needs."""
  one = SingleDeviceSharding(mesh.devices.flat[0])
  x = jax.ShapeDtypeStruct((BATCH, TOKENS, heads, features), jnp.bfloat16, sharding=one)
  bias = jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.float32, sharding=one)
  compiled = jax.jit(function).lower(x, x, x, bias if with_bias else None).compile()
  text = compiled.as_text()
  return compiled.memory_analysis().temp_size_in_bytes, 'tpu_custom_call' in text or 'fmha' in text


# The map of 32 heads does not fit a v5e, so eager attention has no size to compare with there.
# cuDNN with a bias at d = 128 needs 136 columns, which jax traces only where a Hopper card is
# attached.
CASES = [
    ('v5e:2x4', 8, 64, False), ('v5e:2x4', 8, 64, True), ('v5e:2x4', 8, 128, True),
    ('v6e:4x4', 32, 128, True),
    ('h100:1', 8, 64, False), ('h100:1', 8, 64, True), ('h100:1', 32, 64, True),
    ('h100:1', 32, 128, False),
]


@pytest.mark.parametrize(('name', 'heads', 'features', 'with_bias'), CASES)
def test_score_rows_need_little_of_eager_memory(name, heads, features, with_bias):
  mesh = mesh_of(name, data=topology.count(name))
  implementation = attention.pick(mesh.devices.flat[0].platform, jnp.bfloat16)
  sizes = functools.partial(temporaries, mesh, heads=heads, features=features, with_bias=with_bias)
  whole, fused = sizes(eager)
  # The map alone, in float32: the comparison is with what it says it is.
  assert whole >= 4 * BATCH * heads * TOKENS ** 2
  assert not fused
  for function, share in ((beside, 0.05), (beside_received, 0.06)):
    size, fused = sizes(functools.partial(function, implementation))
    assert fused
    assert size <= share * whole, function


@pytest.mark.parametrize('name', ['v5e:2x4', 'v6e:4x4', 'h100:1'])
@pytest.mark.parametrize(('heads', 'kv_heads', 'features', 'window'), [
    (8, 8, 64, None), (8, 2, 128, None), (4, 4, 128, 512)])
def test_causal_columns_are_one_kernel(name, heads, kv_heads, features, window):
  """It needs no more than queries and keys in another layout: no chunk of rows, no row."""
  device = mesh_of(name, data=topology.count(name)).devices.flat[0]
  implementation = attention.pick(device.platform, jnp.bfloat16)
  one = SingleDeviceSharding(device)

  def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=one)

  arrays = (shape(BATCH, TOKENS, heads, features), shape(BATCH, TOKENS, kv_heads, features),
            shape(BATCH, TOKENS, heads, dtype=jnp.float32), shape(BATCH, TOKENS, dtype=jnp.int32))
  compiled = jax.jit(lambda q, k, lse, positions: attention.received(
      q, k, lse, causal=True, positions=positions, window=window,
      implementation=implementation)).lower(*arrays).compile()
  text = compiled.as_text()
  assert ' while(' not in text
  assert 'custom-call' in text
  queries = 2 * BATCH * TOKENS * heads * features
  # Queries and keys, and positions and log-sum-exps a lane or eight rows wide.
  assert compiled.memory_analysis().temp_size_in_bytes <= 2 * queries + 4 * BATCH * TOKENS * 8 * 128


@pytest.mark.parametrize('name', ['v5e:2x4', 'v6e:4x4'])
def test_few_tokens_lie_as_their_products_leave_them(name):
  """Around the kernel nothing is padded, and nothing turned round, with a bias either."""
  one = SingleDeviceSharding(mesh_of(name, data=topology.count(name)).devices.flat[0])

  def half(x, weights, bias):
    q, k, v = (jnp.einsum('bnd,dhe->bnhe', x, weights[i]) for i in range(3))
    got = attention.attend(q, k, v, bias=bias, implementation='splash')
    return jnp.einsum('bnhe,dhe->bnd', got.out, weights[3])

  x, weights, bias = (jax.ShapeDtypeStruct(shape, dtype, sharding=one) for shape, dtype in (
      ((BATCH, 197, 1024), jnp.bfloat16), ((1024, 16, 64), jnp.bfloat16),
      ((BATCH, 197), jnp.float32)))
  # Arrays of their own: gradients of parts of one would be padded.
  arrays = x, (weights,) * 4, bias
  for function, kernels in ((half, 1), (gradient(lambda *args: (half(*args),)), 2)):
    text = jax.jit(function).lower(*arrays).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == kernels
    assert ' while(' not in text
    assert ' pad(' not in text


@pytest.mark.parametrize(('name', 'with_bias'), [('v5e:2x4', True), ('h100:1', True)])
def test_gradients_need_little_of_eager_memory(name, with_bias):
  mesh = mesh_of(name, data=topology.count(name))
  implementation = attention.pick(mesh.devices.flat[0].platform, jnp.bfloat16)
  sizes = functools.partial(temporaries, mesh, heads=8, features=64, with_bias=with_bias)
  whole, _ = sizes(gradient(eager))
  for function in (beside, beside_received):
    size, fused = sizes(gradient(functools.partial(function, implementation)))
    assert fused
    assert size <= 0.1 * whole, function


@pytest.mark.parametrize('name', ['v5e:2x4', 'v6e:4x4', 'v5p:4x4x4', 'h100:8'])
def test_batch_and_heads_shard_without_communication(name):
  count = topology.count(name)
  mesh = mesh_of(name, data=count // 2, tensor=2)
  implementation = attention.pick(mesh.devices.flat[0].platform, jnp.bfloat16)
  by_head, by_row = P('data', None, 'tensor'), P('data')
  function = jax.shard_map(
      gradient(functools.partial(beside_received, implementation)), mesh=mesh, check_vma=False,
      in_specs=(by_head,) * 3 + (by_row,), out_specs=(by_head,) * 3 + (P(('data', 'tensor')),))
  x = jax.ShapeDtypeStruct((count, 577, 4, 64), jnp.bfloat16, sharding=NamedSharding(mesh, by_head))
  bias = jax.ShapeDtypeStruct((count, 577), jnp.float32, sharding=NamedSharding(mesh, by_row))
  text = jax.jit(function).lower(x, x, x, bias).compile().as_text()
  assert 'tpu_custom_call' in text or 'fmha' in text
  assert not re.findall(r'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter', text)


def test_topology_mesh():
  mesh = mesh_of('v5e:2x4', data=2, tensor=4)
  assert mesh.shape == {'data': 2, 'tensor': 4}
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
  assert {device.platform for device in mesh.devices.flat} == {'tpu'}
  with pytest.raises(ValueError, match=r'v5e:2x4 has 8 devices, the axes .* need 6'):
    topology.topology_mesh('v5e:2x4', {'data': 6})


@pytest.mark.parametrize('name', ['v5e', 'v5e:8', 'h100', 'h100:0', 'b300:8', '../x:1'])
def test_unknown_topology_lists_examples(name):
  with pytest.raises(ValueError, match=r'unknown topology .*v5e:2x4'):
    topology.topology_mesh(name, {'data': 8})


@pytest.mark.parametrize(('name', 'package'), [('v5e:2x4', 'libtpu'),
                                               ('h100:8', 'jax_cuda13_plugin')])
def test_missing_compiler_names_the_requirements(monkeypatch, name, package):
  monkeypatch.setattr(topology.importlib.util, 'find_spec', lambda module: None)
  with pytest.raises(ModuleNotFoundError, match=f'{package}.*requirements-targets.txt'):
    topology.topology_mesh(name, {'data': 8})
