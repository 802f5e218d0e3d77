"""The sweep over models that answer questions: reductions of any component, under budgets.

An answer counts where greedy decoding gives it to the last token, the prompt having been read under
the reduction. Axes: B batch, K groups of questions (kinds, or tenths of the depth), A tokens of the
longest answer.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lib.cost import lm as lm_cost
from lib.cost import vlm as vlm_cost
from lib.data import qa as qa_data
from lib.report import intervals, overlay, plots, provenance, tables
from lib.report.rows import Row
from lib.runtime import memory, sharding, timing
from lib.tasks import pretrained
from lib.tasks import qa as qa_task
from lib.tasks.sweep import Candidate, Sweep, fingerprint
from models.backbones.lm import LM
from models.backbones.vlm import VLM
from models.checkpoints.positions import bicubic_antialiased
from models.storage import to_storage
from ops import choices

TENTHS = tuple(f'{10 * tenth} %' for tenth in range(10))
OF_MACS = 'MACs '
# Keys of a candidate that are none of its reduction.
OF_CANDIDATE = ('name', 'place', 'budgets', 'versus')


class QASweep(Sweep):
  """Measures reductions of any component on questions of one set or several.

  `config.sweep` has `candidates`, each a dict of `name` (as shown), `place` ('vision', 'projector',
  'language' or 'cache') and the keys of config.reduce.<place> without a budget; `budgets`, the
  fractions of the tokens that are left after a candidate's last cut; and `sets`, pairs of a set's
  name and its context, () for that of config.data. At the place 'image' nothing is reduced, but the
  image is smaller, by as many patches. Candidates of one name, which differ in their settings, are
  draws of the same. A candidate may also have

    budgets: its own; () where its settings say what is left.
    versus: the name of that with which it is compared, batch by batch.

  and the sweep `macs`, shares of the unreduced model's MACs: everything but a cut of the cache then
  has a row with as many tokens as that allows; `behind`, how many tokens of a question are read
  behind a cut of the cache, so that an answer depends on what is left; and `pictured`, names whose
  tokens are drawn.
  """

  def __init__(self, config: ConfigDict, workdir: pathlib.Path, mesh: Mesh):
    super().__init__(config, workdir, mesh)
    for name in config.sweep.get('pictured', ()):
      choices.check('config.sweep.pictured: ', name,
                    [each['name'] for each in config.sweep.candidates])
    self._sets = {name: self._data(name, context) for name, context in (
        config.sweep.sets or ((config.data.name, config.data.context),))}
    self._info = {name: qa_data.info(data) for name, data in self._sets.items()}
    behind = self._behind('cache')
    for data in self._sets.values():
      if data.context <= behind:
        raise ValueError(f'config.sweep.behind={behind} leaves no token of a context of '
                         f'{data.context} to be read at once: lower it')
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
        behind = self._behind(candidate['place'])
        for budget in budgets(candidate, self.config.sweep):
          yield {**shared, 'method': candidate['name'], 'place': candidate['place'],
                 'settings': settings_of(candidate), 'budget': budget,
                 'made_of': {**made_of, 'behind': behind} if behind else made_of}

  def measure(self, row: Row) -> Row:
    """Returns accuracy in all and by group, tokens, cost and latency, as `Sweep.measure`."""
    name = row['set']
    batches, base = self._prepared_set(name)
    candidate = base if row['method'] == 'none' else self._prepare(name, row)
    counts = np.asarray([candidate.run(candidate.params, batch) for batch in batches], np.float64)
    correct, total = counts.sum(axis=0).T
    latency = self.latency(functools.partial(base.run, base.params, batches[0]),
                           functools.partial(candidate.run, candidate.params, batches[0]))
    own, full = (self._cost(name, each.model) for each in (candidate, base))
    return {
        'accuracy': float(correct.sum() / total.sum()),
        'by_batch': (counts[..., 0].sum(axis=1) / counts[..., 1].sum(axis=1)).tolist(),
        'by': {group: float(right / max(count, 1)) for group, right, count in
               zip(self._groups(name), correct, total, strict=True)},
        'questions': int(total.sum()), **own, 'gmacs_ratio': own['gmacs'] / full['gmacs'],
        'batch': self._sets[name].batch_size, 'dtype': self.config.model.dtype,
        **latency, 'compile_s': candidate.compile_s, 'note': ''}

  def show(self, rows: Sequence[Row], workdir: pathlib.Path) -> None:
    """Prints a table, and writes it as sweep.md; draws what it says, and what was kept.

    Accuracy is drawn against tokens, and by kind of question as maps; or recall, where sets differ
    in length.
    """
    sweep = self.config.sweep
    versus = {each['name']: each.get('versus', '') for each in sweep.candidates}
    joined = compared(rows, versus)
    columns = ('set', 'method', 'place', 'budget', 'accuracy', 'difference', 'kept_mean',
               'gmacs_ratio', 'kv_mb', 'latency', 'speedup', 'note')
    print(tables.table(joined, columns))
    kinds = list(dict.fromkeys(kind for info in self._info.values() for kind in info.kinds))
    # Sets may ask different kinds of questions.
    by_kind = [{**row, **{kind: f'{100 * row["by"][kind]:.0f}' for kind in kinds
                          if kind in row.get('by', ())}} for row in joined]
    (workdir / 'sweep.md').write_text(tables.markdown(by_kind, (*columns, *kinds)) + '\n')
    measured = [row for row in joined if not row['note']]
    for name in self._sets:
      of_set, stem = [row for row in measured if row['set'] == name], name.replace('/', '_')
      whole = next(row for row in of_set if row['method'] == 'none')
      for place, drawn in by_place(of_set).items():
        title = f'{sweep.title}{": " * bool(place)}{place}'
        end = f'{stem}{"_" * bool(place)}{place}.png'
        print(plots.plot_accuracy_cost(
            [whole, *drawn], workdir / f'accuracy_{end}', cost='kept_mean', title=title,
            baselines=tuple(sweep.baselines), reference='none'))
        if self._info[name].kinds:
          print(plots.heat_maps(accuracy_by_kind(drawn), workdir / f'kinds_{end}', rows='',
                                columns='kind of question', title=title))
    if not all(info.kinds for info in self._info.values()):
      print(plots.heat_maps(recall(measured), workdir / 'recall.png', title=sweep.title))
    self._draw(workdir)

  def _draw(self, workdir: pathlib.Path) -> None:
    """Draws which patches of an image `pictured` candidates leave, at their second budget.

    Of the first image, a row for each kind of question.
    """
    sweep, name = self.config.sweep, next(iter(self._sets))
    drawn = {each['name']: each for each in sweep.candidates
             if each['name'] in sweep.get('pictured', ())}
    if not drawn:
      return
    info, data, groups = self._info[name], self.config.data, {}
    first = {key: value[:len(info.kinds) or 1]
             for key, value in self._prepared_set(name)[0][0].items()}
    first['valid'] = first['valid'] & ~first['answer']
    for shown, each in drawn.items():
      model = self._reduced(name, {'place': each['place'], 'settings': settings_of(each),
                                   'budget': budgets(each, sweep)[:2][-1]})

      def look(params: Any, batch: Mapping[str, Any], model: VLM = model) -> dict[str, Any]:
        _, out = qa_task.apply(model, params, batch)
        return {key: out.get(key) for key in ('tower_tokens', 'layout', 'projector', 'visual',
                                              'sequence', 'cuts')}

      out = jax.device_get(jax.jit(look)(self._params, first))
      last = [provenance.stages(model, out, row)[-1] for row in range(len(first['ids']))]
      groups[shown] = [overlay.Groups(stage.labels[0], stage.merged[0], int(stage.tokens[0]))
                       for stage in last]
    mean, std = (np.asarray(values, np.float32) for values in (data.mean, data.std))
    images = np.clip(np.asarray(first['image']) * std + mean, 0, 1)
    asked = [' '.join(info.words[token] for token in ids[valid].tolist()[1:]) if info.words else ''
             for ids, valid in zip(*(np.asarray(first[key]) for key in ('ids', 'valid')),
                                   strict=True)]
    print(overlay.stages(images, groups, workdir / 'kept.png', names=asked, title=sweep.title))

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
      self._base = {name: self._compiled(name, self._model(name, {}))}
    return self._batches[name], self._base[name]

  def _model(self, name: str, reduce: Mapping[str, Any], side: int = 0) -> LM | VLM:
    """Builds the model under reductions, for images of `side` pixels if that is not 0."""
    mesh, info = self.mesh if self.mesh.size > 1 else None, self._info[name]
    if side and info.image_shape:
      info = dataclasses.replace(info, image_shape=(side, side, info.image_shape[2]))
    return qa_task.build(self.config.model, reduce, info,
                         context=self._sets[name].context, mesh=mesh,
                         platform=self.mesh.devices.flat[0].platform)

  def _reduced(self, name: str, row: Row) -> Any:
    """Builds the model of a row.

    Raises:
      ValueError: as `qa_task.build`; a share of the MACs that a candidate cannot get down to.
    """
    if row['place'] == 'image':
      tower = self._model(name, {}).tower
      return self._model(name, {}, tower.patch * math.isqrt(
          int(float(row['budget']) * tower.grid[0] * tower.grid[1])))
    if not row['budget'].startswith(OF_MACS):
      return self._model(name, reduction(row))
    base, share = self._model(name, {}), float(row['budget'].removeprefix(OF_MACS))
    slots = self._sets[name].context if isinstance(base, LM) else qa_task.visual_tokens(base)
    most = share * self._cost(name, base)['gmacs']
    for left in range(slots - 1, 0, -1):
      model = self._model(name, reduction({**row, 'budget': str(left / slots)}))
      if self._cost(name, model)['gmacs'] <= most:
        return model
    raise ValueError(f'{row["method"]} cannot get down to {share} of the MACs: let it act earlier, '
                     'or set its budgets')

  def _prepare(self, name: str, row: Row) -> Candidate:
    """Builds and compiles the candidate of a row."""
    return self._compiled(name, self._reduced(name, row), self._behind(row['place']))

  def _compiled(self, name: str, model: LM | VLM, behind: int = 0) -> Candidate:
    """Compiles a model; it runs on batches, and gives `count`'s float32[K, 2]."""
    batch, params, groups = self._batches[name][0], self._params, len(self._groups(name))
    # An answer ends with one more token.
    longest = 1 + self._info[name].answer_length
    run = jax.jit(functools.partial(count, model, groups, longest, behind=behind))
    if isinstance(model, VLM) and model.tower.image_size != batch['image'].shape[1]:
      params = {**params, 'tower': for_smaller_images(params['tower'], model.tower)}
    program = timing.compile_seconds(run.lower(params, batch))
    return Candidate(model, params, program.run, program.seconds)

  def _behind(self, place: str) -> int:
    """Returns how many tokens of a question are read behind a cut at a place."""
    return self.config.sweep.get('behind', 0) if place == 'cache' else 0

  def _groups(self, name: str) -> Sequence[str]:
    return self._info[name].kinds or TENTHS

  def _cost(self, name: str, model: LM | VLM) -> dict[str, Any]:
    """Returns the tokens of each layer and their mean; MACs and cache of a prompt."""
    context, room = self._sets[name].context, 1 + self._info[name].answer_length
    if isinstance(model, LM):
      cost = lm_cost.of(model, context, room=room)
      macs = cost.macs
    else:
      whole = vlm_cost.of(model, context, qa_task.LAYOUT, room=room)
      cost, macs = whole.lm, whole.macs
    tokens = [layer.cached for layer in cost.layers]
    return {'tokens': tokens, 'kept_mean': sum(tokens) / len(tokens),
            'gmacs': macs / 1e9, 'kv_mb': cost.kv_bytes / 1e6}


