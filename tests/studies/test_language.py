"""What reductions cost a language model: texts, keys in a haystack, cut caches, tables.

What reads a file of weights is skipped without the gguf package.
"""

import bz2
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from helpers import tiny_lm
from ml_collections import ConfigDict

from configs import real_language
from lib.data.real import articles
from lib.report.rows import read_jsonl
from lib.studies import haystack, language, language_report
from lib.studies.cut_caches import Reader
from models.plan import make_cache_plan, make_plan
from ops.reducers.baselines import BASELINES
from ops.reducers.cache import CACHE_REDUCERS
from ops.reducers.language import LANGUAGE
from tools.real.study import run

PAGE = """{{Infobox|name={{nested|x}}}}<!-- hidden -->
'''Ada''' was an [[English people|English]] [[mathematician]]<ref name="a">Book {{x}}</ref>, known
[[File:A.jpg|thumb|A [[picture]] of her]]
== Life ==
* a list that is long enough to be taken for prose, if lists were prose, which they are not here
She wrote to [http://x.org Charles Babbage], and the notes that she added are the first published {|
|cell
|}algorithm that was meant for a machine; see the [[computer]].
"""


def test_markup_leaves_prose():
  prose = articles.plain(PAGE.replace('known\n', 'known for her work on a machine that was not '
                                                 'built\n'))
  assert prose == (
      'Ada was an English mathematician, known for her work on a machine that was not built\n'
      'She wrote to Charles Babbage, and the notes that she added are the first published '
      'algorithm that was meant for a machine; see the computer.')


def test_articles_that_are_not_there_or_damaged_end_in_one_line(tmp_path):
  with pytest.raises(ValueError, match=r'there is no \.bz2 file'):
    articles.articles(tmp_path)
  (tmp_path / 'a.bz2').write_bytes(bz2.compress(b'<mediawiki><page>' * 90)[:40])
  with pytest.raises(ValueError, match='fetch it again') as caught:
    articles.articles(tmp_path)
  assert '\n' not in str(caught.value)


def _encode(text):
  return list(text.encode())


@pytest.mark.parametrize('depth', [0.1, 0.9])
def test_keys_lie_at_their_depth_in_prompts_of_one_length(depth):
  hay = _encode('Some words stand here. ' * 60)
  asked = haystack.two_keys(_encode, hay, 900, depth, np.random.default_rng(0))
  text, key = bytes(asked.prompt).decode(), bytes(asked.key).decode()
  assert len(asked.prompt) == 900
  # The right one of two doors, whose key is said twice.
  door = text.rpartition('of the ')[2].split()[0]
  assert f'The key of the {door} door is {key}. Remember it: {key} opens' in text
  assert text.count('Remember it') == 2
  place = text.index(key) / 900
  assert abs(place - depth) < 0.25
  assert text[:text.index(f' The key of the {door}')].endswith(('.', 'user\n'))


def test_several_keys_are_asked_behind_one_prompt():
  hay = _encode('Some words stand here. ' * 60)
  several = haystack.several(_encode, hay, 800, (0.1, 0.5, 0.9), np.random.default_rng(0))
  assert len({each.prompt for each in several}) == 1
  assert len({each.key for each in several}) == 3
  text = bytes(several[0].prompt).decode()
  places = [text.index(bytes(each.key).decode()) for each in several]
  assert places == sorted(places)
  with pytest.raises(ValueError, match=r'takes 9\d\d tokens of prose'):
    haystack.pass_key(_encode, hay[:100], 1100, 0.5, np.random.default_rng(0))


def test_every_row_of_the_config_is_a_plan_and_no_two_are_one():
  lm = tiny_lm.TINY.clone(depth=30, context=8192)
  plans = {'cache': make_cache_plan, 'tokens': make_cache_plan, 'model': make_plan}
  for size in real_language.SIZES:
    rows = real_language.get_config(size).rows
    assert len({json.dumps(row, sort_keys=True) for row in rows}) == len(rows)
    one_of_each = {(row['name'], row['share'], row['length']): row for row in rows}
    for row in one_of_each.values():
      if row['reduce']:
        assert plans[row['where']](row['reduce'], lm.host(row['length'])).events
  names = {row['reduce'].get('method') for row in real_language.get_config().rows}
  assert {*CACHE_REDUCERS, *LANGUAGE, *BASELINES} - {
      'none', 'pool', 'radial', *real_language.LEFT_OUT} <= names


