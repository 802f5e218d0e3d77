"""Measures how often a model of pretrained parts answers right, and what answers without it would.

  python -m tools.real.study --config=configs/real_scenes_study.py

Questions are about emoji of a vendor that training did not see. A row a set and `reader`:
  model          the model as it was trained
  other picture  the same, where each question comes with another question's picture: what the
                 questions alone tell
  neighbours     the tower alone: the name of the most similar training picture, by the mean of the
                 patches (of the quarter that is asked for); 'cls' by [CLS]
Of a row `by` has the share of right answers of each kind, decoded greedily to the last token, and
`named` the share of names that are the likeliest of all names. `within` is the half-width of a 95 %
interval.

Axes: B batch, N names, D features, G patches a side.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lib.assistant import of_run
from lib.data import qa as qa_data
from lib.data.datasets.emoji_scenes import CORNERS, COUNTS, NAMES
from lib.report.measuring import measured
from lib.report.plots import COLOURS
from lib.report.rows import Row
from lib.tasks import qa as qa_task
from lib.tasks.trained import load_run

CHANCE = {'name': 1 / len(NAMES), 'present': 1 / 2, 'count': 1 / (len(COUNTS) - 1)}


class Subject:
  """Holds a trained model, and which ids names begin with."""

  def __init__(self, config: Any) -> None:
    self.run = load_run(config.run)
    self.batch = config.batch
    assistant = of_run(self.run)
    self.params, self.tokens = assistant.params, assistant.tokens
    self.first = [self.tokens.encode(f' {name}', special=False)[0] for name in NAMES]
    self.answer = jax.jit(functools.partial(self._answer, longest=1 + self.run.info.answer_length))
    self.features = jax.jit(self._features)
    self.described = functools.cache(self._described)

  def measure(self, row: Row) -> Row:
    """Measures one row: its 'set' and its 'reader'."""
    data = ConfigDict(self.run.config.data.to_dict())
    data.update(name=row['set'], context=row['context'], batch_size=self.batch, kinds=(), turns=1,
                test_split=row['split'])
    kinds = qa_data.info(data).kinds
    if row['reader'] in ('neighbours', 'cls'):
      kinds, right, named = ('name',), *self._by_neighbours(data, row['reader'])
      kind = np.zeros(len(right), int)
    else:
      right, named, kind = self._by_model(data, shifted=row['reader'] == 'other picture')
    by, within = {}, {}
    for number, name in enumerate(kinds):
      own = right[kind == number]
      by[name] = float(own.mean())
      within[name] = float(1.96 * (own.mean() * (1 - own.mean()) / len(own)) ** 0.5)
    return {'by': by, 'within': within, 'questions': len(right),
            'named': float(named[kind == kinds.index('name')].mean()),
            'chance': {name: CHANCE[name] for name in kinds}}

  def _by_model(self, data: ConfigDict, *,
                shifted: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether each answer is right, whether its name is the likeliest, and its kind."""
    found = []
    for batch in qa_data.eval_batches(data):
      if shifted:
        # As far as no picture stays with its own questions.
        batch = batch | {'image': np.roll(batch['image'], len(batch['image']) // 2, axis=0)}
      right, likeliest = jax.device_get(self.answer(self.params, batch))
      begins = np.take_along_axis(batch['ids'], batch['answer'].argmax(axis=1)[:, None], axis=1)
      named = np.asarray(self.first)[likeliest] == begins[:, 0]
      real = batch['mask'] > 0
      found.append((right[real], named[real], batch['kind'][real]))
    right, named, kind = (np.concatenate(part) for part in zip(*found, strict=True))
    return right, named, kind

  def _by_neighbours(self, data: ConfigDict, features: str) -> tuple[np.ndarray, np.ndarray]:
    """Whether the most similar training picture has the right name, twice."""
    own = (data.name, data.context)
    *described, wanted = self.described(*own, data.test_split)
    asked = described[features == 'cls']
    *described, names = self.described(*own, 'train')
    known = described[features == 'cls']
    mean = known.mean(axis=0)
    known, asked = (x / np.linalg.norm(x, axis=1, keepdims=True)
                    for x in (known - mean, asked - mean))
    right = names[(asked @ known.T).argmax(axis=1)] == wanted
    return right, right

  def _described(self, name: str, context: int,
                 split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each question for a name: the mean of the patches that it asks for, [CLS], the answer."""
    data = ConfigDict(self.run.config.data.to_dict())
    data.update(name=name, context=context, batch_size=self.batch, kinds=('name',), turns=1,
                test_split=split)
    found, special, answers = [], [], []
    for batch in qa_data.eval_batches(data):
      patches, cls = jax.device_get(self.features(self.params, batch['image']))
      half = patches.shape[1] // 2
      for row in np.flatnonzero(batch['mask']):
        text = self.tokens.decode(batch['ids'][row])
        corner = next((number for number, name in enumerate(CORNERS) if name in text), None)
        own = patches[row]
        if corner is not None:
          top, left = (half * place for place in divmod(corner, 2))
          own = own[top:top + half, left:left + half]
        found.append(own.mean(axis=(0, 1)))
        special.append(cls[row])
        answers.append(batch['ids'][row, batch['answer'][row].argmax()])
    return np.stack(found), np.stack(special), np.asarray(answers)

  def _answer(self, params: Any, batch: Any, *, longest: int) -> tuple[jax.Array, jax.Array]:
    """Whether each answer is right, float32[B], and the number of the likeliest name, int32[B]."""
    first, right = qa_task.answers(self.run.model, params, batch, longest=longest)
    return right, first[:, jnp.asarray(self.first)].argmax(axis=1)

  def _features(self, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Features of patches, float32[B, G, G, D], and of [CLS], float32[B, D]."""
    tower = self.run.model.tower
    x = tower.apply({'params': params['tower']}, images)[1]['tokens'].x.astype(jnp.float32)
    return x[:, tower.special:].reshape(len(x), *tower.grid, -1), x[:, 0]


def report(rows: Sequence[Row]) -> str:
  """Writes the shares of right answers as Markdown."""
  sets = list(dict.fromkeys(row['set'] for row in rows))
  lines = []
  for name in sets:
    own = [row for row in measured(rows) if row['set'] == name]
    kinds = list(dict.fromkeys(kind for row in own for kind in row['by']))
    lines += [f'### {name}', '', f'| | {" | ".join(kinds)} | name, likeliest of {len(NAMES)} |',
              f'|---|{"---|" * (1 + len(kinds))}']
    for row in own:
      shares = [f'{row["by"][kind]:.3f} ± {row["within"][kind]:.3f}' if kind in row['by'] else ''
                for kind in kinds]
      lines.append(f'| {row["reader"]} | {" | ".join(shares)} | {row["named"]:.3f} |')
    chance = [f'{own[0]["chance"][kind]:.3f}' for kind in kinds]
    lines += [f'| chance | {" | ".join(chance)} | {CHANCE["name"]:.3f} |', '']
  return '\n'.join(lines)


def draw(rows: Sequence[Row], path: pathlib.Path) -> None:
  """Draws the shares of right answers of each kind, of every reader."""
  good = measured(rows)
  sets = list(dict.fromkeys(row['set'] for row in good))
  figure = Figure(figsize=(4.5 * len(sets), 3.2), layout='constrained')
  FigureCanvasAgg(figure)
  for axes, name in zip(np.atleast_1d(figure.subplots(1, len(sets))), sets, strict=True):
    own = [row for row in good if row['set'] == name]
    kinds = list(own[0]['by'])
    for number, row in enumerate(own):
      there = [kind for kind in kinds if kind in row['by']]
      axes.bar([kinds.index(kind) + 0.2 * number for kind in there],
               [row['by'][kind] for kind in there], 0.18, label=row['reader'],
               yerr=[row['within'][kind] for kind in there], color=COLOURS[number])
    axes.hlines([own[0]['chance'][kind] for kind in kinds], np.arange(len(kinds)) - 0.15,
                np.arange(len(kinds)) + 0.75, colors='black', linestyles='dotted', label='chance')
    axes.set(title=name, ylim=(0, 1), xticks=np.arange(len(kinds)) + 0.3, xticklabels=kinds,
             ylabel='right answers')
  axes.legend()
  figure.savefig(path, dpi=150)
