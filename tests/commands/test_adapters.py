"""Harnesses over tiny models, by their own interfaces and with tasks of a few made-up words.

Skipped where a harness is not installed (requirements-harness.txt).
"""

import argparse
import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assistants, parity_lm

from adapters.answerer import Answerer, Question, Settings, read_reductions
from lib import assistant
from models.checkpoints.lm_config import from_config
from models.decoding.sampling import Sampling

pytestmark = pytest.mark.long

NAME = 'qwen3'
REDUCE = {'cache': {'method': 'streaming_llm', 'keep': 4, 'args': {'sinks': 1}}}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return assistants.checkpoint(tmp_path_factory.mktemp('harness') / NAME, NAME)


@functools.cache
def forward():
  return jax.jit(from_config(parity_lm.config(NAME)).apply)


def likely(ids):
  """Log-likelihoods float[N - 1, V] after each token but the last."""
  padded = np.zeros((1, 128), np.int32)
  padded[0, :len(ids) - 1] = ids[:-1]
  logits, _ = forward()({'params': parity_lm.params(NAME)}, padded)
  return np.asarray(jax.nn.log_softmax(logits[0, :len(ids) - 1]))


def score_of(prompt, answer):
  """(log-likelihood of an answer, whether it is the greedy one), by one whole forward pass."""
  rows = likely([*prompt, *answer])[len(prompt) - 1:]
  return (float(rows[np.arange(len(answer)), answer].sum()),
          (rows.argmax(axis=-1) == answer).all())


def greedy_of(prompt, steps):
  ids = list(prompt)
  for _ in range(steps):
    ids.append(int(likely([*ids, 0])[-1].argmax()))
  return ids[len(prompt):]


# What all harnesses share.


def test_batches_answer_as_rows_alone_in_any_order(folder):
  made = Answerer(folder, batch_size=3, buckets=(8, 16))
  prompts = [(1, 5, 6), (1, 7), (1, 9, 10, 11, 12, 13, 14, 15, 16, 17), (1, 8, 7, 5)]
  settings = [Settings(3), Settings(4), Settings(3), Settings(3)]
  found = made.texts([Question(prompt, settings=how)
                      for prompt, how in zip(prompts, settings, strict=True)])
  for prompt, how, text in zip(prompts, settings, found, strict=True):
    assert text == made.assistant.text(greedy_of(prompt, how.new_tokens))
  answers = [(5,), (6, 7, 8), (9,), (greedy_of(prompts[3], 2))]
  scores = made.scores([Question(prompt, answer=tuple(answer))
                        for prompt, answer in zip(prompts, answers, strict=True)])
  for prompt, answer, score in zip(prompts, answers, scores, strict=True):
    wanted = score_of(prompt, answer)
    assert score.log_likelihood == pytest.approx(wanted[0], abs=1e-4)
    assert score.greedy == wanted[1]
  assert scores[3].greedy
  assert sum(made._generators[None].compilations.values()) <= 6


def test_texts_end_before_what_ends_them(folder):
  made = Answerer(folder, batch_size=2, buckets=(8,))
  whole, = made.texts([Question((1, 5, 6), settings=Settings(5))])
  words = whole.split()
  assert len(words) == 5
  cut, = made.texts([Question((1, 5, 6), settings=Settings(5, until=(words[3], 'never')))])
  assert cut.split() == words[:words.index(words[3])]


@pytest.mark.parametrize(('given', 'wanted'), [
    ({'until': '\n'}, Settings(9, ('\n',))),
    ({'until': ['a', 'b'], 'max_gen_toks': 3, 'max_tokens': 5}, Settings(3, ('a', 'b'))),
    ({'do_sample': False, 'temperature': 0.7}, Settings(9)),
    ({'do_sample': True}, Settings(9, sampling=Sampling(1.0))),
    ({'temperature': 0.5, 'top_p': 0.9, 'top_k': -1}, Settings(9, sampling=Sampling(0.5, 0, 0.9))),
    ({'temperature': 0, 'top_p': None, 'num_beams': 1}, Settings(9)),
])
def test_generation_arguments_become_settings(given, wanted):
  assert Settings.of(given, new_tokens=9) == wanted


def test_reductions_from_text(tmp_path):
  text = '{"language": {"method": "fastv", "layers": 2, "keep_ratio": 0.5}}'
  assert read_reductions(text)['language']['keep_ratio'] == 0.5
  (tmp_path / 'r.json').write_text(text)
  assert read_reductions(str(tmp_path / 'r.json')) == read_reductions(text)
  assert read_reductions(None) is None
  assert read_reductions('') is None
  for wrong, message in (('fastv', 'is no dict: give one as'), ('[1]', 'is no dict of reductions'),
                         ('{"text": {"method": "fastv"}}', 'choose from vision, projector')):
    with pytest.raises(ValueError, match=message):
      read_reductions(wrong)