def settings_of(candidate: Mapping[str, Any]) -> str:
  """Returns the reduction of a candidate, without a budget of the sweep, as JSON."""
  return json.dumps({key: value for key, value in candidate.items() if key not in OF_CANDIDATE},
                    sort_keys=True)


def budgets(candidate: Mapping[str, Any], sweep: Mapping[str, Any]) -> list[str]:
  """Returns the budgets of a candidate's rows, in their words: shares of tokens, then of MACs."""
  own = candidate.get('budgets', sweep['budgets'])
  if not own:
    return ['']
  macs = sweep.get('macs', ()) if candidate['place'] not in ('cache', 'image') else ()
  return [*map(str, own), *(f'{OF_MACS}{share}' for share in macs)]


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


def for_smaller_images(params: Mapping[str, Any], tower: Any) -> dict[str, Any]:
  """Returns parameters of a tower with its positions resampled to a smaller grid.

  Args:
    params: of the tower, with learned positions, of special tokens first.
    tower: for smaller images.
  """
  pos = np.asarray(params['pos'])
  # One special token or two are too few for another square.
  side = math.isqrt(pos.shape[1])
  special, grid = np.split(pos, [pos.shape[1] - side * side], axis=1)
  small = bicubic_antialiased(grid.reshape(side, side, -1), tower.grid)
  return {**params, 'pos': jnp.concatenate(
      [special, small.reshape(1, -1, small.shape[2])], axis=1)}


