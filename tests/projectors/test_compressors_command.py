"""The comparison of learned compressors: what it trains, what it measures, what it says."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import train
from configs import digit_scenes, digit_scenes_compressors_study
from lib.data import prepare
from lib.data.datasets import digit_scenes as scenes
from lib.report.rows import read_jsonl
from lib.runtime import checkpoint
from lib.tasks import qa
from lib.tasks.settings import TRAINING, check_config
from tools import compressors


@pytest.fixture(scope='module')
def study(tmp_path_factory):
  """A comparison with a small set, a packed run of random parameters, and few entries."""
  folder = tmp_path_factory.mktemp('study')
  builder = scenes.DigitScenes
  short = [dataclasses.replace(builder.BUILDER_CONFIGS[0], train=8, test=4)]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(builder, 'BUILDER_CONFIGS', short)
    patch.setattr(builder, 'builder_configs', {short[0].name: short[0]})
    prepare.prepare('digit_scenes/64', data_dir=str(folder))
  source = digit_scenes.get_config()
  source.data.data_dir = str(folder)
  source.model.tower.update(width=16, depth=1, heads=2, mlp=16)
  source.model.lm.update(width=16, depth=1, heads=2, kv_heads=1, head_width=8, mlp=16)
  info = qa.qa_data.info(source.data)
  model = qa.build(source.model, {}, info, context=source.data.context)
  params = jax.jit(lambda key: qa.init(model, info, source.data.context, key))(jax.random.key(0))
  checkpoint.pack(params, 7, folder / 'run')
  (folder / 'run/config.json').write_text(source.to_json())

  config = digit_scenes_compressors_study.get_config()
  chosen = ('none', 'low resolution, untrained', 'pool, untrained', 'pool', 'tokenflex')
  config.update(source=str(folder / 'run'), seeds=(0, 1), test_split='test', batch=4,
                out=str(folder / 'rows.jsonl'),
                entries=tuple({**entry, 'counts': {key: entry['counts'][key] for key in
                                                   list(entry['counts'])[:2]}}
                              for entry in config.entries if entry['name'] in chosen))
  config.training.update(total_steps=2, eval_steps=2, checkpoint_steps=2)
  config.training.model.update(tower=config.source, lm=config.source)
  config.training.data.update(data_dir=str(folder), batch_size=2, test_split='test')
  config.recipes['joint']['warmup_steps'] = 1
  return config, folder


@pytest.mark.long
def test_rows_are_measured_once_and_reported(study, monkeypatch):
  config, folder = study
  runs = []

  def counted(training, workdir, *, first, run=train.run):
    runs.append((workdir.relative_to(folder), training.seed, training.optimizer.frozen))
    return run(training, workdir, first=first)

  monkeypatch.setattr(train, 'run', counted)
  compressors.compare(config, folder / 'runs')
  # Of the nested one a seed is one training for both of its counts.
  assert [str(each) for each, *_ in runs] == [
      f'runs/{name}/seed_{seed}' for seed in (0, 1)
      for name in ('pool_16', 'pool_4', 'tokenflex_16_4')]
  assert {(str(each).rsplit('_', 1)[1], frozen) for each, seed, frozen in runs} == {
      ('0', ('tower', 'lm')), ('1', ('tower', 'lm'))}
  rows = read_jsonl(folder / 'rows.jsonl')
  assert not [row for row in rows if row.get('failed')]
  assert len(rows) == 1 + 2 + 2 + 2 * (2 + 2)
  assert {(row['method'], row['budget'], row['visual']) for row in rows} == {
      ('none', '64', 64), *((name, count, int(count)) for count in ('16', '4') for name in (
          'low resolution, untrained', 'pool, untrained', 'pool', 'tokenflex'))}
  own = {(row['method'], row['budget']): row for row in rows}
  # A smaller image is cheaper than what leaves as many tokens of a whole one.
  assert own['low resolution, untrained', '16']['gmacs'] < own['pool, untrained', '16']['gmacs']
  assert own['low resolution, untrained', '16']['lm_gmacs'] == own['pool', '16']['lm_gmacs']
  assert own['pool', '16']['trained'] == 16 * 16 + 16 + 16 * 16 + 16
  assert own['none', '64']['trained'] == 0
  text = (folder / 'rows.md').read_text()
  assert '## 16 tokens' in text
  assert 'tokenflex (nested)' in text
  assert text.count(' pool |') == 2  # What it differs by from pooling, at both counts.
  assert (folder / 'rows_tokens.png').stat().st_size > 10_000
  assert (folder / 'rows_macs.png').stat().st_size > 10_000
  # All rows are there, so nothing is read or trained again.
  monkeypatch.setattr(compressors, 'Subject', None)
  compressors.compare(config, folder / 'runs')
  assert len(read_jsonl(folder / 'rows.jsonl')) == len(rows)


def test_every_entry_is_a_training_that_there_can_be():
  config = digit_scenes_compressors_study.get_config()
  heads = compressors.heads(config)
  assert len({json.dumps(head) for head in heads}) == len(heads)
  names = {entry['name'] for entry in config.entries}
  assert len(names) == len(config.entries)
  for entry in config.entries:
    assert entry.get('versus', '') in {'', *names}
    if entry['recipe'] == 'untrained':
      continue
    for tokens in entry['counts']:
      training = compressors.training_of(config, entry, tokens, 2)
      assert training.seed == 2
      check_config(training, *TRAINING)
      if entry.get('compressor'):
        model = qa.build(training.model, {}, INFO, context=60)
        assert np.prod(model.crop_grid) == int(tokens)


INFO = qa.Info(64, 0, 1, 2, (), 6, 6, (64, 64, 3), (), 1)
