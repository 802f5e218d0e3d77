"""Other libraries beside ours: what is asked of them, what is made of the answers, what is told."""

import ast
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from helpers import tiny_lm

from models.backbones.lm import LM
from models.plan import make_cache_plan
from ops.caches.heads import KVHeads
from ops.kv_cache import KV
from ops.rope import Rope
from tools.peers import command, environment, groups, kvpress, kvpress_rows, prompts, pylate, tome
from tools.peers.reading import Reader, held

REAL = pathlib.Path(os.environ.get('WINNOW_REAL', 'nowhere'))
PEERS = pathlib.Path(os.environ.get('WINNOW_PEERS', 'nowhere'))
MACHINE = {'peer': {'other': '1.0'}, 'threads': 1, 'rounds': 2, 'batch': 4, 'documents': 9,
           'cores': 1, 'cpu': 'a CPU', 'jax': '0', 'date': 'today', 'weights_mb': 1.0,
           'gflops': 1.0, 'read_gbytes': 1.0, 'token_floor_ms': 1.0, 'first_floor_ms': {'64': 2.0}}


def test_both_sides_know_the_same_presses():
  tree = ast.parse((environment.HERE / 'theirs' / 'kvpress_lm.py').read_text())
  theirs = next(node.value for node in tree.body if isinstance(node, ast.Assign)
                and node.targets[0].id == 'PRESSES')
  assert {key.value for key in theirs.keys} == kvpress.PRESSES.keys()


