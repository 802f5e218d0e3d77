"""Parameters that are frozen stay as their files have them, and no checkpoint holds them."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest

import train
from configs import digit_scenes as scenes_config
from lib.data import prepare
from lib.data.datasets import digit_scenes
from lib.runtime import checkpoint, launch, sharding
from lib.tasks import pretrained, qa
from lib.tasks.trained import load_run
from models import checkpoints
from models.backbones.vit import ViT
from models.checkpoints.layout import flatten
from models.checkpoints.lm_config import from_config
from tools import pack

LM = {'model_type': 'llama', 'vocab_size': len(digit_scenes.WORDS), 'hidden_size': 16,
      'num_hidden_layers': 2, 'intermediate_size': 16, 'num_attention_heads': 2,
      'num_key_value_heads': 1, 'head_dim': 8, 'max_position_embeddings': 128,
      'tie_word_embeddings': True}
VIT = {'model_type': 'dinov2', 'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 2,
       'mlp_ratio': 2, 'image_size': 64, 'patch_size': 16}


def save(folder, settings, model, example, layout):
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(settings))
  params = jax.jit(model.init)(jax.random.key(len(layout)), example)['params']
  checkpoints.save(model, params, folder / 'model.safetensors', layout=layout)


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
  """Folders of a tower, of a language model, and of a small set."""
  folder = tmp_path_factory.mktemp('parts')
  builder = digit_scenes.DigitScenes
  short = [dataclasses.replace(builder.BUILDER_CONFIGS[0], train=12, test=2)]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(builder, 'BUILDER_CONFIGS', short)
    patch.setattr(builder, 'builder_configs', {short[0].name: short[0]})
    prepare.prepare('digit_scenes/64', data_dir=str(folder))
  save(folder / 'lm', LM, from_config(LM), np.zeros((1, 1), np.int32), 'transformers/lm')
  vit = ViT(width=16, depth=2, mlp=32, heads=2, patch=16, image_size=64, num_classes=0,
            layer_scale=1.0, norm_eps=1e-6)
  save(folder / 'vit', VIT, vit, np.zeros((1, 64, 64, 3), np.float32), 'transformers/dinov2')
  return folder


def config_of(parts, frozen=('tower', 'lm'), **model):
  config = scenes_config.get_config()
  config.update(total_steps=4, log_steps=1, eval_steps=4, checkpoint_steps=2)
  config.data.update(batch_size=4, data_dir=str(parts))
  with config.unlocked():
    config.model = {'tower': str(parts / 'vit'), 'lm': str(parts / 'lm'), 'projection': 'gelu',
                    'side': 2, 'patch_labels': 0, 'dtype': 'float32'} | model
    config.optimizer.update(frozen=frozen, warmup_steps=1, text_weight=None, patch_weight=0.0)
  return config


def losses(workdir):
  rows = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [row['loss'] for row in rows if 'loss' in row]


@pytest.mark.long
def test_only_what_is_not_frozen_trains_and_is_kept(parts, tmp_path, monkeypatch):
  config = config_of(parts)
  made = train.make_setup(config, sharding.make_mesh(config.mesh))
  monkeypatch.setattr(train, 'make_setup', lambda *_: made)
  assert train.run(config, tmp_path / 'whole', first=True)

  class StopAfterThree(launch.Stop):
    def should_stop(self, step):
      return step == 3

  with monkeypatch.context() as patched:
    patched.setattr(launch, 'Stop', StopAfterThree)
    assert not train.run(config, tmp_path / 'cut', first=True)
  assert train.run(config, tmp_path / 'cut', first=True)
  assert losses(tmp_path / 'cut') == losses(tmp_path / 'whole')
  assert len(losses(tmp_path / 'whole')) == 4

  # The checkpoint has the projector alone, in all of its parts.
  kept = jax.eval_shape(made.init, jax.random.key(0))
  assert set(kept.params) == set(kept.ema) == {'projector'}
  names = {part.key for path, _ in jax.tree_util.tree_leaves_with_path(kept.opt_state)
           for part in path if hasattr(part, 'key')}
  assert 'projector' in names
  assert not names & {'tower', 'lm', 'stack', 'table'}
  template = sharding.shapes(kept, made.shardings).ema
  _, ended = checkpoint.best(tmp_path / 'whole', template, metric='accuracy')

  # A loaded run is that projector between the parts as their files have them.
  run = load_run(tmp_path / 'whole')
  chex.assert_trees_all_equal(run.params['projector'], ended['projector'])
  theirs = checkpoints.load(run.model.lm, parts / 'lm', storage='unstacked')
  chex.assert_trees_all_equal(run.params['lm'], theirs)
  vit = checkpoints.load(run.model.tower, parts / 'vit', storage='unstacked')
  chex.assert_trees_all_equal(run.params['tower'], vit)

  # So is what tools/pack.py writes, which is small.
  packed = tmp_path / 'packed'
  monkeypatch.setattr(pack.launch, 'CONFIG', type('Flag', (), {'value': config}))
  monkeypatch.setattr(pack.launch, 'WORKDIR', type('Flag', (), {'value': tmp_path / 'whole'}))
  monkeypatch.setattr(pack, 'OUT', type('Flag', (), {'value': packed}))
  pack.main([])
  assert (packed / checkpoint.PACKED).stat().st_size < 20_000
  chex.assert_trees_all_equal(load_run(packed).params, run.params)
  (packed / 'config.json').write_text((packed / 'config.json').read_text().replace(
      str(parts / 'vit'), str(parts / 'gone')))
  (packed / 'SHA256SUMS').unlink(missing_ok=True)
  with pytest.raises(ValueError, match=r'config\.model\.tower=.*gone is not there'):
    load_run(packed)


@pytest.mark.long
def test_all_of_a_pretrained_model_may_train(parts, tmp_path):
  config = config_of(parts, frozen=())
  config.update(total_steps=2, eval_steps=2)
  assert train.run(config, tmp_path, first=True)
  run = load_run(tmp_path)
  begun = checkpoints.load(run.model.lm, parts / 'lm')
  moved = flatten(jax.tree.map(lambda new, old: float(np.abs(new - old).max()),
                               run.params['lm'], begun))
  assert 0 < max(moved.values()) < 0.1
  # As a part of another, it is what it has become, and no file's.
  again = config_of(parts, tower=str(tmp_path), lm=str(tmp_path)).model
  model = qa.build(again, {}, run.info, context=config.data.context)
  loaded = pretrained.load(again, model)
  stacked = jax.jit(lambda key: qa.init(model, run.info, 88, key))(jax.random.key(0))
  theirs = checkpoints.merge_params(stacked, loaded)
  assert model.lm.clone(dtype=run.model.lm.dtype) == run.model.lm
  chex.assert_trees_all_equal(flatten(theirs['lm']), flatten(run.params['lm']))


@pytest.mark.long
def test_a_warm_start_draws_tokens_to_their_word(parts, tmp_path):
  config = config_of(parts)
  config.update(total_steps=12, eval_steps=12)
  config.optimizer.peak_lr = 2e-3
  with config.unlocked():
    config.task.name = 'align'
    config.data.update(kinds=('corner',), turns=1)
  assert train.run(config, tmp_path / 'align', first=True)
  found = losses(tmp_path / 'align')
  assert found[-1] < 0.7 * found[0]
  # Training on answers begins with its projector.
  with config.unlocked():
    config.task.name, config.start = 'answers', str(tmp_path / 'align')
  config.update(total_steps=2, eval_steps=2)
  config.optimizer.peak_lr = 1e-9
  assert train.run(config, tmp_path / 'answers', first=True)
  begun, ended = (load_run(tmp_path / name).params['projector'] for name in ('align', 'answers'))
  chex.assert_trees_all_close(begun, ended, atol=1e-6)


@pytest.mark.parametrize(('frozen', 'message'), [
    (('towr',), r"optimizer\.frozen names 'towr'.*name some of lm, projector, tower"),
    (('projector',), r'no pretrained file gives, such as projector/'),
])
def test_a_wrong_group_ends_in_one_line(parts, tmp_path, frozen, message):
  with pytest.raises(ValueError, match=message):
    train.run(config_of(parts, frozen=frozen), tmp_path / 'run', first=True)
  assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_what_a_learned_reduction_or_a_reader_adds_is_not_frozen():
  added = {'reducer_dtem': {'kernel': 2}, 'reader': {'gate': 4}}
  params = {'lm': {'stack': 1, **added}, 'projector': 3}
  trained, frozen = pretrained.split(params, ('lm',))
  assert frozen == {'lm': {'stack': 1}}
  assert trained == {'lm': added, 'projector': 3}
  assert pretrained.join(trained, frozen) == params


def test_a_set_of_another_vocabulary_ends_in_one_line(parts):
  info = qa.Info(300, 0, 1, 2, (), 6, 6, (64, 64, 3), (), 1)
  with pytest.raises(ValueError, match='token ids, and the set was made for 300'):
    qa.build(config_of(parts).model, {}, info, context=14)


@pytest.fixture
def trained(parts, tmp_path):
  """The folder of a packed run, its config and its parameters."""
  config = scenes_config.get_config()
  config.data.data_dir = str(parts)
  config.model.tower.update(width=16, depth=1, heads=2, mlp=16, patch=16)
  config.model.lm.update(width=16, depth=2, heads=2, kv_heads=1, head_width=8, mlp=16)
  info = qa.qa_data.info(config.data)
  model = qa.build(config.model, {}, info, context=config.data.context)
  params = jax.jit(lambda key: qa.init(model, info, config.data.context, key))(jax.random.key(0))
  folder = tmp_path / 'run'
  checkpoint.pack(params, 7, folder)
  (folder / 'config.json').write_text(config.to_json())
  return folder, config, params


@pytest.mark.long
def test_parts_come_from_a_run(parts, trained):
  folder, theirs, params = trained
  config = config_of(parts, tower=str(folder), lm=str(folder), side=1)
  info = qa.qa_data.info(config.data)
  model = qa.build(config.model, {}, info, context=config.data.context)
  assert (model.tower.depth, model.tower.dropout) == (1, 0.0)
  assert (model.lm.depth, model.lm.width) == (2, 16)
  assert theirs.model.tower.dropout == 0.1
  loaded = pretrained.load(config.model, model)
  chex.assert_trees_all_equal(loaded, {name: params[name] for name in ('tower', 'lm')})

  def init(key):
    return qa.init(model, info, config.data.context, key)

  mesh = sharding.make_mesh({}, jax.devices()[:1])
  frozen = pretrained.read_frozen(init, lambda: loaded, config, mesh)
  assert set(frozen) == {'tower', 'lm'}
  assert set(pretrained.split(jax.eval_shape(init, jax.random.key(0)),
                              config.optimizer.frozen)[0]) == {'projector'}


@pytest.mark.long
def test_a_part_that_a_run_did_not_train_ends_in_one_line(parts, trained):
  folder, config, params = trained
  checkpoint.pack({'projector': params['projector']}, 7, folder)
  model = qa.build(config_of(parts, tower=str(folder), lm=str(folder), side=1).model, {},
                   qa.qa_data.info(config.data), context=config.data.context)
  with pytest.raises(ValueError, match=r'model\.lm=.*run is a run that did not train its lm'):
    pretrained.load({'tower': str(parts / 'vit'), 'lm': str(folder)}, model)


@pytest.mark.long
def test_a_run_without_a_checkpoint_ends_in_one_line(parts, trained):
  folder, config, _ = trained
  (folder / checkpoint.PACKED).unlink()
  model = qa.build(config_of(parts, tower=str(folder), lm=str(folder), side=1).model, {},
                   qa.qa_data.info(config.data), context=config.data.context)
  with pytest.raises(ValueError, match=r'config\.model\.tower=.*run has no checkpoint'):
    pretrained.load({'tower': str(folder), 'lm': str(folder)}, model)
