"""Decoding: what is sampled, when it ends, how prompts of any length share programs."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_long, tiny_lm
from helpers.tiny_lm import TINY, unstacked

from models.checkpoints.lm_config import make_lm
from models.decoding.generator import BUCKETS as LENGTHS
from models.decoding.generator import ENDED, Generator
from models.decoding.sampling import Sampling, padded, sample
from models.reduce_config import with_plans

PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [5, 3], [5, 8, 9, 7, 9])
BUCKETS = (8, 16)
LM = TINY.clone(depth=2)


def generator(**settings):
  return Generator(settings.pop('lm', LM), unstacked(2)['params'], buckets=BUCKETS, **settings)


@functools.cache
def shared():
  return generator()


@functools.cache
def greedy(prompt, new_tokens=6):
  """The answer by whole forward passes, one a token, without a cache."""
  tokens = list(prompt)
  # Later tokens change nothing: one compilation.
  chex.clear_trace_counter()
  run = jax.jit(chex.assert_max_traces(lambda variables, ids: LM.apply(variables, ids), n=1))
  for end in range(len(prompt), len(prompt) + new_tokens):
    ids = jnp.asarray(tokens + [0] * (len(prompt) + new_tokens - end))[None]
    logits, _ = run(unstacked(2), ids)
    tokens.append(int(jnp.argmax(logits[0, end - 1])))
  return tokens[len(prompt):]


@pytest.mark.parametrize('side', mostly_long(['left', 'right']))
def test_greedy_answers_are_those_of_whole_forward_passes(side):
  found = generator(side=side)(PROMPTS, new_tokens=6)
  assert found == [greedy(tuple(prompt)) for prompt in PROMPTS]


@pytest.mark.long
def test_rows_sample_as_alone_and_seeds_decide():
  warm = Sampling(temperature=2.0)
  together = shared()(PROMPTS, new_tokens=6, sampling=warm, seeds=(7, 8, 9))
  for prompt, seed, answer in zip(PROMPTS, (7, 8, 9), together, strict=True):
    assert shared()([prompt], new_tokens=6, sampling=warm, seeds=(seed,)) == [answer]
  assert shared()(PROMPTS, new_tokens=6, sampling=warm, seeds=(7, 8, 9)) == together
  assert shared()(PROMPTS, new_tokens=6, sampling=warm, seeds=(1, 2, 3)) != together
  same = shared()([PROMPTS[0]] * 2, new_tokens=6, sampling=warm, seeds=3)
  assert same[0] != same[1]


@pytest.mark.parametrize(('sampling', 'wanted'), [
    (Sampling(1.0), [0.1, 0.4, 0.2, 0.3]),
    (Sampling(1.0, top_k=2), [0, 4 / 7, 0, 3 / 7]),
    (Sampling(1.0, top_p=0.8), [0, 4 / 9, 2 / 9, 3 / 9]),
    (Sampling(1.0, top_k=3, top_p=0.7), [0, 4 / 7, 0, 3 / 7]),
    (Sampling(1.0, top_p=0.1), [0, 1, 0, 0]),
    (Sampling(0.5), np.array([1, 16, 4, 9]) / 30),
    (Sampling(0.0), [0, 1, 0, 0]),
    (Sampling(1.0, top_k=9), [0.1, 0.4, 0.2, 0.3]),
])
def test_tokens_come_as_often_as_they_should(sampling, wanted):
  logits = jnp.broadcast_to(jnp.log(jnp.asarray([0.1, 0.4, 0.2, 0.3])), (4096, 4))
  keys = jax.random.split(jax.random.key(0), 4096)
  found = jax.jit(sample, static_argnums=2)(logits, keys, sampling)
  share = np.bincount(found, minlength=4) / 4096
  np.testing.assert_allclose(share, wanted, atol=0.03)
  assert not share[np.asarray(wanted) == 0].any()


def test_any_of_several_ends_ends_a_row_alone():
  whole = [greedy(tuple(prompt)) for prompt in PROMPTS]
  ends = {whole[0][2], whole[1][4]}
  cut = [answer[:next((i for i, token in enumerate(answer) if token in ends), 5) + 1]
         for answer in whole]
  assert len({len(answer) for answer in cut}) > 1
  steps = list(generator(ends=sorted(ends)).stream(PROMPTS, new_tokens=6))
  assert len(steps) == max(map(len, cut))
  for row, answer in enumerate(cut):
    found = [int(step[row]) for step in steps]
    assert found == answer + [ENDED] * (len(steps) - len(answer))
  assert generator(ends=sorted(ends))(PROMPTS, new_tokens=6) == cut


def test_stopping_midway_breaks_nothing():
  made = shared()
  stream = made.stream(PROMPTS, new_tokens=6)
  first = [next(stream), next(stream)]
  stream.close()
  for kept in made.stream(PROMPTS[:1], new_tokens=6):
    assert kept.shape == (1,)
    break
  whole = list(made.stream(PROMPTS, new_tokens=6))
  np.testing.assert_array_equal(first, whole[:2])
  # Two streams at a time do not see each other.
  pair = zip(made.stream(PROMPTS, new_tokens=6), made.stream(PROMPTS, new_tokens=6), strict=True)
  for (one, other), wanted in zip(pair, whole, strict=True):
    np.testing.assert_array_equal(one, wanted)
    np.testing.assert_array_equal(other, wanted)


@pytest.mark.long
def test_prompts_of_many_lengths_share_a_few_programs(caplog):
  made = generator()
  with caplog.at_level('INFO', logger='absl'):
    for length in range(1, 9):
      made([list(range(length))], new_tokens=3)
    assert dict(made.compilations) == {('prefill', 1, 8, 16): 1, ('decode', 1, 8, 16): 1}
    made([list(range(9))], new_tokens=3)
    made([list(range(12))], new_tokens=16)
    assert made.compilations['prefill', 1, 16, 16] == 1
    made([[1]], new_tokens=17)
  assert dict(made.compilations) == {
      (name, 1, slots, room): 1 for name in ('prefill', 'decode')
      for slots, room in ((8, 16), (16, 16), (8, 32))}
  lines = [line for line in caplog.messages if line.startswith('compiling')]
  assert len(lines) == 6
  assert lines[-1].endswith('6 programs so far')


def test_slots_stay_within_the_context():
  made = generator()
  assert made.slots(5, 4) == (8, 16)
  assert made.slots(17, 4) == (24, 16)
  assert made.slots(41, 4) == (48, 16)
  assert made.slots(60, 4) == (60, 4)
  assert made.slots(8, 56) == (8, 56)
  with pytest.raises(ValueError, match='a prompt of 61 tokens and 4 new ones are impossible'):
    made.slots(61, 4)
  with pytest.raises(ValueError, match='new_tokens=0 leaves nothing to decode'):
    next(made.stream(PROMPTS, new_tokens=0))


@pytest.mark.parametrize('buckets', [BUCKETS, LENGTHS, (64, 256, 1024), (5,)])
def test_no_prompt_is_padded_to_more_than_twice_its_length(buckets):
  lengths = np.arange(1, 6001)
  made = Generator(LM.clone(context=8192), {}, buckets=buckets)
  slots = np.array([made.slots(int(length), 0)[0] for length in lengths])
  assert ((lengths <= slots) & (slots <= np.maximum(2 * lengths, 16))).all()
  beyond = lengths > max(buckets)
  assert (slots[beyond] < (lengths + np.maximum(lengths // 16 + 1, 16))[beyond]).all()
  # Few programs: no more for a doubling of the length than 16.
  for power in range(13):
    assert len({*slots[(lengths > 2 ** power) & (lengths < 2 ** (power + 1))].tolist()}) <= 16


@pytest.mark.parametrize('name', ['llama3.1_8b', 'qwen2.5_0.5b', 'qwen2.5_7b'])
def test_the_last_bucket_is_not_the_context(name):
  lm = make_lm(name)
  assert lm.context >= 32768
  assert Generator(lm, None).slots(4097, 64) == (4352, 64)
  assert Generator(lm, None).slots(lm.context - 10, 10) == (lm.context - 10, 10)
  with pytest.raises(ValueError, match=f'may be {lm.context} .the context. together at most'):
    Generator(lm, None).slots(100, lm.context)


@pytest.mark.long
def test_a_share_of_a_prompt_beyond_the_last_bucket_is_its_own():
  lm = LM.clone(context=4096, depth=1)
  plans = with_plans(lm, cache={'method': 'streaming_llm', 'keep_ratio': 0.25})
  made = Generator(lm, {}, plans=plans, buckets=(16, 64, 128))
  prompt = [2 + token % 20 for token in range(200)]
  slots, room = made.slots(len(prompt), 1)
  ids, valid = padded([prompt], slots)
  prefill = functools.partial(plans(slots).apply, room=room, method='prefill')
  _, cache = jax.jit(prefill)(unstacked(1), ids, valid)
  assert int(cache.layers[0].valid[0, 0, :cache.layers[0].filled].sum()) == 50


@pytest.mark.long
def test_pruned_caches_answer_whatever_the_bucket():
  cache = {'method': 'streaming_llm', 'keep': 4, 'args': {'sinks': 1}}
  made = generator(plans=with_plans(LM, cache=cache))
  found = made(PROMPTS, new_tokens=6)
  assert found[1] == greedy(tuple(PROMPTS[1]))
  assert found[0] != greedy(tuple(PROMPTS[0]))
  longer = Generator(LM, unstacked(2)['params'], buckets=(16,), plans=with_plans(LM, cache=cache))
  assert longer(PROMPTS, new_tokens=6) == found
  language = {'method': 'random', 'token_kinds': 'text', 'positions': 'restart', 'keep': 8,
              'layers': 1,
              'site': 'before'}
  made = Generator(LM, unstacked(2)['params'], buckets=(16,),
                   plans=with_plans(LM, language=language))
  assert made(PROMPTS, new_tokens=6) == [greedy(tuple(prompt)) for prompt in PROMPTS]


@pytest.mark.long
def test_scores_are_those_of_whole_forward_passes_token_by_token_or_not():
  answers = ([3, 1], greedy(tuple(PROMPTS[1]), 3), [7])
  whole = shared().score(PROMPTS, answers)
  for prompt, answer, score in zip(PROMPTS, answers, whole, strict=True):
    ids = jnp.asarray([*prompt, *answer])[None]
    rows = jax.nn.log_softmax(jax.jit(LM.apply)(unstacked(2), ids)[0][0, len(prompt) - 1:-1])
    wanted = float(rows[np.arange(len(answer)), np.asarray(answer)].sum())
    assert score.log_likelihood == pytest.approx(wanted, abs=1e-4)
    assert score.greedy == (rows.argmax(axis=-1) == np.asarray(answer)).all()
  assert whole[1].greedy
  # A reduction that keeps all is read token by token; one that drops some changes what is likely.
  keeping, dropping = (generator(plans=with_plans(LM, cache={
      'method': 'streaming_llm', 'keep': keep, 'args': {'sinks': 1}})).score(PROMPTS, answers)
      for keep in (8, 4))
  for found, wanted in zip(keeping, whole, strict=True):
    assert found.log_likelihood == pytest.approx(wanted.log_likelihood, abs=1e-4)
    assert found.greedy == wanted.greedy
  same = [abs(found.log_likelihood - wanted.log_likelihood) < 1e-4
          for found, wanted in zip(dropping, whole, strict=True)]
  # The first token is predicted by the prompt as it was read; the cut is seen from the next on.
  assert same == [False, True, True]


@pytest.mark.parametrize(('call', 'message'), [
    (lambda: Sampling(temperature=-1.0), 'temperature=-1.0 must be at least 0'),
    (lambda: Sampling(top_p=0.0), 'top_p=0.0 must be above 0 and at most 1'),
    (lambda: padded([[]], 4), 'give at least one, none of them empty'),
    (lambda: padded([[1] * 5], 4), r'prompts of \[5\] tokens do not fit into 4 slots'),
    (lambda: padded([[1]], 4, side='middle'), 'choose one of left, right'),
    (lambda: generator(side='middle'), 'one of left, right'),
    (lambda: shared()(PROMPTS, new_tokens=2, seeds=(1, 2)), '2 seeds do not fit 3 prompts'),
])
def test_what_cannot_be_is_a_worded_error(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_generators_of_reduced_models_use_the_plain_ones_weights():
  assert tiny_lm.planned().clone(plan=None) == TINY