def _row(name, share, draw, kl, told, versus='', **reduce):
  head = {'name': name, 'share': share, 'where': 'cache' if reduce else '', 'ranking': 'own',
          'versus': versus, 'reduce': reduce, 'length': 8, 'draw': draw}
  nll = [3 + kl + draw / 7, 4 + kl]
  yield {**head, 'measure': 'perplexity', 'nll': nll, 'kl': [kl, kl * 1.1], 'agreement': [1, 0.5],
         'kept': share}
  keys = {kind: [told] * 2 for kind in ('pass_key', 'two_keys', 'several')}
  yield {**head, 'measure': 'recall', 'told': keys, 'depths': [0.1, 0.9], 'kept': share,
         'nll': {kind: [kl, kl + 0.1 * draw] for kind in keys}}


ROWS = [row for draw in range(3) for each in (
    _row('full', 1.0, draw, 0.0, 1), _row('chance', 0.5, draw, 0.5 + 0.01 * draw, 0, method='x'),
    _row('good', 0.5, draw, 0.1, 1, method='good'),
    _row('wrapped(good)', 0.5, draw, 0.2, 1, versus='good', method='w'),
    _row('like chance', 0.5, draw, 0.5 + 0.2 * (draw - 1), 0, method='z')) for row in each]


def test_tables_mark_what_differs_from_chance_and_from_what_a_row_names():
  told = language_report.report(ROWS)
  loss, divergence = told.split('## ')[1:3]
  assert '| full | 0.000 ± 0.000 |' in loss
  assert '| good | 0.100 ± 0.000 ▼ |' in loss
  lines = {line.split(' | ')[0]: line for line in divergence.splitlines()}
  assert '▼' in lines['| good']
  assert not {'▼', '▲'} & set(lines['| like chance'])
  # Twelve keys inside, six behind.
  assert '| good | 1.00 (0.76–1.00) ▼ |' in told
  assert '| good | 1.00 (0.61–1.00) ▼ |' in told
  assert '| wrapped(good) | good | 50% | 2.00 (2.00 to 2.00) ** |' in told
  assert 'Keys told by depth, 50% kept' in told


def test_nothing_to_draw_is_said(tmp_path):
  with pytest.raises(ValueError, match='nothing to draw'):
    language_report.draw([], tmp_path / 'x.png')


@pytest.mark.long
def test_what_was_measured_is_drawn(tmp_path):
  path = tmp_path / 'x.png'
  language_report.draw(ROWS, path)
  assert path.stat().st_size > 10_000


METHODS = {
    'snapkv': {'window': 4}, 'adakv': {'inner': {'method': 'snapkv', 'args': {'window': 4}}},
    'criticaladakv': {'inner': {'method': 'tova'}}, 'cam': {'inner': {'method': 'tova'}},
    'pyramidkv': {'inner': {'method': 'snapkv', 'args': {'window': 4}}, 'beta': 2},
    'chunkkv': {'inner': {'method': 'tova'}, 'length': 5},
    'think': {'prune': 0.5, 'inner': {'method': 'tova'}}}


@pytest.mark.long
@pytest.mark.parametrize('method', METHODS)
def test_cut_caches_of_few_shapes_give_what_the_model_gives_with_its_own(method):
  reduce = {'method': method, 'keep_ratio': 0.5, 'args': METHODS[method]}
  lm, params = tiny_lm.TINY, tiny_lm.variables()
  ids = jax.random.randint(jax.random.key(1), (2, 40), 0, lm.vocabulary)
  prompt, chunk = ids[:, :32], ids[:, 32:]
  reader = Reader(lm)
  row = {'where': 'cache', 'ranking': 'own', 'reduce': reduce}
  prompts = reader(params, np.asarray(prompt), 0)
  cache, kept = reader.cut(prompts, reader.plan(row, 32), (16, 24, 32), room=8)
  own = lm.clone(cache_plan=make_cache_plan(reduce, lm.host(32)))
  first, wanted_cache = own.apply(params, prompt, room=8, method='prefill')
  np.testing.assert_allclose(prompts.logits, first, rtol=1e-4, atol=1e-4)
  got, wanted = (lm.apply(params, chunk, each, logits='all', method='extend')[0]
                 for each in (cache, wanted_cache))
  np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
  whole, _ = reader.cut(prompts, (None,) * lm.depth, (32,), room=8)
  unreduced, _ = lm.apply(params, chunk, whole, logits='all', method='extend')
  assert not np.allclose(got, unreduced, atol=1e-2)
  assert 0.3 < kept < 0.8


