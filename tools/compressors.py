"""Compares learned compressors with training-free methods at equal tokens, over seeds.

  python -m tools.compressors --config=configs/digit_scenes_compressors_study.py \\
      --workdir=runs/compressors

An entry is trained once a seed, in a folder of --workdir, where a run that was killed goes on; what
serves several counts of tokens trains them in one run, and is measured at each. What needs no
training is measured on the model that the others take their parts from. Writes a JSON line a row
(rows that are there are not made again), a table in Markdown, and two plots: accuracy over tokens
of the language model, and over all MACs.

Axes: B batch, K kinds of questions.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

import train
from lib.cost import vlm as vlm_cost
from lib.cost.lm import LMCost
from lib.data import qa as qa_data
from lib.report import plots, tables
from lib.report.measuring import measure_rows, measured
from lib.report.rows import Row, replace_file
from lib.runtime import cli, launch, screen, sharding, timing
from lib.tasks import align, pretrained, qa_sweep
from lib.tasks import qa as qa_task
from lib.tasks.settings import TRAINING, check_config
from lib.tasks.sweep import digest
from lib.tasks.trained import load_run
from models.backbones.vlm import VLM
from models.storage import to_storage

# The recipe of what is measured as it is; the others are those of the config.
UNTRAINED = 'untrained'
# What an entry is made of, beside its recipe and its counts.
OF_ENTRY = ('compressor', 'reduce', 'stages', 'distill')


@dataclasses.dataclass(frozen=True)
class Score:
  """Holds what is counted as right.

  Attributes:
    count: (model, info) -> function of parameters and a batch, which gives float[K, 2].
    shown: what the share of it is called; takes the number of `questions`.
  """

  count: Callable[[VLM, Any], Callable[..., jax.Array]]
  shown: str


# By the task that was trained for.
SCORES = {
    'answers': Score(
        lambda model, info: functools.partial(qa_sweep.count, model, len(info.kinds),
                                              1 + info.answer_length),
        'Accuracy of {questions:,} questions in %, decoded greedily'),
    'align': Score(
        lambda model, info: functools.partial(align.count, model, len(info.kinds)),
        'Accuracy: of {questions:,} pictures those, in %, whose mean visual token is nearer to the '
        'embedding of the word for what they show than to any other')}


def main(argv: Sequence[str]) -> None:
  """Measures what is missing, then reports."""
  del argv
  screen.outlive()
  with launch.start():
    compare(launch.CONFIG.value, pathlib.Path(launch.WORKDIR.value))


def compare(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Measures the rows of a comparison that are missing, and writes its report.

  Args:
    config: as configs/digit_scenes_compressors_study.py makes it.
    workdir: where runs lie.

  Raises:
    ValueError: a training that its config contradicts, or a row that nothing can be measured of.
  """
  for entry in config.entries:
    if entry['recipe'] != UNTRAINED:
      for tokens in entry['counts']:
        check_config(training_of(config, entry, tokens, 0), *TRAINING)
  subject = functools.cache(lambda: Subject(config, workdir))
  path = pathlib.Path(config.out)
  rows = measure_rows(heads(config), lambda head: subject().measure(head), path=path,
                      about=timing.machine())
  replace_file(path.with_suffix('.md'), report(rows, config).encode())
  draw(rows, path, config)
  print(path.with_suffix('.md').read_text())


def heads(config: ConfigDict) -> list[Row]:
  """Returns the keys that name each row, a seed after another: an entry and one of its counts."""
  made_of = {recipe: digest([config.training.to_dict(), settings, config.source, config.test_split])
             for recipe, settings in {UNTRAINED: {}, **config.recipes}.items()}
  return [{'method': entry['name'], 'budget': tokens, 'recipe': entry['recipe'], 'seed': seed,
           'settings': json.dumps([entry.get(key) for key in OF_ENTRY] + [own], sort_keys=True),
           'made_of': made_of[entry['recipe']]}
          for seed in config.seeds for entry in config.entries
          if entry['recipe'] != UNTRAINED or seed == config.seeds[0]
          for tokens, own in entry['counts'].items()]


def training_of(config: ConfigDict, entry: Mapping[str, Any], tokens: str,
                seed: int) -> ConfigDict:
  """Returns the config that an entry is trained with, for one of its counts or for all of them."""
  made = ConfigDict(config.training.to_dict())
  made.seed = seed
  made.optimizer.update(config.recipes[entry['recipe']])
  with made.unlocked():
    if entry.get('compressor'):
      turns = tuple(entry['counts'].values()) if entry.get('nested') else ()
      args = {**entry['compressor'].get('args', {}), **entry['counts'][tokens]}
      made.model.compressor = {'turns': turns, 'train': 'draw', **entry['compressor'],
                               'args': args}
    for place, settings in entry.get('reduce', {}).items():
      made.reduce[place] = {**settings, **entry['counts'][tokens]}
    made.stages = entry.get('stages', ())
    if entry.get('distill'):
      made.optimizer.distill.update(entry['distill'])
  return made


