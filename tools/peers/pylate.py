"""Runs PyLate's hierarchical pooling and this library's on the same vectors of documents.

  python -m tools.peers.pylate --folder=real [--peer=.../bin/python]

MiniLM, an encoder of sentences, makes a vector of each token of paragraphs of Wikipedia; their
first sentences ask for the rest of them. PyLate joins vectors by Ward's linkage of cosine
distances; `atc` here has single, complete and average linkage, and no Ward's. Writes --out, a JSON
entry a pooling factor and linkage, and a table in Markdown beside it:
  equal_clusters  share of documents whose clusters are those of SciPy by the same linkage
  shared_pairs    of the pairs of vectors that either puts together, the share that both do: with
                  PyLate's clusters
  recall          share of queries whose document is the first by MaxSim, among all
  ms              of a document; medians and quartiles of rounds in turns
"""

from __future__ import annotations

import functools
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from lib.data.real.articles import articles
from lib.data.tokenizers import HubTokenizer
from lib.report import tables
from lib.runtime import cli, timing
from lib.studies.vision import unit
from models import checkpoints
from models.arrays import reduce_arrays
from models.checkpoints import files
from models.checkpoints.bert_config import from_config
from tools.peers import command
from tools.peers.groups import same_groups, shared_pairs

LENGTH, QUERY, BATCH = 128, 48, 16
LINKAGES = ('average', 'complete', 'single')