def count(model: LM | VLM, groups: int, longest: int, params: Any,
          batch: Mapping[str, Any], *, behind: int = 0) -> jax.Array:
  """Counts the answers of each group that are right, and all answers: float32[K, 2].

  Args:
    model: with its plans.
    groups: K.
    longest: A, its end token among them.
    params: of the model.
    batch: of lib/data/qa.py; its images are resized to what the model's tower reads.
    behind: tokens of each question that are read behind the prompt (`qa_task.answers`).
  """
  if isinstance(model, VLM):
    image, side = batch['image'], model.tower.image_size
    if image.shape[1] != side:
      batch = {**batch, 'image': jax.image.resize(
          image, (len(image), side, side, image.shape[3]), 'linear')}
  correct = qa_task.exact_match(
      model, params, batch, longest=longest, behind=behind) * batch['mask']
  group = batch['kind']
  if 'depth' in batch:
    group = jnp.clip((batch['depth'] * groups).astype(jnp.int32), 0, groups - 1)
  member = jax.nn.one_hot(group, groups)
  return jnp.stack([correct @ member, batch['mask'] @ member], axis=1)


def compared(rows: Sequence[Row], versus: Mapping[str, str]) -> list[Row]:
  """Joins the draws of each method, and compares it with another at the same budget.

  Accuracies get the 95 % interval that covers questions and draws, differences one that holds for
  all of them together (Bonferroni's). Batches are the sample, so that questions about one image
  count as one.

  Args:
    rows: of one sweep, as measured; those of one name and budget are draws.
    versus: {name: the name of what it is compared with, or ''}.

  Returns:
    Rows with accuracy_low, accuracy_high and, where they are compared, difference,
    difference_low, difference_high; a row a method and budget, those that failed as they are.
  """
  groups: dict[tuple[str, ...], list[Row]] = {}
  for row in rows:
    key = tuple(row[name] for name in ('set', 'method', 'place', 'budget'))
    groups.setdefault((*key, row['settings'] if row['note'] else ''), []).append(row)
  draws = {key: np.array([row['by_batch'] for row in group], np.float64)
           for key, group in groups.items() if not group[0]['note'] and 'by_batch' in group[0]}
  of_name = {(key[0], key[1], key[3]): parts for key, parts in draws.items()}
  pairs = {key: of_name[other] for key in draws
           if (other := (key[0], versus.get(key[1], ''), key[3])) in of_name}
  joined: list[Row] = []
  for key, group in groups.items():
    row = dict(group[0])
    if key in draws and draws[key].shape[1] > 1:
      parts = draws[key]
      row |= {'accuracy': float(np.mean([each['accuracy'] for each in group])),
              'by': {kind: float(np.mean([each['by'][kind] for each in group]))
                     for kind in row['by']}}
      row['accuracy_low'], row['accuracy_high'] = np.clip(
          intervals.paired(np.zeros(parts.shape[1]), -parts).interval(0.95), 0, 1).tolist()
      if key in pairs:
        difference = intervals.paired(parts.mean(axis=0), pairs[key])
        low, high = difference.interval(1 - 0.05 / len(pairs))
        row |= {'difference': difference.mean, 'difference_low': low, 'difference_high': high}
    joined.append(row)
  return joined