class Subject:
  """Holds the model that all take their parts from, what is asked, and the latest training."""

  def __init__(self, config: ConfigDict, workdir: pathlib.Path) -> None:
    self.config, self.workdir = config, workdir
    self.mesh = sharding.make_mesh({}, jax.devices()[:1])
    self.source = functools.cache(lambda: load_run(config.source))
    data = ConfigDict(config.training.data.to_dict())
    data.update(test_split=config.test_split, batch_size=config.batch, turns=1)
    self.info = qa_data.info(data)
    self.batches = list(qa_data.eval_batches(data))
    self.context = data.context
    self._latest: tuple[Any, Any] = (None, None)
    self._program: tuple[Any, Any] = (None, None)

  def measure(self, head: Row) -> Row:
    """Returns accuracy in all, by kind and by batch, tokens, MACs, and what training took.

    Raises:
      ValueError: as models and training do.
    """
    entry = next(each for each in self.config.entries if each['name'] == head['method'])
    own = entry['counts'][head['budget']]
    if head['recipe'] == UNTRAINED:
      params, trained, seconds = self.source().params, 0, 0.0
      model = self._source_model(entry, own)
      if model.tower.image_size != self.info.image_shape[0]:
        params = {**params, 'tower': qa_sweep.for_smaller_images(params['tower'], model.tower)}
    else:
      params, trained, seconds = self._trained(entry, head['budget'], head['seed'])
      model = self._build(training_of(self.config, entry, head['budget'], head['seed']))
    counts = self._counts(model, params, head)
    correct, total = counts.sum(axis=0).T
    cost = vlm_cost.of(model, self.context, qa_task.LAYOUT, room=1 + self.info.answer_length)
    return {'accuracy': float(correct.sum() / total.sum()), 'set': '', 'place': '', 'note': '',
            'by_batch': (counts[..., 0].sum(axis=1) / counts[..., 1].sum(axis=1)).tolist(),
            'by': dict(zip(self.info.kinds, (correct / np.maximum(total, 1)).tolist(),
                           strict=True)),
            'questions': int(total.sum()), 'visual': self._visual(cost.lm),
            'gmacs': cost.macs / 1e9, 'lm_gmacs': cost.lm.macs / 1e9, 'trained': trained,
            'train_seconds': seconds, 'nested': bool(entry.get('nested'))}

  def _source_model(self, entry: Mapping[str, Any], own: Mapping[str, Any]) -> VLM:
    """The model of the source under an entry's reduction, or for smaller images."""
    height, _, channels = self.info.image_shape
    side = own.get('image_size', height)
    info = dataclasses.replace(self.info, image_shape=(side, side, channels))
    reduce = {place: {**settings, **own} for place, settings in entry.get('reduce', {}).items()}
    return qa_task.build(self.source().config.model, reduce, info, context=self.context)

  def _visual(self, cost: LMCost) -> float:
    """Visual tokens that a layer of the language model reads, on average."""
    return sum(layer.attention for layer in cost.layers) / len(cost.layers) - self.context

  def _build(self, training: ConfigDict) -> VLM:
    """The model of a training."""
    return qa_task.build(training.model, training.reduce, self.info, context=self.context)

  def _trained(self, entry: Mapping[str, Any], tokens: str,
               seed: int) -> tuple[Any, int, float]:
    """Averaged parameters of a training, how many numbers it changed, and its CPU seconds."""
    count = '_'.join(entry['counts'] if entry.get('nested') else [tokens])
    folder = self.workdir / f'{entry["name"]}_{count}'.replace(' ', '_') / f'seed_{seed}'
    if self._latest[0] != folder:
      training, start = training_of(self.config, entry, tokens, seed), time.process_time()
      if not train.run(training, folder, first=True):
        sys.exit('stopped; the same command goes on from there')
      seconds = time.process_time() - start
      model = self._build(training)
      init = functools.partial(qa_task.init, model, self.info, self.context)
      best = pretrained.best(folder, init,
                             functools.partial(pretrained.load, training.model, model), training,
                             self.mesh, metric='accuracy')
      assert best is not None
      shapes = jax.eval_shape(init, jax.random.key(0))
      changed = sum(leaf.size for leaf in jax.tree.leaves(
          pretrained.split(shapes, pretrained.names(training))[0]))
      self._latest = folder, (to_storage(best[1], 'unstacked'), changed, seconds)
    return self._latest[1]

  def _counts(self, model: VLM, params: Any, head: Row) -> np.ndarray:
    """Right and all answers of each batch and kind, float64[batches, K, 2]."""
    key = head['method'], head['budget']
    if self._program[0] != key:
      self._program = key, jax.jit(SCORES[self.config.training.task.name].count(model, self.info))
    run = self._program[1]
    return np.asarray([run(params, batch) for batch in self.batches], np.float64)