FACTORS = flags.DEFINE_list('factors', ['2', '4'], 'By what the number of vectors is divided.')
DOCUMENTS = flags.DEFINE_integer('documents', 200, 'Paragraphs.', lower_bound=BATCH)
cli.check_counts('factors', high=LENGTH // 2)


def pairs(texts: Sequence[str], encode: Callable[[str], list[int]],
          count: int) -> tuple[list[list[int]], list[list[int]]]:
  """Splits paragraphs into first sentences and the rest, as ids of at most and exactly a length.

  Raises:
    ValueError: there are fewer.
  """
  queries, documents = [], []
  for paragraph in (line for text in texts for line in text.splitlines()):
    first, _, rest = paragraph.partition('. ')
    ids = encode(rest)
    if len(ids) >= LENGTH and 40 < len(first) < 160 and len(queries) < count:
      asked = encode(first)
      queries.append([*asked[:QUERY - 1], asked[-1]][:QUERY])
      documents.append([*ids[:LENGTH - 1], ids[-1]])
  if len(queries) < count:
    raise ValueError(f'the articles have {len(queries)} paragraphs of {LENGTH} tokens, and {count} '
                     'are asked for: ask for fewer')
  return queries, documents


def recall(queries: Sequence[np.ndarray], documents: np.ndarray) -> float:
  """Counts queries float[T, D] whose own document float[B, M, D] is the first by MaxSim."""
  scores = [np.einsum('td,bmd->btm', query, documents).max(axis=2).sum(axis=1)
            for query in queries]
  return float(np.mean([score.argmax() == row for row, score in enumerate(scores)]))


def encoded(count: int) -> tuple[list[np.ndarray], np.ndarray]:
  """Returns unit vectors of queries, float[T, D] each, and of documents, float32[B, N, D].

  Raises:
    ValueError: the weights or the articles are not there.
  """
  home = command.needed('minilm', 'config.json').parent
  bert = from_config(files.config(home))
  params = {'params': checkpoints.load(bert, home)}
  read = HubTokenizer.of(home)
  queries, documents = pairs(articles(command.folder() / 'articles'),
                             functools.partial(read.encode, special=True), count)
  run = jax.jit(lambda ids, valid: bert.apply(params, ids, valid)[1]['tokens'].x)

  def vectors(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    ids = np.array([[*row, *[0] * (length - len(row))] for row in rows], np.int32)
    valid = np.arange(length)[None] < np.array([len(row) for row in rows])[:, None]
    found = [np.asarray(run(ids[at:at + BATCH], valid[at:at + BATCH]))
             for at in range(0, len(ids), BATCH)]
    return np.concatenate(found)

  asked = [unit(x[:len(row)]) for x, row in zip(vectors(queries, QUERY), queries, strict=True)]
  whole = vectors(documents, LENGTH)
  return asked, unit(whole.reshape(-1, whole.shape[2])).reshape(whole.shape).astype(np.float32)


def table(entries: Mapping[str, Any]) -> str:
  """Returns Markdown."""
  machine = entries['machine']

  def cell(row: Mapping[str, Any], key: str, form: str) -> str:
    return form.format(row[key]) if key in row else ''

  cells = [[name, cell(row, 'vectors', '{}'), cell(row, 'equal_clusters', '{:.0%}'),
            cell(row, 'shared_pairs', '{:.2f}'), f'{row["recall"]:.3f}',
            '{median_ms:.2f} [{low_ms:.2f}, {high_ms:.2f}]'.format(**row) if 'median_ms' in row
            else ''] for name, row in entries.items() if name != 'machine']
  return (f'MiniLM, {machine["documents"]} paragraphs of {LENGTH} tokens, '
          f'{command.versions(machine)}, threads of each side: {machine["threads"]}, '
          f'{tables.describe_machine(machine)}; medians [quartiles] of {machine["rounds"]} rounds '
          f'in turns, {BATCH} documents a call. A standard error of recall is at most '
          f'{0.5 / machine["documents"] ** 0.5:.3f}.\n\n'
          + tables.markdown_lines(['pooling', 'vectors', "SciPy's clusters", "PyLate's pairs",
                                   'recall', 'ms a document'], cells))


def main(argv: Sequence[str]) -> None:
  """Measures, and writes the figures and the table."""
  del argv
  command.needed('minilm', 'config.json')
  with command.start('pylate', 'pylate', 'pylate_pool') as peer:
    asked, whole = encoded(DOCUMENTS.value)
    entries: dict[str, Any] = {
        'machine': {**command.about(peer), 'documents': len(whole)},
        'none': {'vectors': LENGTH, 'recall': recall(asked, whole)}}
    with tempfile.TemporaryDirectory() as scratch:
      place = pathlib.Path(scratch)
      np.save(place / 'whole.npy', whole)
      peer.ask('load', path=str(place / 'whole.npy'), threads=command.THREADS.value)
      for factor in map(int, FACTORS.value):
        keep = (LENGTH - 1) // factor

        def pooled(x: np.ndarray, linkage: str, keep: int = keep) -> Any:
          return reduce_arrays(x, 'atc', keep=keep, args={'linkage': linkage}, protected=1,
                               keys=x[:, :, None])

        peer.ask('pool', factor=factor, out=str(place / 'pooled.npy'))
        theirs = np.array(peer.ask('clusters', factor=factor, linkage='ward'))
        calls = {f'{factor}, PyLate': lambda factor=factor: peer.ask('run', factor=factor,
                                                                    count=BATCH)}
        entries[f'{factor}, PyLate'] = {'vectors': 1 + keep, 'recall': recall(
            asked, np.load(place / 'pooled.npy'))}
        for linkage in LINKAGES:
          found = pooled(whole, linkage)
          ours = np.asarray(found.owner)[:, 1:]
          scipy = np.array(peer.ask('clusters', factor=factor, linkage=linkage))
          entries[f'{factor}, atc {linkage}'] = {
              'vectors': found.slots, 'recall': recall(asked, np.asarray(found.x)),
              'equal_clusters': float(np.mean(list(map(same_groups, ours, scipy)))),
              'shared_pairs': float(np.mean(list(map(shared_pairs, ours, theirs))))}
          calls[f'{factor}, atc {linkage}'] = (
              lambda linkage=linkage, pooled=pooled: pooled(whole[:BATCH], linkage).x)
        for name, time in timing.interleave(calls, rounds=command.ROUNDS.value).items():
          entries[name] |= {key: value / BATCH for key, value in time.fields().items()}
  command.write(command.out('pylate'), entries, table)


if __name__ == '__main__':
  cli.run(main)