# EleutherAI's harness.


@pytest.fixture(scope='module')
def harness():
  """lm_eval and our adapter; what it warns about while it is imported is its own."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    lm_eval = pytest.importorskip('lm_eval')
    from lm_eval.tasks import TaskManager

    import adapters.lm_harness
  return lm_eval, adapters.lm_harness, TaskManager


DOCS = [{'text': 'w5 w6', 'choices': [' w7', ' w8 w9'], 'gold': 1},
        {'text': 'w11 w12 w13 w14', 'choices': [' w3 w4 w9', ' w10'], 'gold': 0},
        {'text': 'w20', 'choices': [' w3', ' w4'], 'gold': 1}]
LONG = ' '.join(f'w{3 + (7 * number) % 60}' for number in range(150))


def task(kind, **more):
  import datasets
  docs = [{'text': 'w9 w10'}, {'text': LONG}] if kind == 'loglikelihood_rolling' else DOCS
  return {'task': f'toy_{kind}', 'custom_dataset': lambda **_: {'test': datasets.Dataset.from_list(
      docs)}, 'test_split': 'test', 'output_type': kind, 'doc_to_text': '{{text}}',
          'dataset_path': 'none', **more}


TASKS = {
    'multiple_choice': {'doc_to_choice': '{{choices}}', 'doc_to_target': '{{gold}}',
                        'target_delimiter': '',
                        'metric_list': [{'metric': 'acc'}]},
    'loglikelihood_rolling': {'doc_to_text': '', 'doc_to_target': '{{text}}',
                              'metric_list': [{'metric': 'bits_per_byte'}]},
    'generate_until': {'doc_to_target': '{{choices[0]}}',
                       'generation_kwargs': {'until': ['w99'], 'max_gen_toks': 4},
                       'metric_list': [{'metric': 'exact_match'}]},
}


@pytest.fixture(scope='module')
def evaluated(harness, folder):
  """The harness's samples of every task, unreduced and reduced: {reduced: {task: samples}}."""
  lm_eval, _, manager = harness

  def run(**reduce):
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      found = lm_eval.simple_evaluate(
          'winnow', model_args={'path': str(folder), 'buckets': '8:32:128', **reduce},
          tasks=[task(kind, **more) for kind, more in TASKS.items()], batch_size=2,
          bootstrap_iters=0, log_samples=True,
          task_manager=manager(include_defaults=False))
    return found

  return {'whole': run(), 'reduced': run(reduce=str(REDUCE))}


def samples(found, kind):
  return sorted(found['samples'][f'toy_{kind}'], key=lambda sample: sample['doc_id'])


def words(text):
  return [int(word[1:]) for word in text.split()]


def test_choices_are_scored_as_by_whole_forward_passes(evaluated):
  right = 0
  for sample, doc in zip(samples(evaluated['whole'], 'multiple_choice'), DOCS, strict=True):
    wanted = [score_of([1, *words(doc['text'])], words(choice)) for choice in doc['choices']]
    for (answer,), (score, greedy) in zip(sample['resps'], wanted, strict=True):
      assert float(answer[0]) == pytest.approx(score, abs=1e-4)
      assert str(answer[1]) == str(bool(greedy))
    right += np.argmax([score for score, _ in wanted]) == doc['gold']
  found = evaluated['whole']['results']['toy_multiple_choice']['acc,none']
  assert found == pytest.approx(right / len(DOCS))


def test_texts_are_generated_greedily(evaluated):
  for sample, doc in zip(samples(evaluated['whole'], 'generate_until'), DOCS, strict=True):
    answer = greedy_of([1, *words(doc['text'])], 4)
    assert words(sample['resps'][0][0]) == [each for each in answer if each > 2]


def test_rolling_likelihoods_of_texts_longer_than_the_context(evaluated):
  short, long = samples(evaluated['whole'], 'loglikelihood_rolling')
  assert float(short['resps'][0][0]) == pytest.approx(score_of([1], [9, 10])[0], abs=1e-4)
  # The context holds 128: the token in front and 127 words; the second window ends with the text.
  ids = words(LONG)
  wanted = score_of([1], ids[:128])[0] + score_of(ids[21:128], ids[128:])[0]
  assert float(long['resps'][0][0]) == pytest.approx(wanted, abs=1e-3)


