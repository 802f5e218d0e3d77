"""What an encoder of texts finds: late interaction, pooling of its vectors, and a tiny study."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from ml_collections import ConfigDict

from configs import real_sentences
from lib.data.real.docstrings import docstring_pairs
from lib.report.rows import read_jsonl
from lib.studies import sentences
from lib.studies.sentences import Vectors, pooled, ranks, retrieve
from lib.studies.sentences_report import draw, report
from models import checkpoints
from models.checkpoints.bert_config import from_config
from tools.real.study import run

RNG = np.random.default_rng(0)
MODULE = '''
def parse(text):
  """Parse words of a text into numbers.

  {rest}
  """
def _hidden():
  """A private function is not asked about.

  {rest}
  """
class Reader:
  """Reader of lines, one after the other.

  {rest} It
  goes on here.
  """
  def again(self):
    """Parse words of a text into numbers.

    The same question once more is left out, as it has two answers. {rest}
    """
  def short(self):
    """No rest."""
'''


def texts(count, slots, shortest=1):
  """Sets of vectors of several lengths."""
  lengths = RNG.integers(shortest, slots + 1, count)
  return Vectors.of(RNG.normal(size=(count, slots, 6)), np.arange(slots) < lengths[:, None])


def test_docstrings_of_a_folder(tmp_path):
  (tmp_path / 'one.py').write_text(MODULE.replace('{rest}', 'Words. ' * 20))
  queries, documents = docstring_pairs(np.random.default_rng(0), 2, tmp_path)
  assert dict(zip(queries, documents, strict=True)) == {
      'Parse words of a text into numbers.': ('Words. ' * 20).strip(),
      'Reader of lines, one after the other.': 'Words. ' * 20 + 'It goes on here.'}
  with pytest.raises(ValueError, match=r'has 2 docstrings .* and 3 are asked for: ask for fewer'):
    docstring_pairs(np.random.default_rng(0), 3, tmp_path)


@pytest.mark.long
def test_the_standard_library_has_docstrings_enough():
  queries, documents = docstring_pairs(np.random.default_rng(0), 480)
  assert len(set(queries)) == len(set(documents)) == 480
  assert (queries, documents) == docstring_pairs(np.random.default_rng(0), 480)


def test_late_interaction_adds_the_nearest_of_each_vector():
  queries, documents = texts(3, 4), texts(sentences.BLOCK + 2, 7)
  scores = retrieve(queries, documents)
  asked, told = ([x[real] for x, real in zip(*map(np.asarray, (each.x, each.real)), strict=True)]
                 for each in (queries, documents))
  for (q, d), score in np.ndenumerate(scores):
    products = asked[q] @ told[d].T
    assert score == pytest.approx(float(products.max(axis=1).sum()), abs=1e-5)


def test_one_vector_a_text_is_scored_by_cosine():
  one, other = RNG.normal(size=(3, 6)), RNG.normal(size=(4, 6))
  cosine = (one @ other.T) / np.outer(np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1))
  np.testing.assert_allclose(retrieve(Vectors.of(one), Vectors.of(other)), cosine, atol=1e-6)


def test_ties_count_against_a_document():
  np.testing.assert_array_equal(ranks(np.array([[3., 1, 2], [5, 5, 5], [9, 7, 8]])), [1, 3, 2])


@pytest.mark.long
@pytest.mark.parametrize('row', real_sentences.get_config().rows[1:9],
                         ids=lambda row: row['name'])
def test_vectors_of_a_text_are_pooled_alike_whatever_stands_beside_it(row):
  vectors = texts(4, 11, shortest=3)
  found = pooled(vectors, **row['pool'])
  lengths = np.asarray(jnp.sum(vectors.real, axis=1))
  np.testing.assert_array_equal(jnp.sum(found.real, axis=1), np.ceil(lengths / 2))
  np.testing.assert_allclose(jnp.linalg.norm(found.x[found.real], axis=-1), 1, atol=1e-5)
  shortest = int(np.argmin(lengths))
  alone = pooled(Vectors.of(vectors.x[shortest:shortest + 1, :lengths[shortest]]), **row['pool'])
  np.testing.assert_allclose(_sorted(found.x[shortest][found.real[shortest]]), _sorted(alone.x[0]),
                             atol=1e-5)


def _sorted(x):
  return np.asarray(x)[np.lexsort(np.asarray(x).round(4).T)]


def files(folder):
  """A tiny encoder that reads letters, and three pieces of news."""
  weights, news = folder / 'minilm', folder / 'articles'
  for place in (weights, news):
    place.mkdir()
  special = ['[CLS]', '[SEP]']
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  read = tokenizers.Tokenizer(tokenizers.models.BPE(
      vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
  read.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  read.post_processor = tokenizers.processors.TemplateProcessing(
      single='[CLS] $A [SEP]', special_tokens=[(token, i) for i, token in enumerate(special)])
  read.save(str(weights / 'tokenizer.json'))
  config = {'model_type': 'bert', 'hidden_size': 16, 'num_hidden_layers': 2,
            'num_attention_heads': 2, 'intermediate_size': 16, 'vocab_size': 258,
            'max_position_embeddings': 32}
  (weights / 'config.json').write_text(json.dumps(config))
  bert = from_config(config)
  params = jax.jit(bert.init)(jax.random.key(0), np.zeros((1, 4), np.int32))['params']
  params = jax.tree.map(lambda x: 5 * np.asarray(x) if x.ndim > 1 else np.asarray(x), params)
  checkpoints.save(bert, params, weights / 'model.safetensors', layout='transformers/bert')
  (news / 'lee.cor').write_text('a storm came\nno storm came\nthe team has won\n')
  np.savetxt(news / 'similarities0-1.txt', [[1, 0.8, 0.1], [0, 1, 0.2], [0, 0, 1]])


@pytest.mark.long
def test_rows_say_what_was_lost_and_what_chance_loses(tmp_path):
  files(tmp_path)
  cut = {'layers': 1, 'keep_ratio': 0.25}
  rows = [{'name': 'full', 'reduce': {}, 'pool': {}}, *(
      {'name': name, 'reduce': {'method': name, **cut} if inside else {},
       'pool': {} if inside else {'method': name, 'keep_ratio': 0.25}}
      for inside in (False, True) for name in ('random', 'atc', 'nothing'))]
  rows = [{'budget': f'a quarter, {bool(row["pool"])}', **row} for row in rows]
  config = ConfigDict({'study': 'sentences', 'folder': str(tmp_path), 'seed': 0, 'pairs': 20,
                       'out': str(tmp_path / 'rows.jsonl'), 'tokens': 24, 'query_tokens': 16,
                       'batch': 8, 'candidates': 15, 'pools': 3, 'seeds': 2,
                       'chance': {'method': 'random'}, 'rows': tuple(rows)}, convert_dict=False)
  for _ in range(2):
    run(config)
  found = [row for row in read_jsonl(config.out) if not row.get('failed')]
  assert [row['name'] for row in found] == ['full', 'random', 'atc', 'random', 'atc']
  full, *others = found
  assert (full['kept'], full['gmacs_ratio']) == (1, 1)
  assert full['cosine'] == full['cka'] == pytest.approx(1)
  assert full['maxsim']['from_full'] == [0, 0, 0]
  for row in others:
    assert 0.25 <= row['kept'] < 0.4
    for kind in ('maxsim', 'mean') if row['reduce'] else ('maxsim',):
      mean, low, high = row[kind]['from_full']
      assert mean == pytest.approx(row[kind]['recall'] - full[kind]['recall'])
      assert low <= mean <= high
      assert ('from_chance' in row[kind]) == (row['name'] == 'atc')
  assert 0 < others[-1]['cosine'] < 0.99999
  assert others[-1]['gmacs_ratio'] < 1
  more = [{**row, 'kept': 2 * row['kept']} for row in others]
  draw([*found, *more], tmp_path / 'rows.png')
  assert (tmp_path / 'rows.png').stat().st_size > 20_000
  assert report(found).count('\n| atc |') == 4


def test_what_is_missing_is_told_in_a_line(tmp_path):
  with pytest.raises(ValueError, match='fetches it'):
    sentences.Subject(ConfigDict({'folder': str(tmp_path)}))
