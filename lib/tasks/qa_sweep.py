"""The sweep over models that answer questions: reductions of any component, under budgets.

An answer counts where greedy decoding gives it to the last token, the prompt having been read under
the reduction. Axes: B batch, K groups of questions (kinds, or tenths of the depth), A tokens of the
longest answer.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lib.cost import lm as lm_cost
from lib.cost import vit as vit_cost
from lib.data import qa as qa_data
from lib.report import plots, tables
from lib.report.rows import Row
from lib.runtime import memory, sharding, timing
from lib.tasks import pretrained
from lib.tasks import qa as qa_task
from lib.tasks.base import sum_counts
from lib.tasks.sweep import Candidate, Sweep, fingerprint
from models.backbones.lm import LM
from models.backbones.vlm import VLM
from models.storage import to_storage

TENTHS = tuple(f'{10 * tenth} %' for tenth in range(10))


class QASweep(Sweep):
  """Measures reductions of any component on questions of one set or several.

  `config.sweep` has `candidates`, each a dict of `name` (as shown), `place` ('vision', 'projector',
  'language' or 'cache') and the keys of config.reduce.<place> without a budget; `budgets`, the
  fractions of the tokens that are left after a candidate's last cut; and `sets`, pairs of a set's
  name and its context, () for that of config.data.
  """

  def __init__(self, config: ConfigDict, workdir: pathlib.Path, mesh: Mesh):
    super().__init__(config, workdir, mesh)
    self._sets = {name: self._data(name, context) for name, context in (
        config.sweep.sets or ((config.data.name, config.data.context),))}
    self._info = {name: qa_data.info(data) for name, data in self._sets.items()}
    model = self._model(next(iter(self._sets)), {})
    width = (model if isinstance(model, LM) else model.lm).width
    for data in self._sets.values():
      memory.check_batch(data.batch_size, slots=data.context, width=width, mesh=mesh)
    self.step, self.weights, self._params = self._load(workdir)
    # Of the set that was measured last.
    self._batches: dict[str, list[Any]] = {}
    self._base: dict[str, Candidate] = {}

  def rows(self) -> Iterator[Row]:
    """Yields the rows to measure, as `Sweep.rows`."""
    for name in self._sets:
      shared, made_of = {'step': self.step, 'set': name}, self.made_of(self._sets[name])
      yield {**shared, 'method': 'none', 'place': '', 'settings': '', 'budget': '1.0',
             'made_of': made_of}
      for candidate in self.config.sweep.candidates:
        settings = {key: value for key, value in candidate.items() if key not in ('name', 'place')}
        for budget in self.config.sweep.budgets:
          yield {**shared, 'method': candidate['name'], 'place': candidate['place'],
                 'settings': json.dumps(settings, sort_keys=True), 'budget': str(budget),
                 'made_of': made_of}

  def measure(self, row: Row) -> Row:
    """Returns accuracy in all and by group, tokens, cost and latency, as `Sweep.measure`."""
    name = row['set']
    batches, base = self._prepared_set(name)
    candidate = base if row['method'] == 'none' else self._prepare(name, reduction(row))
    correct, total = sum_counts(
        [candidate.run(candidate.params, batch) for batch in batches]).T
    latency = self.latency(functools.partial(base.run, base.params, batches[0]),
                           functools.partial(candidate.run, candidate.params, batches[0]))
    own, full = (self._cost(name, each.model) for each in (candidate, base))
    return {
        'accuracy': float(correct.sum() / total.sum()),
        'by': {group: float(right / max(count, 1)) for group, right, count in
               zip(self._groups(name), correct, total, strict=True)},
        'questions': int(total.sum()), **own, 'gmacs_ratio': own['gmacs'] / full['gmacs'],
        'batch': self._sets[name].batch_size, 'dtype': self.config.model.dtype,
        **latency, 'compile_s': candidate.compile_s, 'note': ''}

  def show(self, rows: Sequence[Row], workdir: pathlib.Path) -> None:
    """Prints a table, and draws accuracy against tokens, and by group where sets differ in length.

    One picture holds all questions of a set; others those of one kind each.
    """
    sweep = self.config.sweep
    print(tables.table(rows, ('set', 'method', 'place', 'budget', 'accuracy', 'kept_mean', 'gmacs',
                              'kv_mb', 'latency', 'speedup', 'note')))
    measured = [row for row in rows if not row['note']]
    for name in self._sets:
      of_set = [row for row in measured if row['set'] == name]
      by_suffix = {'': of_set} | {
          f'_{kind}': [{**row, 'accuracy': row['by'][kind]} for row in of_set]
          for kind in self._info[name].kinds}
      stem = name.replace('/', '_')
      for suffix, drawn in by_suffix.items():
        print(plots.plot_accuracy_cost(
            drawn, workdir / f'accuracy_{stem}{suffix}.png', cost='kept_mean',
            title=f'{sweep.title}{suffix.replace("_", ": ", 1).replace("_", " ")}',
            baselines=tuple(sweep.baselines), reference='none'))
    if not all(info.kinds for info in self._info.values()):
      print(plots.heat_maps(recall(measured), workdir / 'recall.png', title=sweep.title))

  def _data(self, name: str, context: int) -> ConfigDict:
    """Returns the data config of one of the sets."""
    data = ConfigDict(self.config.data.to_dict())
    data.update(name=name, context=context)
    if name != self.config.data.name:
      # Rows of equal work: a longer context in smaller batches.
      data.batch_size = max(1, data.batch_size * self.config.data.context // context)
    return data

  def _load(self, workdir: pathlib.Path) -> tuple[int, str, Any]:
    """Returns the best checkpoint's step, its fingerprint, and its parameters."""
    name, data = next(iter(self._sets.items()))
    model = self._model(name, {})
    best = pretrained.best(
        workdir, functools.partial(qa_task.init, model, self._info[name], data.context),
        functools.partial(pretrained.load, self.config.model, model), self.config, self.mesh,
        metric='accuracy')
    if best is None:
      raise FileNotFoundError(f'no checkpoint in {workdir / "checkpoints"}: train first, with '
                              f'python -m train --config=configs/<task>.py --workdir={workdir}')
    return best[0], fingerprint(best[1]), to_storage(best[1], 'unstacked')

  def _prepared_set(self, name: str) -> tuple[list[Any], Candidate]:
    """Returns a set's batches and the unreduced model for it; those of the last set are let go."""
    if name not in self._batches:
      self._batches = {name: [sharding.put(batch, self.mesh) for batch in qa_data.eval_batches(
          self._sets[name], process_index=jax.process_index(),
          process_count=jax.process_count())]}
      self._base = {}
    if name not in self._base:
      self._base = {name: self._prepare(name, {})}
    return self._batches[name], self._base[name]

  def _model(self, name: str, reduce: Mapping[str, Any]) -> LM | VLM:
    mesh = self.mesh if self.mesh.size > 1 else None
    return qa_task.build(self.config.model, reduce, self._info[name],
                         context=self._sets[name].context, mesh=mesh,
                         platform=self.mesh.devices.flat[0].platform)

  def _prepare(self, name: str, reduce: Mapping[str, Any]) -> Candidate:
    """Builds and compiles one candidate; it runs on batches, and gives `count`'s float32[K, 2]."""
    model, groups = self._model(name, reduce), len(self._groups(name))
    # An answer ends with one more token.
    longest = 1 + self._info[name].answer_length
    run = jax.jit(functools.partial(count, model, groups, longest))
    program = timing.compile_seconds(run.lower(self._params, self._batches[name][0]))
    return Candidate(model, self._params, program.run, program.seconds)

  def _groups(self, name: str) -> Sequence[str]:
    return self._info[name].kinds or TENTHS

  def _cost(self, name: str, model: LM | VLM) -> dict[str, Any]:
    """Returns the tokens of each layer and their mean; MACs and cache of a prompt."""
    context, tower_macs, visual = self._sets[name].context, 0, 0
    if isinstance(model, LM):
      lm = model
    else:
      tower_macs, lm = vit_cost.of(model.tower).macs, model.lm
      visual = qa_task.visual_tokens(model)
    cost = lm_cost.of(lm, context + visual, room=1 + self._info[name].answer_length)
    tokens = [layer.cached for layer in cost.layers]
    return {'tokens': tokens, 'kept_mean': sum(tokens) / len(tokens),
            'gmacs': (tower_macs + cost.macs) / 1e9, 'kv_mb': cost.kv_bytes / 1e6}