def test_reductions_act_on_the_context(evaluated, folder):
  whole, reduced = (samples(evaluated[which], 'multiple_choice') for which in ('whole', 'reduced'))
  # A context of five tokens is cut to four, one of three is not.
  for number, same in ((0, True), (1, False)):
    pair = [float(found[number]['resps'][0][0][0]) for found in (whole, reduced)]
    assert (abs(pair[0] - pair[1]) < 1e-4) == same
  made = assistant.load(folder)
  prompt = made.encode(DOCS[1]['text'])
  answer, = made.generator(REDUCE, buckets=(8,))([prompt], new_tokens=4)
  assert samples(evaluated['reduced'], 'generate_until')[1]['resps'][0][0] == made.text(answer)


def test_chats_and_prefixes(harness, folder):
  model = harness[1].WinnowLM(str(folder), batch_size='auto:4')
  assert model.batch_size == 8
  assert (model.prefix_token_id, model.eot_token_id) == (1, assistants.END)
  text = model.apply_chat_template([{'role': 'user', 'content': 'w5'}])
  assert text.startswith('<s>')
  assert model.tok_encode(text).count(1) == 1
  assert model.tok_encode('w5', add_special_tokens=False) == [5]
  assert model.chat_template(True) == model.answerer.assistant.chat.source
  assert jnp.isfinite(model.max_length)


# lmms-eval.


SEEN = [{'text': 'w5 w6', 'seed': 0, 'choices': ['w7', 'w8 w9'], 'gold': 1},
        {'text': 'w11 <image> w12', 'seed': 1, 'choices': ['w3 w4 w9', 'w10'], 'gold': 0},
        {'text': 'w20', 'seed': 2, 'choices': ['w3', 'w4'], 'gold': 1}]
TASK = '''task: toy_{kind}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_visual: !function shown.images
doc_to_text: "{{{{text}}}}"
'''
ASKED = {
    'generate_until': '''doc_to_target: "{{choices[0]}}"
generation_kwargs:
  max_new_tokens: 3
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
''',
    'multiple_choice': '''doc_to_target: gold
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
''',
}
SHOWN = '''
import numpy
from PIL import Image


def images(doc):
  pixels = numpy.random.default_rng(doc['seed']).integers(0, 256, (20, 37, 3))
  return [Image.fromarray(pixels.astype(numpy.uint8))]
'''


def image_of(doc):
  scope = {}
  exec(SHOWN, scope)
  return scope['images'](doc)[0]


@pytest.fixture(scope='module')
def seen(tmp_path_factory):
  """lmms-eval's samples of two tasks by a reduced LLaVA, and the model itself."""
  folder = tmp_path_factory.mktemp('lmms')
  llava = assistants.checkpoint(folder / 'llava', 'llava')
  reduce = {'language': {'method': 'fastv', 'token_kinds': 'visual', 'layers': 1,
                         'keep_ratio': 0.5}}
  (folder / 'fastv.json').write_text(json.dumps(reduce))
  tasks = folder / 'tasks'
  tasks.mkdir()
  (tasks / 'docs.json').write_text('\n'.join(map(json.dumps, SEEN)))
  (tasks / 'shown.py').write_text(SHOWN)
  for kind, rest in ASKED.items():
    (tasks / f'{kind}.yaml').write_text(
        TASK.format(kind=kind, data=tasks / 'docs.json') + rest)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    pytest.importorskip('lmms_eval')
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    import adapters.lmms
    found = simple_evaluate(
        adapters.lmms.NAME, model_args=f'path={llava},reduce={folder / "fastv.json"},buckets=16:64',
        tasks=[f'toy_{kind}' for kind in ASKED], batch_size=2, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        cli_args=argparse.Namespace(
            output_path=None, process_with_media=True, reasoning_tags=None))
  return found, assistant.load(llava), reduce


def test_images_are_answered_about_under_the_reduction(seen):
  found, made, reduce = seen
  generator = made.generator(reduce, buckets=(16, 64))
  samples = sorted(found['samples']['toy_generate_until'], key=lambda sample: sample['doc_id'])
  for sample, doc in zip(samples, SEEN, strict=True):
    prompt = made.prompt(doc['text'], images=1)
    answer, = generator([prompt], made.encode_images([[image_of(doc)]]), new_tokens=3)
    assert sample['resps'][0][0] == made.text(answer)


def test_choices_about_images_are_losses(seen):
  found, made, reduce = seen
  generator = made.generator(reduce, buckets=(16, 64))
  right = 0
  for doc in SEEN:
    prompt = made.prompt(doc['text'], images=1)
    losses = []
    for choice in doc['choices']:
      ids = made.tokens.encode(choice, special=False)
      score, = generator.score([prompt], [ids], made.encode_images([[image_of(doc)]]))
      losses.append(-score.log_likelihood / len(ids))
    right += np.argmin(losses) == doc['gold']
  assert found['results']['toy_multiple_choice']['acc,none'] == pytest.approx(right / len(SEEN))
