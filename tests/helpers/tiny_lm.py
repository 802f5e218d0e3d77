"""A tiny language model, its parameters and prompts; the config of a tiny LLaVA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from models.backbones.lm import LM
from models.plan import make_cache_plan, make_plan
from models.storage import unstack
from ops.rope import Rope
from ops.tokens import TEXT, VISUAL, TokenSet

TINY = LM(vocabulary=29, width=16, depth=3, mlp=24, heads=4, kv_heads=2, head_width=8, context=64,
          rope=Rope(8))
# An even number to come: by whose parity ToMe pairs the tokens between them.
PROMPT, ROOM = 12, 4
# The first row is whole, the second starts late, the third ends early.
VALID = np.stack([np.ones(PROMPT, bool), np.arange(PROMPT) >= 4, np.arange(PROMPT) < 7])
VISUALS = 6

# As published, for `models.checkpoints.vlm_config`.
IMAGE = 30
LLAMA = {'model_type': 'llama', 'vocab_size': 40, 'hidden_size': 16, 'intermediate_size': 24,
         'num_hidden_layers': 2, 'num_attention_heads': 2, 'num_key_value_heads': 2}
CLIP = {'model_type': 'clip_vision_model', 'hidden_size': 16, 'intermediate_size': 24,
        'num_hidden_layers': 3, 'num_attention_heads': 2, 'image_size': 16, 'patch_size': 4}
LLAVA = {'model_type': 'llava', 'text_config': LLAMA, 'vision_config': CLIP,
         'image_token_id': IMAGE}


@functools.cache
def variables(depth=3):
  lm = TINY.clone(depth=depth)
  # Whoever asks first may be tracing.
  with jax.ensure_compile_time_eval():
    params = jax.jit(lm.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))['params']
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 2 else x, params)
  return {'params': params}


@functools.cache
def unstacked(depth=3):
  params = variables(depth)['params']
  return {'params': params | {'stack': {'blocks': unstack(params['stack']['blocks'], depth)}}}


@functools.cache
def ids(length=PROMPT + ROOM, rows=3):
  return jnp.asarray(np.random.default_rng(1).integers(0, 29, (rows, length)), jnp.int32)


def image_and_text(valid=None):
  """A row's two text tokens, six visual ones, and more text; float[3, 12, 16]."""
  kind = np.full((3, PROMPT), TEXT, np.int8)
  kind[:, 2:2 + VISUALS] = VISUAL
  x = jax.random.normal(jax.random.key(2), (3, PROMPT, 16))
  pos = jnp.broadcast_to(jnp.arange(PROMPT, dtype=jnp.int32), (3, PROMPT))
  if valid is not None:
    pos = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
  return TokenSet.create(x, pos=pos, kind=jnp.asarray(kind), valid=valid)


def planned(lm=TINY, slots=PROMPT, visual=VISUALS, **reduction):
  host = lm.host(slots, visual=visual) if visual else lm.host(slots)
  config = {'token_kinds': 'visual', 'layers': (1, 2), 'keep': (4, 2),
            'method': 'random'} | reduction
  return lm.clone(plan=make_plan(config, host))


@functools.cache
def reader(lm, room):
  return jax.jit(functools.partial(lm.apply, room=room, method='prefill'))


def prefill(lm, tokens, valid=None, *, room=ROOM, weights=None):
  return reader(lm, room)(weights or unstacked(lm.depth), tokens, valid)


def with_cache(lm=TINY, slots=PROMPT, visual=0, **reduction):
  host = lm.host(slots, visual=visual) if visual else lm.host(slots)
  plan = make_cache_plan({'method': 'streaming_llm', **reduction}, host, plan=lm.plan)
  return lm.clone(cache_plan=plan)
