"""The tiny ViT of the golden files: weights in our layout, and helpers to compare with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from helpers import recorded
from models.backbones.vit import ViT
from models.plan import make_plan

DEPTH, WIDTH, HEADS = 4, 64, 4


def close(got, want) -> None:
  """Features of a whole model: within 1e-5 of the released values, relative above a size of 1.

  They are up to 8 in size, where float32 resolves 5e-7: after four blocks the released values are
  up to 6.6e-6 off those computed in float64, and ours up to 8.0e-6.
  """
  np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def load(name: str) -> dict[str, np.ndarray]:
  """All arrays of one golden file."""
  return recorded.arrays(f'vit/{name}')


@functools.cache
def params() -> dict:
  """The tiny ViT's parameters as our tree, blocks stacked."""
  raw = load('tiny_vit_weights')

  def stack(name: str, shape: tuple[int, ...]) -> np.ndarray:
    arrays = [raw[f'blocks.{i}.{name}'] for i in range(DEPTH)]
    return np.stack([(a.T if a.ndim == 2 else a).reshape(shape) for a in arrays])

  head = WIDTH // HEADS
  block = {
      'norm1': {'scale': stack('norm1.weight', (WIDTH,)), 'bias': stack('norm1.bias', (WIDTH,))},
      'qkv': {'kernel': stack('attn.qkv.weight', (WIDTH, 3, HEADS, head)),
              'bias': stack('attn.qkv.bias', (3, HEADS, head))},
      'out': {'kernel': stack('attn.proj.weight', (HEADS, head, WIDTH)),
              'bias': stack('attn.proj.bias', (WIDTH,))},
      'norm2': {'scale': stack('norm2.weight', (WIDTH,)), 'bias': stack('norm2.bias', (WIDTH,))},
      'fc1': {'kernel': stack('mlp.fc1.weight', (WIDTH, 128)),
              'bias': stack('mlp.fc1.bias', (128,))},
      'fc2': {'kernel': stack('mlp.fc2.weight', (128, WIDTH)),
              'bias': stack('mlp.fc2.bias', (WIDTH,))},
  }
  patch = raw['patch_embed.proj.weight'].transpose(2, 3, 1, 0).reshape(-1, WIDTH)
  return {
      'patch': {'kernel': patch, 'bias': raw['patch_embed.proj.bias']},
      'cls': raw['cls_token'], 'pos': raw['pos_embed'], 'stack': {'blocks': block},
      'norm': {'scale': raw['norm.weight'], 'bias': raw['norm.bias']},
      'head': {'kernel': raw['head.weight'].T, 'bias': raw['head.bias']},
  }


def images() -> jnp.ndarray:
  """float32[2, 32, 32, 3], the input of every model-level golden."""
  return jnp.asarray(load('tiny_vit_weights')['image'].transpose(0, 2, 3, 1))


def model(**settings) -> ViT:
  """The tiny ViT itself; settings are fields of ViT."""
  return ViT(width=WIDTH, depth=DEPTH, mlp=128, heads=HEADS, patch=4, image_size=32,
             num_classes=10, capture=True, **settings)


def run(config: dict, weights: dict | None = None) -> tuple:
  """The tiny ViT under one plan: its logits and everything beside them, as numpy arrays."""
  vit = model()
  vit = vit.clone(plan=make_plan(config, vit.host))
  return arrays(jax.jit(vit.apply)({'params': weights or params()}, images()))


def arrays(tree):
  """The same with numpy's arrays for JAX's, of which every slice would be a program."""
  return jax.tree.map(np.asarray, tree)
