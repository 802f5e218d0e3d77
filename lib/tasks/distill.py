"""Losses that hold a model with fewer tokens to one with more: a frozen teacher, or itself.

Axes: B batch, T original tokens, D features, C classes.

All are one number a row, float32[B] (`logit_loss` also one a token), and send no gradient to the
model with more tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ops import tokens as tk
from ops.tokens import SPECIAL, TokenSet

Array = jax.Array


def distill(logits: Array, tokens: TokenSet, teacher_logits: Array, teacher_tokens: TokenSet, *,
            logit_weight: float = 0.5, token_weight: float = 0.5) -> dict[str, Array]:
  """Both losses of DynamicViT (Rao et al., 2021), Sec. 3.4, arXiv:2106.02034, with its weights.

  Args:
    logits, teacher_logits: float[B, C].
    tokens, teacher_tokens: final tokens of both models, of the same T original tokens.
    logit_weight, token_weight: factors; the paper's are the defaults.

  Returns:
    'distill_logits' and 'distill_tokens', weighted, float32[B] each.
  """
  return {'distill_logits': logit_weight * logit_loss(logits, teacher_logits),
          'distill_tokens': token_weight * token_loss(tokens, teacher_tokens)}


def logit_loss(logits: Array, teacher: Array) -> Array:
  """Computes the KL divergence of the student's classes from the teacher's, float32[...].

  Args:
    logits: float[..., C], the student's.
    teacher: float[..., C].
  """
  ours = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  theirs = jax.nn.log_softmax(jax.lax.stop_gradient(teacher).astype(jnp.float32), axis=-1)
  return jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)


def token_loss(tokens: TokenSet, teacher: TokenSet) -> Array:
  """Mean squared error of the features of the original tokens that the student kept, float32[B].

  A token counts if the slot that holds it is real, not special, and of size above zero (training
  keeps dropped tokens at size 0). Each row divides by its own count, where the paper divides by the
  batch's: a row's loss does not depend on its neighbours. A row that kept nothing gives 0.
  """
  counts = tokens.real & (tokens.kind != SPECIAL) & (tokens.sizes > 0)
  weight = tk.restore(tokens, counts.astype(jnp.float32))
  ours = tk.restore(tokens, tokens.x.astype(jnp.float32))
  theirs = tk.restore(teacher, jax.lax.stop_gradient(teacher.x).astype(jnp.float32))
  error = jnp.mean((ours - theirs) ** 2, axis=-1)
  return jnp.sum(weight * error, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1.0)


def consistency_loss(features: Array, weaker: Array) -> Array:
  """Mean squared error between the features of two reduction levels of a model, float32[B].

  MCTF (Lee et al., 2024), Sec. 3.4, arXiv:2403.10030, on the class token's features.

  Args:
    features: float[B, D], under the plan that learns.
    weaker: float[B, D], under the plan that removes less; gets no gradient.
  """
  theirs = jax.lax.stop_gradient(weaker).astype(jnp.float32)
  return jnp.mean((features.astype(jnp.float32) - theirs) ** 2, axis=-1)