def reduction(row: Row) -> dict[str, dict[str, Any]]:
  """Returns `config.reduce` of a row: its budget is the fraction that its last cut leaves.

  Where it is '', the settings have a budget of their own.
  """
  settings = json.loads(row['settings'])
  if not row['budget']:
    return {row['place']: {key: tuple(value) if isinstance(value, list) else value
                           for key, value in settings.items()}}
  layers = settings.get('layers', 'all')
  if 'layers' in settings and row['place'] != 'cache':
    settings['layers'] = tuple(layers)
    ratio = float(row['budget']) ** (1 / len(layers))
  else:
    ratio = float(row['budget'])
  return {row['place']: {**settings, 'keep_ratio': ratio}}


def count(model: LM | VLM, groups: int, longest: int, params: Any,
          batch: Mapping[str, Any]) -> jax.Array:
  """Counts the answers of each group that are right, and all answers: float32[K, 2].

  Args:
    model: with its plans.
    groups: K.
    longest: A, its end token among them.
    params: of the model.
    batch: of lib/data/qa.py.
  """
  correct = qa_task.exact_match(model, params, batch, longest=longest) * batch['mask']
  group = batch['kind']
  if 'depth' in batch:
    group = jnp.clip((batch['depth'] * groups).astype(jnp.int32), 0, groups - 1)
  member = jax.nn.one_hot(group, groups)
  return jnp.stack([correct @ member, batch['mask'] @ member], axis=1)


def recall(rows: Sequence[Row]) -> dict[str, tuple[Sequence[str], Sequence[str], np.ndarray]]:
  """Returns {method and budget: (depths, lengths, recall float[depths, lengths])}."""
  sets = list(dict.fromkeys(row['set'] for row in rows))
  names = list(dict.fromkeys((row['method'], row['budget']) for row in rows))
  maps: dict[str, tuple[Sequence[str], Sequence[str], np.ndarray]] = {}
  for method, budget in names:
    by_set = {row['set']: row['by'] for row in rows
              if (row['method'], row['budget']) == (method, budget)}
    title = method if method == 'none' else f'{method}, {float(budget):.0%}'
    maps[title] = (TENTHS, [name.split('/')[-1] for name in by_set], np.array(
        [[by_set[name][depth] for name in sets if name in by_set] for depth in TENTHS]))
  return maps
