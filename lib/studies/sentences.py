"""Measures what reductions cost a pretrained encoder of texts, by what its vectors find.

  python -m tools.real.study --config=configs/real_sentences.py

The encoder is frozen: MiniLM, trained for one vector a text and not for late interaction. The first
paragraph of a docstring asks for the rest of it among those of other functions. Queries are read
whole; documents are reduced inside the encoder (`row['reduce']`), or their final token vectors are
(`row['pool']`), as an index of them would be. A row of JSON a method and budget:
  mean, maxsim   of one vector a document, and of all that are left: 'recall', 'recall_10' and
                 'reciprocal' among `config.candidates` documents, means over `config.pools` draws
                 of these; 'interval' of recall (95 %, over queries); 'from_full' and 'from_chance',
                 how much higher recall is than unreduced, and than at random with equal budget:
                 [mean, low, high], paired by query
  cosine, cka    likeness of the documents' mean vectors to the unreduced ones
  lee            Spearman correlation with people's judgement how alike two pieces of news are
  kept           share of the token vectors of a document that are left
  gmacs          10^9 MACs of a text of `config.tokens` tokens; 'gmacs_ratio' of the unreduced ones
  speedup        texts a second over those of the unreduced model, in turns

Axes: Q queries, N documents, T vectors of a text, D features.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from flax import struct

from lib.cost import vit as vit_cost
from lib.data.real.docstrings import docstring_pairs
from lib.data.tokenizers import HubTokenizer
from lib.report.intervals import paired
from lib.report.rows import Row
from lib.runtime import timing
from lib.studies.vision import cka, unit
from models.arrays import reduce_arrays
from models.backbones.bert import Bert
from models.checkpoints import load
from models.checkpoints.bert_config import from_config
from models.plan import make_plan
from models.storage import to_storage
from ops.primitives.match import l2_normalize
from ops.tokens import TokenSet

Array = jax.Array
ROUNDS = 3
# Keys of a reduction that are the method's, and no budget.
OWN = ('method', 'args', 'site')
BLOCK = 16  # Documents that are scored at once: the products of all would not fit into memory.


class Vectors(struct.PyTreeNode):
  """Holds texts as sets of vectors.

  Attributes:
    x: float32[N, T, D], of length 1.
    real: bool[N, T], False for padding.
  """

  x: Array
  real: Array

  @classmethod
  def of(cls, x: Array | np.ndarray, real: Array | np.ndarray | None = None) -> Vectors:
    """Returns vectors of any length, float[N, T, D] or one a text float[N, D], brought to 1."""
    x = jnp.asarray(x, jnp.float32)
    x = l2_normalize(x if x.ndim == 3 else x[:, None])
    return cls(x, jnp.ones(x.shape[:2], bool) if real is None else jnp.asarray(real))


def retrieve(queries: Vectors, documents: Vectors) -> np.ndarray:
  """Scores documents for queries by late interaction.

  MaxSim: each vector of a query finds its nearest in the document, and their cosines are added.
  ColBERT (Khattab and Zaharia, 2020), Sec. 3.3, arXiv:2004.12832. Of one vector a text that is
  their cosine.

  Args:
    queries: Q texts.
    documents: N texts, each with at least one vector.

  Returns:
    float32[Q, N].
  """
  number = len(documents.x)
  padding = -number % BLOCK

  def blocks(x: Array) -> Array:
    x = jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)))
    return x.reshape(-1, BLOCK, *x.shape[1:])

  return np.asarray(_maxsim(queries, jax.tree.map(blocks, documents)))[:number].T


@jax.jit
def _maxsim(queries: Vectors, documents: Vectors) -> Array:
  """Scores of documents in blocks, float32[N, Q]."""
  def scores(block: Vectors) -> Array:
    products = jnp.einsum('nsd,qtd->nsqt', block.x, queries.x)
    nearest = jnp.max(jnp.where(block.real[:, :, None, None], products, -jnp.inf), axis=1)
    return jnp.sum(jnp.where(queries.real, nearest, 0.0), axis=2)

  found = jax.lax.map(scores, documents)
  return found.reshape(-1, found.shape[-1])


def pooled(vectors: Vectors, method: str, keep_ratio: float,
           args: Mapping[str, Any] | None = None) -> Vectors:
  """Reduces the vectors of each text by a method that reads nothing but these.

  Args:
    vectors: of texts.
    method: its name in `models.plan.methods`; for what it reads as keys it is given the vectors.
    keep_ratio: the share of a text's own vectors that stays, rounded up.
    args: the method's own.

  Returns:
    Vectors of length 1, T as many as the longest text keeps.

  Raises:
    ValueError: as `models.arrays.reduce_arrays`.
  """
  tokens = TokenSet.create(vectors.x, valid=vectors.real)
  budget = jnp.ceil(jnp.sum(vectors.real, axis=1) * keep_ratio).astype(jnp.int32)
  tokens = reduce_arrays(tokens.replace(budget=budget), method, keep_ratio=keep_ratio, args=args,
                         keys=vectors.x[:, :, None], grid=(1, tokens.slots))
  return Vectors.of(tokens.x, tokens.real)


def ranks(scores: np.ndarray) -> np.ndarray:
  """Ranks for each query the document of the same number: int[Q], from 1; ties count against it."""
  return np.sum(~(scores < np.diag(scores)[:, None]), axis=1)


class Ids(NamedTuple):
  """Holds token ids of texts, int32[N, T], and which are real, bool[N, T]."""

  ids: np.ndarray
  valid: np.ndarray


@dataclasses.dataclass(frozen=True)
class Texts:
  """Holds what an encoder made of texts: one vector each, float32[N, D], and those of tokens."""

  mean: np.ndarray
  tokens: Vectors


@dataclasses.dataclass(frozen=True)
class Found:
  """Holds what one encoding of the documents finds.

  Attributes:
    hits: {'mean', 'maxsim': float[Q]}, how often a query finds its document first.
    figures: of a row, by name.
  """

  hits: Mapping[str, np.ndarray]
  figures: Mapping[str, Any]


class Subject:
  """Holds an encoder, its texts, and what is found without a reduction."""

  def __init__(self, config: Any) -> None:
    folder = pathlib.Path(config.folder)
    weights, news = folder / 'minilm', folder / 'articles'
    for path in (weights / 'config.json', news / 'similarities0-1.txt'):
      if not path.exists():
        raise ValueError(f'there is no {path}: `python -m tools.real.fetch` fetches it')
    self.config = config
    self._drawn: dict[str, Sequence[Found]] = {}
    self.bert = from_config(json.loads((weights / 'config.json').read_text()))
    self.params = to_storage({'params': load(self.bert, weights)}, storage='unstacked')
    read = HubTokenizer.of(weights)
    rng = np.random.default_rng(config.seed)
    queries, documents = docstring_pairs(rng, config.pairs)
    pools = [rng.permutation(config.pairs)[:config.candidates]
             for _ in range(config.pools)]
    # Queries that no draw has are not asked.
    self.asked = np.isin(np.arange(config.pairs), np.concatenate(pools))
    self.pools = pools
    lee = (news / 'lee.cor').read_text(errors='replace').splitlines()
    self.judged = np.loadtxt(news / 'similarities0-1.txt')[np.triu_indices(len(lee), 1)]
    self.documents = _ids(read, [*documents, *lee], config.tokens)
    self.queries = self._encode(self.bert, _ids(read, queries, config.query_tokens))

  def measure(self, row: Row) -> Row:
    """Measures one row: its 'reduce' is what a plan takes, its 'pool' what `pooled` takes."""
    chance = self._chance(row)
    by_chance = bool(chance) and self.config.chance['method'] in (
        row['reduce'].get('method'), row['pool'].get('method'))
    found = chance if by_chance else [self._found(row['reduce'], row['pool'])]
    measured = jax.tree.map(lambda *each: float(np.mean(each)), *(each.figures for each in found))
    if not row['pool']:
      measured |= self._costs(row['reduce'])
    for kind in found[0].hits:
      hits, drawn = (np.array([each.hits[kind] for each in several]) for several in (found, chance))
      full = self.full.hits[kind][None]
      measured[kind] |= {'interval': _higher(hits, np.zeros_like(full))[1:],
                         'from_full': _higher(hits, full)}
      if chance and not by_chance:
        measured[kind]['from_chance'] = _higher(hits, drawn)
    return measured

  @functools.cached_property
  def whole(self) -> Texts:
    """The documents, unreduced."""
    return self._encode(self.bert, self.documents)

  @functools.cached_property
  def full(self) -> Found:
    """Finds documents without a reduction, once."""
    return self._found({}, {})

  def _chance(self, row: Row) -> Sequence[Found]:
    """Finds documents at random with a row's budget, by seed; nothing for a row without any."""
    budget = {part: {key: value for key, value in row[part].items() if key not in OWN}
              for part in ('reduce', 'pool')}
    if not any(budget.values()):
      return ()
    name = json.dumps(budget, sort_keys=True)
    if name not in self._drawn:
      drawn = []
      for seed in range(self.config.seeds):
        chance = {**self.config.chance, 'args': {'seed': seed}}
        drawn.append(self._found(*(kept and {**kept, **chance} for kept in budget.values())))
      self._drawn[name] = drawn
    return self._drawn[name]

  def _found(self, reduce: Mapping[str, Any], pool: Mapping[str, Any]) -> Found:
    """Finds documents for the queries under a reduction."""
    bert = self._reduced(reduce)
    texts = self._encode(bert, self.documents) if reduce else self.whole
    number = self.config.pairs
    vectors = jax.tree.map(lambda x: x[:number], texts.tokens)
    vectors = pooled(vectors, **pool) if pool else vectors
    lengths = np.sum(self.documents.valid[:number])
    figures: dict[str, Any] = {'kept': float(jnp.sum(vectors.real) / lengths)}
    kinds = {'maxsim': (self.queries.tokens, vectors)}
    if not pool:
      own, whole = texts.mean[:number], self.whole.mean[:number]
      news = unit(texts.mean[number:])
      alike = (news @ news.T)[np.triu_indices(len(news), 1)]
      figures |= {'cosine': float(np.mean(np.sum(unit(own) * unit(whole), axis=1))),
                  'cka': cka(own, whole),
                  'lee': float(scipy.stats.spearmanr(alike, self.judged).statistic)}
      kinds['mean'] = (Vectors.of(self.queries.mean), Vectors.of(own))
    hits = {}
    for kind, pair in kinds.items():
      scores = retrieve(*pair)
      drawn = np.full((len(self.pools), number), np.nan)
      for draw, chosen in zip(drawn, self.pools, strict=True):
        draw[chosen] = ranks(scores[np.ix_(chosen, chosen)])
      drawn = drawn[:, self.asked]
      by_query = {name: np.nanmean(np.where(np.isnan(drawn), np.nan, values), axis=0)
                  for name, values in (('recall', drawn == 1), ('recall_10', drawn <= 10),
                                       ('reciprocal', 1 / drawn))}
      figures[kind] = {name: np.mean(values) for name, values in by_query.items()}
      hits[kind] = by_query['recall']
    return Found(hits, figures)

  def _reduced(self, reduce: Mapping[str, Any]) -> Bert:
    if not reduce:
      return self.bert
    return self.bert.clone(plan=make_plan(reduce, self.bert.host(self.config.tokens)))

  def _encode(self, bert: Bert, ids: Ids) -> Texts:
    """Encodes texts in batches of one size."""
    number, batch = len(ids.ids), self.config.batch
    made = []
    for first in range(0, number, batch):
      part = Ids(*(np.resize(each[first:first + batch], (batch, each.shape[1])) for each in ids))
      made.append(_read(bert, self.params, part.ids, part.valid))
    mean, x, real = (np.concatenate(parts)[:number] for parts in zip(*made, strict=True))
    return Texts(mean, Vectors.of(x, real))

  def _costs(self, reduce: Mapping[str, Any]) -> Row:
    """MACs of a text, and its time beside that of the unreduced model."""
    bert, batch = self._reduced(reduce), self.config.batch
    arch = dataclasses.replace(vit_cost.architecture(self.bert), slots=self.config.tokens)
    macs = [vit_cost.of(each, arch).macs for each in (bert, self.bert)]
    calls = {name: functools.partial(_read, each, self.params, self.documents.ids[:batch],
                                     self.documents.valid[:batch])
             for name, each in (('full', self.bert), ('own', bert))}
    # Both have run before, on the same shapes.
    times = timing.interleave(calls, rounds=ROUNDS, warmup=0)
    faster = timing.speedup(times['full'], times['own'])
    return {'gmacs': macs[0] / 1e9, 'gmacs_ratio': macs[0] / macs[1], 'speedup': faster.median}


@functools.partial(jax.jit, static_argnames='bert')
def _read(bert: Bert, params: Any, ids: Array, valid: Array) -> tuple[Array, Array, Array]:
  """The vector of each text, those of its tokens, and which of these are real."""
  mean, out = bert.apply(params, ids, valid)
  return mean, out['tokens'].x, out['tokens'].real


def _ids(read: HubTokenizer, texts: Sequence[str], length: int) -> Ids:
  """Token ids of texts, cut to a length."""
  ids, valid = np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), bool)
  for row, real, text in zip(ids, valid, texts, strict=True):
    found = read.encode(text, special=True)
    found = [*found[:length - 1], found[-1]]
    row[:len(found)], real[:len(found)] = found, True
  return Ids(ids, valid)


def _higher(ours: np.ndarray, theirs: np.ndarray) -> list[float]:
  """How much higher hits are than others, [mean, low, high]; float[K, Q], K 1 of one of both."""
  if len(theirs) > 1:
    difference = paired(ours[0], theirs)
    return [difference.mean, *difference.interval(0.95)]
  difference = paired(theirs[0], ours)
  low, high = difference.interval(0.95)
  return [0.0 - end for end in (difference.mean, high, low)]
