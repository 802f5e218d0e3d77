"""What eval.py sweeps over models that answer questions: reductions at any place, under budgets.

An answer counts where greedy decoding gives it to the last token, the prompt having been read under
the reduction. Axes: B batch, K groups of questions (kinds, or tenths of the depth), A tokens of the
longest answer.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from ml_collections import ConfigDict

from lib.cost import lm as lm_cost
from lib.cost import vit as vit_cost
from lib.data import qa as qa_data
from lib.report import plots, tables
from lib.runtime import checkpoint, sharding, timing
from lib.tasks import base as tasks
from lib.tasks import qa as qa_task
from models.backbones.lm import LM
from models.storage import to_storage

TENTHS = tuple(f'{10 * tenth} %' for tenth in range(10))


@struct.dataclass
class Candidate:
  """A model under a reduction, compiled for a set.

  Attributes:
    model: with its plans. Static.
    run: (params, batch) -> float32[K, 2]. Static.
    compile_s: seconds that compiling took. Static.
  """

  model: object = struct.field(pytree_node=False)
  run: object = struct.field(pytree_node=False)
  compile_s: float = struct.field(pytree_node=False)


class Sweep:
  """A trained model, the sets to ask from, and what config.sweep asks to be measured on them.

  `config.sweep` has `candidates`, each a dict of `name` (as shown), `place` ('vision', 'projector',
  'language' or 'cache') and what config.reduce.<place> takes but for the budget; `budgets`, the
  shares of the tokens that are left after a candidate's last cut; and `sets`, pairs of a set's name
  and its context, () for that of config.data.
  """

  def __init__(self, config, workdir, mesh):
    self.config, self.mesh = config, mesh
    self._sets = {name: self._data(name, context) for name, context in (
        config.sweep.sets or ((config.data.name, config.data.context),))}
    self._info = {name: qa_data.info(data) for name, data in self._sets.items()}
    self.step, self._params = self._load(workdir)
    self._batches, self._base = {}, {}

  def rows(self):
    """What is to be measured: the first keys of each row, that tell it from others."""
    for name in self._sets:
      how = {'step': self.step, 'set': name}
      yield {**how, 'method': 'none', 'place': '', 'settings': '', 'budget': '1.0'}
      for candidate in self.config.sweep.candidates:
        settings = {key: value for key, value in candidate.items() if key not in ('name', 'place')}
        for budget in self.config.sweep.budgets:
          yield {**how, 'method': candidate['name'], 'place': candidate['place'],
                 'settings': json.dumps(settings, sort_keys=True), 'budget': str(budget)}

  def measure(self, row):
    """The other keys of a row: accuracy in all and by group, tokens, cost and latency.

    Raises:
      ValueError: a budget that this method cannot meet.
    """
    name = row['set']
    if name not in self._batches:
      self._batches = {name: [sharding.put(batch, self.mesh) for batch in qa_data.eval_batches(
          self._sets[name], process_index=jax.process_index(),
          process_count=jax.process_count())]}
      self._base = {}
    if not self._base:
      self._base = {name: self._prepare(name, {})}
    base, batches = self._base[name], self._batches[name]
    made = base if row['method'] == 'none' else self._prepare(name, reduction(row))
    right, count = tasks.sum_counts([made.run(self._params, batch) for batch in batches]).T
    runs = {'base': functools.partial(base.run, self._params, batches[0]),
            'made': functools.partial(made.run, self._params, batches[0])}
    times = timing.interleave(runs, rounds=self.config.sweep.rounds)
    faster = timing.speedup(times['base'], times['made'])
    own, full = (self._cost(name, one.model) for one in (made, base))
    groups = self._groups(name)
    return {
        'accuracy': float(right.sum() / count.sum()),
        'by': {group: float(r / max(c, 1)) for group, r, c in
               zip(groups, right, count, strict=True)},
        'questions': int(count.sum()), **own, 'gmacs_ratio': own['gmacs'] / full['gmacs'],
        'batch': self._sets[name].batch_size, 'dtype': self.config.model.dtype,
        'median_ms': times['made'].median_ms, 'low_ms': times['made'].low_ms,
        'high_ms': times['made'].high_ms, 'speedup': faster.ratio, 'speedup_low': faster.low,
        'speedup_high': faster.high, 'compile_s': made.compile_s, 'note': ''}

  def show(self, rows, workdir):
    """Prints a table, and draws accuracy against tokens, and by group where sets differ in length.

    One picture holds all questions of a set; others those of one kind each.
    """
    sweep = self.config.sweep
    print(tables.table(rows, ('set', 'method', 'place', 'budget', 'accuracy', 'kept_mean', 'gmacs',
                              'kv_mb', 'latency', 'speedup', 'note')))
    good = [row for row in rows if not row['note']]
    for name in self._sets:
      mine = [row for row in good if row['set'] == name]
      stem = name.replace('/', '_')
      drawn = {'': mine}
      if self._info[name].kinds:
        drawn |= {f'_{kind}': [row | {'accuracy': row['by'][kind]} for row in mine]
                  for kind in self._info[name].kinds}
      for suffix, chosen in drawn.items():
        print(plots.plot_accuracy_cost(
            chosen, workdir / f'accuracy_{stem}{suffix}.png', cost='kept_mean',
            title=f'{sweep.title}{suffix.replace("_", ": ", 1).replace("_", " ")}',
            baselines=tuple(sweep.baselines), reference='none'))
    if not all(one.kinds for one in self._info.values()):
      print(plots.heat_maps(recall(good), workdir / 'recall.png', title=sweep.title))

  def _data(self, name, context):
    data = ConfigDict(self.config.data.to_dict())
    data.update(name=name, context=context)
    if name != self.config.data.name:
      # Rows of equal work: a longer context in smaller batches.
      data.batch_size = max(1, data.batch_size * self.config.data.context // context)
    return data

  def _load(self, workdir):
    name, data = next(iter(self._sets.items()))
    model = self._model(name, {})
    init = functools.partial(qa_task.init, model, self._info[name], data.context)
    abstract = jax.eval_shape(init, jax.random.key(0))
    places = sharding.make_shardings(abstract, self.config.sharding, self.mesh)
    found = checkpoint.best(workdir, sharding.shapes(abstract, places), metric='accuracy')
    if found is None:
      raise FileNotFoundError(f'no checkpoint in {workdir / "checkpoints"}: train first, with '
                              f'python -m train --config=configs/<task>.py --workdir={workdir}')
    return found[0], to_storage(found[1], 'unstacked')

  def _model(self, name, reduce):
    mesh = self.mesh if self.mesh.size > 1 else None
    return qa_task.build(self.config.model, reduce, self._info[name],
                         context=self._sets[name].context, mesh=mesh,
                         platform=self.mesh.devices.flat[0].platform)

  def _prepare(self, name, reduce):
    model, groups = self._model(name, reduce), len(self._groups(name))
    # An answer ends with one more token.
    longest = 1 + self._info[name].answer_length
    run = jax.jit(functools.partial(count, model, groups, longest))
    made = timing.compile_seconds(run.lower(self._params, self._batches[name][0]))
    return Candidate(model, made.run, made.seconds)

  def _groups(self, name):
    return self._info[name].kinds or TENTHS

  def _cost(self, name, model):
    """Tokens a layer, image and text, and their mean over layers; MACs and cache of a prompt."""
    context, seen, visual = self._sets[name].context, 0, 0
    lm = model
    if not isinstance(model, LM):
      seen, lm = vit_cost.of(model.tower).macs, model.lm
      visual = qa_task.visual_tokens(model)
    read = lm_cost.of(lm, context + visual, room=1 + self._info[name].answer_length)
    left = [layer.cached for layer in read.layers]
    return {'tokens': left, 'kept_mean': sum(left) / len(left), 'gmacs': (seen + read.macs) / 1e9,
            'kv_mb': read.kv_bytes / 1e6}


def reduction(row):
  """`config.reduce` of a row: its budget is the share that its last cut leaves."""
  settings = json.loads(row['settings'])
  layers = settings.get('layers', 'all')
  if 'layers' in settings and row['place'] != 'cache':
    settings['layers'] = tuple(layers)
    share = float(row['budget']) ** (1 / len(layers))
  else:
    share = float(row['budget'])
  return {row['place']: {**settings, 'keep_ratio': share}}


def count(model, groups, longest, params, batch):
  """Answers of each group that are right, and all there are: float32[K, 2]."""
  right = qa_task.decoded(model, params, batch, longest=longest) * batch['mask']
  group = batch['kind']
  if 'depth' in batch:
    group = jnp.clip((batch['depth'] * groups).astype(jnp.int32), 0, groups - 1)
  member = jax.nn.one_hot(group, groups)
  return jnp.stack([right @ member, batch['mask'] @ member], axis=1)


def recall(rows):
  """{method and budget: (depths, lengths, share of keys found float[depths, lengths])}."""
  sets = list(dict.fromkeys(row['set'] for row in rows))
  names = list(dict.fromkeys((row['method'], row['budget']) for row in rows))
  found = {}
  for method, budget in names:
    by_set = {row['set']: row['by'] for row in rows
              if (row['method'], row['budget']) == (method, budget)}
    title = method if method == 'none' else f'{method}, {float(budget):.0%}'
    found[title] = (TENTHS, [name.split('/')[-1] for name in by_set], np.array(
        [[by_set[name][depth] for name in sets if name in by_set] for depth in TENTHS]))
  return found