# -- reporting -----------------------------------------------------------------------------------


def summaries(rows: Sequence[Row], config: ConfigDict) -> list[Row]:
  """Returns a row a method and count: means over seeds, intervals, differences (`compared`)."""
  versus = {entry['name']: entry.get('versus', '') for entry in config.entries}
  good = measured(rows)
  joined = qa_sweep.compared(good, versus)
  seconds: dict[tuple[str, str], list[float]] = {}
  for row in good:
    seconds.setdefault((row['method'], row['budget']), []).append(row['train_seconds'])
  return [{**row, 'kept_mean': row['visual'], 'train_seconds': statistics.mean(
      seconds[row['method'], row['budget']]), 'seeds': len(seconds[row['method'], row['budget']])}
          for row in joined]


def report(rows: Sequence[Row], config: ConfigDict) -> str:
  """Writes the rows of each count of tokens as Markdown, best first, and what failed."""
  good, machine = summaries(rows, config), rows[0]
  kinds = list(good[0]['by'])
  steps = config.training.total_steps
  versus = {entry['name']: entry.get('versus', '') for entry in config.entries}
  data, several = config.training.data, len(config.seeds) > 1
  lines = [f'# {config.title}', '', f'{steps} steps of {data.batch_size} images '
           f'with {data.turns} question{"s" * (data.turns > 1)} each, seed{"s" * several} '
           f'{", ".join(map(str, config.seeds))} of initialisation and order of the data, as many '
           'as a row says. '
           f'{SCORES[config.training.task.name].shown.format(**good[0])}; its '
           'interval (95 %) covers questions and seeds. Differences, in points, are from the '
           'method named, and their intervals hold together. MACs are those of a prompt: all, and '
           'the language model\'s. Training takes CPU seconds, compiling included.', '',
           f'{machine["cpu"]}, jax {machine["jax"]}, float32, {machine["date"]}.', '']
  for tokens in dict.fromkeys(row['budget'] for row in good):
    own = sorted((row for row in good if row['budget'] == tokens), key=lambda r: -r['accuracy'])
    cells = [_cells(row, versus[row['method']], kinds) for row in own]
    lines += [f'## {tokens} token{"s" * (tokens != "1")}', '',
              tables.markdown(cells, list(cells[0])), '']
  failed = [row for row in rows if row.get('failed')]
  if failed:
    lines += ['## What could not be measured', '',
              *(f'- {row["method"]}, {row["budget"]}: {row["note"]}' for row in failed), '']
  return '\n'.join(lines)


def _cells(row: Row, versus: str, kinds: Sequence[str]) -> dict[str, str]:
  """One line of a table."""
  percent = [f'{100 * row[key]:.1f}' for key in ('accuracy', 'accuracy_low', 'accuracy_high')]
  apart = ''
  if row.get('difference') is not None:
    mean, low, high = (f'{100 * row[key]:+.1f}' for key in
                       ('difference', 'difference_low', 'difference_high'))
    apart = f'{mean} [{low}, {high}] {versus}'
  return {'method': row['method'] + ' (nested)' * row['nested'],
          'seeds': str(row['seeds']), 'visual tokens': f'{row["visual"]:g}',
          'accuracy, %': f'{percent[0]} [{percent[1]}, {percent[2]}]', 'difference from': apart,
          **{kind: f'{100 * row["by"][kind]:.0f}' for kind in kinds},
          'MMACs': f'{1e3 * row["gmacs"]:.1f}', 'of the LM': f'{1e3 * row["lm_gmacs"]:.1f}',
          'trained parameters': f'{row["trained"]:,}' if row['trained'] else '',
          'training, s': f'{row["train_seconds"]:.0f}' if row['trained'] else ''}


def draw(rows: Sequence[Row], path: pathlib.Path, config: ConfigDict) -> None:
  """Draws accuracy over tokens and over MACs, a line a method."""
  good = summaries(rows, config)
  for cost, name in (('kept_mean', 'tokens'), ('gmacs', 'macs')):
    plots.plot_accuracy_cost(good, path.with_name(f'{path.stem}_{name}.png'), title=config.title,
                             cost=cost, baselines=tuple(config.baselines), reference='none')


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