def by_place(rows: Sequence[Row]) -> dict[str, list[Row]]:
  """Returns the rows of each picture by what it shows: '' for all, or place by place if many.

  Low resolution is in every picture. The unreduced model is in none.
  """
  reduced = [row for row in rows if row['place']]
  if len({row['method'] for row in reduced}) <= plots.STYLES:
    return {'': reduced} if reduced else {}
  return {place: [row for row in reduced if row['place'] in (place, 'image')]
          for place in dict.fromkeys(row['place'] for row in reduced) if place != 'image'}


def accuracy_by_kind(
    rows: Sequence[Row]) -> dict[str, tuple[Sequence[str], Sequence[str], np.ndarray]]:
  """Returns {budget: (methods, kinds of questions, accuracy float[methods, kinds])}."""
  methods, kinds = list(dict.fromkeys(row['method'] for row in rows)), list(rows[0]['by'])
  maps: dict[str, tuple[Sequence[str], Sequence[str], np.ndarray]] = {}
  shares: list[str] = []
  others: list[str] = []
  for budget in dict.fromkeys(row['budget'] for row in rows):
    (others if not budget or budget.startswith(OF_MACS) else shares).append(budget)
  for budget in (*sorted(shares, key=float, reverse=True), *others):
    of_method = {row['method']: row['by'] for row in rows if row['budget'] == budget}
    maps[budget or 'its own'] = (methods, kinds, np.array(
        [[of_method.get(name, {}).get(kind, np.nan) for kind in kinds] for name in methods]))
  return maps


def recall(rows: Sequence[Row]) -> dict[str, tuple[Sequence[str], Sequence[str], np.ndarray]]:
  """Returns {method and budget: (depths, lengths, recall float[depths, lengths])}."""
  sets = list(dict.fromkeys(row['set'] for row in rows))
  names = list(dict.fromkeys((row['method'], row['budget']) for row in rows))
  maps: dict[str, tuple[Sequence[str], Sequence[str], np.ndarray]] = {}
  for method, budget in names:
    by_set = {row['set']: row['by'] for row in rows
              if (row['method'], row['budget']) == (method, budget)}
    share = budget if not budget or budget.startswith(OF_MACS) else f'{float(budget):.0%}'
    title = method if method == 'none' else f'{method}, {share}'
    maps[title] = (TENTHS, [name.split('/')[-1] for name in by_set], np.array(
        [[by_set[name][depth] for name in sets if name in by_set] for depth in TENTHS]))
  return maps