@pytest.mark.long
def test_rankings_by_chance_differ_from_layer_to_layer_and_keep_the_ends():
  lm, params = tiny_lm.TINY, tiny_lm.variables()
  reader = Reader(lm)
  prompts = reader(params, np.zeros((1, 60), np.int32), 0)
  reduce = {'method': 'knorm', 'keep_ratio': 0.6}
  kept = {}
  for ranking in ('chance', 'chance within ends', 'even'):
    row = {'where': 'cache', 'ranking': ranking, 'reduce': reduce}
    cache, _ = reader.cut(prompts, reader.plan(row, 60), (36, 60), room=0)
    kept[ranking] = [np.sort(layer.pos[0], axis=1) for layer in cache.layers]
  assert (kept['chance'][0] != kept['chance'][1]).any()
  assert (kept['chance'][0][0] != kept['chance'][0][1]).any()
  for layer in kept['chance within ends']:
    assert {*range(4), *range(28, 60)} <= set(layer[0].tolist())
  np.testing.assert_array_equal(kept['even'][0], kept['even'][1])
  assert np.diff(kept['even'][0][0]).max() <= 3


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  pytest.importorskip('gguf')
  from studies.gguf_files import written
  place = tmp_path_factory.mktemp('real')
  (place / 'smollm2').mkdir()
  (place / 'articles').mkdir()
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  written(place / 'smollm2' / 'small.gguf', tokens=('<|im_start|>', '<|im_end|>', 'ab', *alphabet))
  pages = [f'Page {i} has words ab {i * "cd "} ' * 30 + 'end.' for i in range(1, 6)]
  xml = ''.join(f'<page><revision><text>{page}</text></revision></page>' for page in pages)
  (place / 'articles' / 'a.bz2').write_bytes(bz2.compress(
      f'<mediawiki xmlns="x">{xml}</mediawiki>'.encode()))
  return place


def _config(folder, out, rows):
  return ConfigDict({'study': 'language', 'folder': str(folder), 'out': str(out), 'seed': 0,
                     'draws': 2, 'texts': 1, 'shares': (0.5,), 'behind': 12, 'greedy': 4,
                     'depths': (0.2, 0.8), 'longest_pass_key': 400, 'rounds': 1,
                     'rows': tuple(rows)}, convert_dict=False)


@pytest.mark.long
def test_rows_are_measured_once_and_say_what_was_lost(folder, tmp_path):
  rows = [{'measure': measure, 'length': length, 'draw': draw, **each}
          for measure, length, draw in (('perplexity', 60, 0), ('perplexity', 60, 1),
                                        ('recall', 400, 0))
          for each in (real_language.FULL,
                       real_language.row('tova', 0.5, 'cache', method='tova', keep_ratio=0.5),
                       real_language.row('in', 0.5, 'model', method='fastv', layers=(1,),
                                         keep_ratio=0.5))]
  rows += [{**rows[0], 'measure': 'windows', **each} for each in (
      real_language.FULL, real_language.row('s', 0.0, 'tokens', method='streaming_llm',
                                            capacity=16))]
  rows += [{**rows[0], 'measure': 'latency', **each} for each in (
      real_language.FULL, real_language.row('tova', 0.5, 'cache', method='tova', keep_ratio=0.5))]
  config = _config(folder, tmp_path / 'rows.jsonl', rows)
  for _ in range(2):
    run(config)
  told = read_jsonl(config.out)
  assert [row['name'] for row in told] == [row['name'] for row in rows]
  full, tova, inside = told[:3]
  assert full['kl'] == pytest.approx([0, 0], abs=1e-5)
  assert full['same'] == full['agreement'] == [1, 1]
  assert min(tova['kl']) > 1e-4
  assert (tova['kept'], inside['kept']) == (0.5, 0.75)
  assert told[3]['nll'] != full['nll']
  for row in told[6:9]:
    assert [len(row['nll'][kind]) for kind in ('pass_key', 'two_keys', 'several')] == [2, 2, 2]
  assert told[6]['nll']['several'] != told[7]['nll']['several']
  assert len(told[9]['nll']) == 4
  assert told[9]['nll'] != told[10]['nll']
  assert told[11]['first_share'] == told[11]['later_share'] == told[11]['kept'] == 1
  subject = language.Subject(config)
  ids = jnp.asarray(subject.texts(60 + 12 + 1, 0))
  logits, _ = subject.lm.apply(subject.weights, ids[:, :-1])
  nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(ids)[:, 1:, None],
                            axis=2)[:, 60:, 0].mean(axis=1)
  assert full['nll'] == pytest.approx(nll.tolist(), rel=1e-3)


@pytest.mark.long
def test_too_few_texts_and_unknown_measures_end_in_one_line(folder, tmp_path):
  subject = language.Subject(_config(folder, tmp_path / 'x.jsonl', ()))
  with pytest.raises(ValueError, match=r'a corpus has \d texts of 5000 tokens'):
    subject.texts(5000, 0)
  with pytest.raises(ValueError, match='is unknown'):
    subject.measure({'measure': 'odd', 'length': 1, 'draw': 0})
  with pytest.raises(ValueError, match=r'there is no \.gguf file'):
    language.Subject(_config(tmp_path, '', ()))
