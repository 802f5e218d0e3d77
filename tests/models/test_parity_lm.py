"""Language models against the transformers library: hidden states, logits and decoded tokens.

tools/parity/reference.py wrote tests/fixtures/parity/lm/: tiny models whose parameters are all
random, three prompts of 14, 9 and 5 tokens, padded on the left, and 16 tokens decoded greedily
after each. Here the same prompts are padded on either side, or run alone. Every number within 1e-4.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_long
from helpers.parity_lm import CASES, FOLDER, config, expected, params

from models.checkpoints.lm_config import from_config

TOLERANCE = 1e-4
FORMS = ('left', 'right', 'alone')
# The hidden states are of size 10, logits of size 3.
DECODED = 16


def prompts(name, form):
  """ids, valid and, for each row, where in the stored row its tokens lie."""
  wanted = expected(name)
  ids, valid = wanted['ids'].astype(np.int32), wanted['valid']
  if form == 'right':
    shift = (~valid).sum(axis=1)
    ids, valid = (np.stack([np.roll(row, -s) for row, s in zip(x, shift, strict=True)])
                  for x in (ids, valid))
  if form == 'alone':
    return ids[:1], None
  return ids, valid


@functools.cache
def compiled(name):
  """The model, its prefill and its decode step."""
  lm = from_config(config(name))
  return (jax.jit(lm.clone(capture=True).apply),
          jax.jit(functools.partial(lm.apply, room=DECODED, method='prefill')),
          jax.jit(functools.partial(lm.apply, method='decode')))


@functools.cache
def outputs(name, form):
  ids, valid = prompts(name, form)
  return compiled(name)[0]({'params': params(name, 'stacked')}, ids, valid)


@functools.cache
def decoded(name, form):
  """Logits of the prompt's last token, and the tokens that follow greedily."""
  ids, valid = prompts(name, form)
  _, prefill, decode = compiled(name)
  variables = {'params': params(name)}
  logits, cache = prefill(variables, ids, valid)
  first, found = logits, []
  for _ in range(DECODED):
    found.append(np.asarray(jnp.argmax(logits, axis=-1)))
    logits, cache = decode(variables, found[-1], cache)
  return np.asarray(first), np.stack(found, axis=1)


def real(name, form, array):
  """[..., B, N, C] of ours or theirs: the real tokens' part, rows one after the other."""
  valid = expected(name)['valid'][:1] if form == 'alone' else prompts(name, form)[1]
  return np.asarray(array)[..., :len(valid), :, :][..., valid, :]


def test_the_cases_cover_the_families():
  assert {case.partition('_')[0] for case in CASES} == {
      'llama2', 'llama3', 'vicuna', 'mistral', 'qwen2', 'qwen3'}
  assert max(file.stat().st_size for file in FOLDER.iterdir()) < 100_000
  kinds = {(config(name).get('rope_parameters') or {}).get('rope_type') for name in CASES}
  assert kinds >= {'default', 'linear', 'llama3', 'yarn'}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', CASES)
def test_every_hidden_state_and_logit_equals_the_reference(name, form, record_property):
  logits, out = outputs(name, form)
  wanted, errors = expected(name), {}
  for key, found in (('embedded', out['embedded']), ('hidden', np.stack(out['hidden'])),
                     ('logits', logits)):
    stored = real(name, 'left' if form != 'alone' else form, wanted[key])
    errors[key] = float(np.abs(real(name, form, found) - stored).max())
  if form == 'left':
    record_property('parity', (f'lm {name}', 'transformers/lm',
                               max(errors['embedded'], errors['hidden']), errors['logits']))
  assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize(('name', 'form'), mostly_long([
    *((name, form) for name in CASES for form in ('left', 'right')),
    ('llama3', 'alone'), ('mistral', 'alone')], short=4))
def test_decoded_tokens_equal_the_reference(name, form):
  logits, tokens = decoded(name, form)
  wanted = expected(name)
  np.testing.assert_array_equal(tokens, wanted['decoded'][:len(tokens)])
  np.testing.assert_allclose(logits, wanted['logits'][:len(tokens), -1], atol=TOLERANCE)


@pytest.mark.parametrize(('name', 'changes'), [
    ('llama3', {'scaling': 'none'}), ('llama3', {'factor': 4.0}), ('vicuna', {'scaling': 'none'}),
    ('qwen2_yarn', {'temperature': 1.0}), ('qwen2_yarn', {'slow': 0.1}),
])
def test_other_rotations_would_show(name, changes):
  lm = from_config(config(name))
  lm = lm.clone(rope=lm.rope.__class__(**{**lm.rope.__dict__, **changes}))
  ids, valid = prompts(name, 'left')
  logits, _ = jax.jit(lm.apply)({'params': params(name, 'stacked')}, ids, valid)
  wanted = expected(name)['logits']
  assert np.abs(real(name, 'left', logits) - real(name, 'left', wanted)).max() > 10 * TOLERANCE


def test_a_missing_window_would_show():
  lm = from_config(config('mistral')).clone(window=0)
  ids, valid = prompts('mistral', 'left')
  logits, _ = jax.jit(lm.apply)({'params': params('mistral', 'stacked')}, ids, valid)
  wanted = expected('mistral')['logits']
  assert np.abs(np.asarray(logits)[0] - wanted[0]).max() > 10 * TOLERANCE