def test_the_other_sides_import_nothing_of_ours():
  for path in (environment.HERE / 'theirs').glob('*.py'):
    names = [alias.name if isinstance(node, ast.Import) else node.module
             for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
    assert not {name.split('.')[0] for name in names} & {'lib', 'models', 'ops', 'tools', 'winnow'}


@pytest.mark.parametrize('press', kvpress.PRESSES)
def test_a_press_keeps_the_share_that_is_asked(press):
  lm = LM(vocabulary=29, width=16, depth=30, mlp=24, heads=2, kv_heads=1, head_width=8,
          context=512, rope=Rope(8))
  for case in kvpress.cases([press], [0.5, 0.25], [512]):
    assert case.length == 512
    if case.reduce.get('method') == 'kvzip':  # It is no plan.
      assert case.reduce['keep_ratio'] == case.share
    elif case.reduce:
      events = make_cache_plan(case.reduce, lm.host(512)).events
      kept = sum(event.slots_out for event in events) / 30 / 512
      # The pyramid's layers are rounded one by one; the last has no budget.
      assert kept == pytest.approx(case.share, abs=0.01 if press == 'pyramidkv' else 1e-9)


def test_what_has_no_budget_is_measured_once():
  made = kvpress.cases(['full', 'knorm', 'simlayerkv'], [0.5, 0.25], [64, 128])
  assert [case.name for case in made[:4]] == ['full 1 64', 'knorm 0.5 64', 'knorm 0.25 64',
                                              'simlayerkv 1 64']
  assert len(made) == 8
  with pytest.raises(ValueError, match=r"'knrm'.*knorm"):
    kvpress.cases(['knrm'], [0.5], [64])


def test_kept_positions_are_compared_head_by_head():
  found = kvpress_rows.compared([[[0, 1], [2, 3]], [[0], [1, 2, 3]]],
                                [[[1, 0], [2, 4]], [[0, 1], [1, 2, 3]]])
  assert found == {'equal_heads': 0.5, 'equal_numbers': 0.75, 'exchanged': 1 / 8, 'layers': [0, 1]}


def test_sides_take_turns():
  said = []
  found = kvpress_rows.in_turns({side: functools.partial(_say, said, side) for side in 'ab'}, 3)
  assert said == list('abbaab')
  assert found == {'a': [1, 4, 5], 'b': [2, 3, 6]}


def _say(said, side):
  said.append(side)
  return len(said)


@pytest.mark.long
def test_positions_are_read_from_caches_of_equal_and_of_unequal_heads():
  keys = jnp.zeros((1, 2, 6, 4))
  pos = jnp.array([[[0, 3, 4, 5, 0, 0], [1, 2, 4, 5, 0, 0]]])
  even = KV.create(keys, keys, pos=pos, valid=pos >= 0, start=jnp.zeros(1, jnp.int32), filled=4)
  assert held(even, 2) == [[0, 3, 4, 5], [1, 2, 4, 5]]
  whole = KV.create(keys, keys, pos=jnp.arange(6)[None], valid=jnp.ones((1, 6), bool),
                    start=jnp.zeros(1, jnp.int32), filled=6)
  keep = np.zeros((1, 2, 6), bool)
  keep[0, 0, [1, 4, 5]], keep[0, 1, [2]] = True, True
  pages = KVHeads.create(jnp.asarray(keep), 4).shrink(whole, positions='keep', rope=Rope(4))
  assert held(pages, 2) == [[1, 4, 5], [2]]


@pytest.mark.long
def test_a_reader_goes_on_from_what_it_kept():
  lm, params = tiny_lm.TINY, tiny_lm.variables()['params']
  reader = Reader(lm, params, room=8)
  ids, given = list(range(1, 13)), [3, 7, 11]
  assert reader.read({}, ids) == [[list(range(12))] * 2] * 3
  likely, picked = reader.follow(given, 2)
  logits = jax.nn.log_softmax(lm.apply({'params': params}, jnp.asarray([[*ids, *given]]))[0][0])
  np.testing.assert_allclose(likely, [logits[11 + i, id] for i, id in enumerate(given)], atol=1e-5)
  assert picked[0] == int(logits[-1].argmax())
  kept = reader.read({'method': 'streaming_llm', 'keep_ratio': 0.5}, ids)
  assert kept == [[[0, 1, 2, 3, 10, 11]] * 2] * 3
  assert all(each > 0 for each in reader.time({}, ids, 2))
  memory = reader.memory({}, ids, 2)
  assert memory['peak'] >= memory['before'] > 0


def test_prompts_are_of_one_length_and_hold_their_key():
  texts = ['x' * 30, 'abc ' * 100, 'defg ' * 100]
  encode = functools.partial(map, ord)
  made = prompts.prompts(texts, lambda text: list(encode(text)), length=150, behind=20, count=2)
  for prompt, text in zip(made, texts[1:], strict=True):
    read = ''.join(map(chr, prompt.ids))
    assert len(read) == 150
    assert f'The pass key is {prompt.key}.' in read
    assert len(prompt.behind) == 20
    assert ''.join(map(chr, prompt.behind)) in text
  with pytest.raises(ValueError, match='2 articles'):
    prompts.prompts(texts, lambda text: list(encode(text)), length=150, behind=20, count=3)


def test_paragraphs_are_split_into_a_question_and_the_rest():
  first = 'A sentence that is neither short nor long at all'
  texts = [f'{first}. {"b" * 200}\n{first}. short\n{first}. {"c" * 200}']
  queries, documents = pylate.pairs(texts, lambda text: list(map(ord, f'[{text}]')), 2)
  assert [len(each) for each in documents] == [pylate.LENGTH] * 2
  assert all(chr(row[0]) + chr(row[-1]) == '[]' for row in (*queries, *documents))
  with pytest.raises(ValueError, match='2 paragraphs'):
    pylate.pairs(texts, lambda text: list(map(ord, text)), 3)


def test_groups_are_equal_whatever_their_numbers():
  one = np.array([0, 0, 1, 2])
  assert groups.same_groups(one, np.array([5, 5, 1, 0]))
  assert not groups.same_groups(one, np.array([0, 0, 1, 1]))
  assert not groups.same_groups(np.array([0, 0, 1, 1]), one)
  assert groups.shared_pairs(one, np.array([7, 7, 7, 1])) == 1 / 3


def test_features_are_compared_image_by_image():
  ours = {'features': np.eye(2), 'owner': np.array([[0, 0, 1], [0, 1, 1]])}
  theirs = {'features': np.array([[1, 0.5], [0, 2]]), 'owner': np.array([[1, 1, 0], [0, 0, 1]])}
  row = tome.agreement(ours, theirs)
  assert (row['largest_difference'], row['equal_groups']) == (1.0, 0.5)
  assert row['least_cosine'] == pytest.approx(1 / 1.25 ** 0.5)
  assert 'equal_groups' not in tome.agreement(ours, {'features': np.eye(2)})


def test_documents_are_found_by_their_nearest_vectors():
  documents = np.stack([np.eye(3)[:2], np.eye(3)[1:]])
  assert pylate.recall([np.eye(3)[:1], np.eye(3)[2:]], documents) == 1
  assert pylate.recall([np.eye(3)[2:], np.eye(3)[:1]], documents) == 0


def test_tables_show_both_sides():
  time = {f'{part}_{key}_ms': value for part in ('first', 'token')
          for key, value in (('median', 4.0), ('low', 3.0), ('high', 5.0))}
  side = {'perplexity': 8.0, 'answers': 1}
  cost = {'added_mb': 7.0, 'cache_mb': 2.5, **time}
  head = {'press': 'knorm', 'share': 0.5, 'length': 64, 'prompts': 2, 'equal_heads': 0.975,
          'exchanged': 0.001, 'layers': [0, 7], 'same_answers': 2}
  text = kvpress_rows.table({
      'machine': MACHINE,
      'knorm 0.5 64': {**head, 'rounds': 2, 'ours': side | cost,
                       'theirs': side | cost | {'first_median_ms': 6.0}},
      'tova 0.5 64': {**head, 'press': 'tova', 'rounds': 0, 'ours': side, 'theirs': side}})
  line = '| knorm | 50% | 64 | 97.5% | 0.10% | 0 7 | 8.000 | 8.000 | 1 of 2 | 1 of 2 | 2 of 2 |'
  assert line in text
  assert '| knorm | 50% | 64 | 4 [3, 5] | 6 [3, 5] | 1.50 |' in text
  assert text.count('| tova ') == 1
  times = {'median_ms': 10.0, 'low_ms': 9.0, 'high_ms': 11.0}
  text = tome.table({'machine': MACHINE, 'merged': {
      'largest_difference': 1e-5, 'least_cosine': 1.0, 'equal_groups': 1.0, 'ours': times,
      'theirs': {**times, 'median_ms': 20.0}}})
  assert '| merged | 1.0e-05 | 1.000000 | 100% | 10 [9, 11] | 20 [9, 11] | 400.0 | 200.0 |' in text
  text = pylate.table({'machine': MACHINE, 'none': {'vectors': 8, 'recall': 0.5},
                       '2, atc': {'vectors': 4, 'recall': 0.4, 'equal_clusters': 1.0,
                                  'shared_pairs': 0.5, **times}})
  assert '| none | 8 |  |  | 0.500 |  |' in text
  assert '| 2, atc | 4 | 100% | 0.50 | 0.400 | 10.00 [9.00, 11.00] |' in text


SCRIPT = '''
import pathlib, sys
sys.path.insert(0, {serving!r})
from serving import serve
def fail():
  print('this is no answer')
  raise KeyError('press')
def end(): sys.exit('out of memory')
serve({{'other': '2.0'}}, {{'double': lambda x: 2 * x, 'fail': fail, 'end': end}})
'''


@pytest.fixture
def other(tmp_path, monkeypatch):
  (tmp_path / 'theirs').mkdir()
  (tmp_path / 'theirs' / 'script.py').write_text(
      SCRIPT.format(serving=str(environment.HERE / 'theirs')))
  monkeypatch.setattr(environment, 'HERE', tmp_path)
  monkeypatch.setitem(environment.WANTED, 'other', '2.0')
  return functools.partial(environment.Peer, pathlib.Path(sys.executable), 'script',
                           library='other', threads=1)


def test_another_process_answers_and_its_failures_are_told(other, monkeypatch):
  with other() as peer:
    assert peer.versions == {'other': '2.0'}
    assert peer.ask('double', x=[1]) == [1, 1]
    with pytest.raises(ValueError, match="cannot fail: KeyError: 'press'"):
      peer.ask('fail')
    with pytest.raises(ValueError, match='said last: out of memory'):
      peer.ask('end')
  monkeypatch.setitem(environment.WANTED, 'other', '1.0')
  with pytest.raises(ValueError, match=r'has other 2\.0.*of 1\.0'):
    other()


def test_what_is_missing_is_told(tmp_path):
  with pytest.raises(ValueError, match=r'--peer=/no/python is no Python.*tome\.txt'):
    environment.python_of('tome', '/no/python', tmp_path)
  with pytest.raises(ValueError, match='threads=999'):
    environment.use_cores(999)
  with flagsaver.as_parsed(folder=str(tmp_path)), pytest.raises(ValueError, match=r'no \*\.gguf'):
    command.needed('smollm2', '*.gguf')


@pytest.mark.long
def test_positions_are_those_of_the_other_library(tmp_path):
  python = PEERS / 'kvpress' / 'bin' / 'python'
  if not (python.exists() and (REAL / 'smollm2').exists()):
    pytest.skip(f'WINNOW_PEERS={PEERS} has no kvpress/bin/python, or WINNOW_REAL={REAL} no smollm2')
  out = tmp_path / 'out.json'
  subprocess.run(
      [sys.executable, '-m', 'tools.peers.kvpress', f'--folder={REAL}', f'--peer={python}',
       '--presses=snapkv', '--lengths=128', '--percent=50', '--prompts=1', '--rounds=0',
       '--threads=1', f'--out={out}'], check=True)
  assert '| snapkv | 50% | 128 | 100.0% | 0.00% |  |' in out.with_suffix('.md').read_text()
