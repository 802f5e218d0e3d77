"""The front: one import from any folder, reductions of bare arrays, and models loaded by name."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assistants, contract, parity
from PIL import Image

import winnow
from configs import digits
from lib.data import images as image_data
from lib.data import qa as qa_data
from lib.data.datasets import digit_scenes
from lib.data.prepare import prepare
from lib.tasks import trained
from models import catalogue
from models.arrays import AXES
from models.backbones.vit import ViT
from models.plan import make_plan
from ops import signals
from ops.tokens import TokenSet

ROOT = pathlib.Path(__file__).parents[2]
SCENES, NEEDLE = ROOT / 'results' / 'digit_scenes', ROOT / 'results' / 'stdlib_needle'
FASTV = {'language': {'method': 'fastv', 'layers': 2, 'keep_ratio': 0.5}}


# The package.


@pytest.mark.long
def test_it_is_imported_and_loads_from_another_folder(tmp_path):
  program = f'import winnow; print(winnow.load({str(SCENES)!r}).explain())'
  done = subprocess.run(
      [sys.executable, '-c', program],
      cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True,
      check=False)
  assert done.returncode == 0, done.stderr
  assert 'language model of 4 layers, width 128' in done.stdout
  assert list(tmp_path.iterdir()) == []


def test_the_package_holds_every_module_and_file():
  made = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']
  wanted = {file.stem for file in ROOT.glob('*.py')}
  assert set(made['py-modules']) == wanted
  folders = {file.parent.name for file in ROOT.glob('*/__init__.py')}
  assert {pattern.removesuffix('*') for pattern in made['packages']['find']['include']} == folders
  for folder in folders:
    for file in (ROOT / folder).rglob('*'):
      if file.is_dir() and '__pycache__' not in file.parts:
        assert (file / '__init__.py').exists() or not list(file.glob('*.py')), file
      elif file.is_file() and '__pycache__' not in file.parts:
        # Everything else would be left out of the package.
        assert file.suffix in ('.py', '.textproto', '.txt'), file


def test_it_has_no_logic_of_its_own():
  text = (ROOT / 'winnow.py').read_text()
  assert not re.search(r'^\s*(if|for|while|class) ', text, re.M)
  assert all(callable(getattr(winnow, name)) for name in winnow.__all__)


# Bare arrays.


@pytest.mark.parametrize(('name', 'args'), [
    ('tome', {}), ('evit', {}), ('pool', {}), ('kmedoids', {}), ('sinkhorn', {}),
    ('dtop', contract.SETTINGS['dtop'])])
def test_arrays_become_what_the_method_makes_of_them(name, args):
  case = contract.random_case()
  keep = contract.budget(name, contract.SLOTS, contract.KEEP)
  wanted = contract.run(name, case, keep).reduced
  needs = contract.method(name).needs
  measured = case.signals(needs)
  given = {need: getattr(measured, need) for need in needs if getattr(measured, need) is not None}
  params = contract.parameters(name, case.tokens(), measured, num_slots=keep)
  free = keep - contract.PROTECTED - contract.method(name).extra_slots
  found = winnow.reduce(case.tokens(), name, keep=free, args=args,
                        params=params or None, **given)
  for field in ('x', 'owner', 'pos', 'kind', 'sizes'):
    np.testing.assert_allclose(getattr(found, field), getattr(wanted, field), atol=1e-6)


@pytest.mark.long
def test_plain_features_are_reduced_as_a_vit_reduces_them():
  vit = ViT(width=16, depth=3, mlp=24, heads=2, patch=4, image_size=20, num_classes=0)
  vit = vit.clone(plan=make_plan({'method': 'divprune', 'layers': 1, 'keep': 9, 'site': 'before'},
                                 vit.host))
  images = jax.random.normal(jax.random.key(1), (2, 20, 20, 3))
  params = jax.jit(vit.init)(jax.random.key(0), images)
  _, out = jax.jit(vit.apply)(params, images)
  before, after = out['before'][1], out['cuts'][1]
  found = winnow.reduce(before.x, 'divprune', keep=9, protected=1)
  assert found.x.shape == (2, 10, 16)
  for field in ('x', 'owner', 'pos', 'kind', 'sizes'):
    np.testing.assert_array_equal(getattr(found, field), getattr(after, field))


def test_budgets_count_free_tokens_and_padding_goes_first():
  x = np.random.default_rng(0).normal(size=(2, 20, 8)).astype(np.float32)
  assert winnow.reduce(x, 'stride', keep_ratio=0.5, protected=2).slots == 2 + 9
  cls = jnp.ones((2, 2, 20)) / 20
  # EViT's fused token comes on top.
  assert winnow.reduce(x, 'evit', keep=5, protected=1, cls_attention=cls).slots == 1 + 5 + 1
  valid = np.arange(20) < np.array([[20], [3]])
  short = winnow.reduce(x, 'stride', keep=5, valid=valid)
  np.testing.assert_array_equal(short.real.sum(axis=1), [5, 3])
  np.testing.assert_array_equal(winnow.reduce(x, 'stride', keep=20).x, x)


def test_a_method_that_watches_looks_at_the_layer_at_hand():
  attention = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 4, 12)))
  x = jax.random.normal(jax.random.key(1), (2, 12, 8))
  found = winnow.reduce(x, 'vtc_cls', keep=5, cls_attention=attention)
  wanted = winnow.reduce(x, 'fastervlm', keep=5, cls_attention=attention)
  np.testing.assert_array_equal(found.owner, wanted.owner)


@pytest.mark.parametrize(('name', 'more', 'message'), [
    ('tomme', {'keep': 6}, r"method 'tomme' is unknown \(did you mean 'tome'\?\)"),
    ('tome', {'keep': 6}, r'tome reads keys, not given here: give keys=float\[B, N, H, d\]'),
    ('pool', {'keep': 6}, r'pool reads grid, not given here: give grid=\(rows, columns\)'),
    ('stride', {}, 'needs one budget, got none: give keep='),
    ('stride', {'keep': 6, 'keep_ratio': 0.5}, 'needs one budget, got both: give keep='),
    ('stride', {'keep': 40}, 'keep=40 in layer 0 is impossible: 12 tokens are there to keep'),
    ('stride', {'keep_ratio': 1.5}, r'keep_ratio=1.5 is outside \[0, 1\]'),
    ('tome', {'keep': 6, 'keys': np.ones((2, 12, 8))},
     r'keys of shape \(2, 12, 8\) does not fit 2 rows of 12 tokens: give float\[2, 12, H, d\]'),
    ('tome', {'keep': 6, 'keys': np.ones((2, 11, 2, 4))}, r'keys of shape \(2, 11, 2, 4\) does'),
    ('tome', {'keep': 6, 'key': 1}, r"there is no signal 'key' \(did you mean 'keys'\?\)"),
    ('random', {'keep': 6, 'args': {'sed': 1}}, r"no argument 'sed' \(did you mean 'seed'\?\)"),
    ('sinkhorn', {'keep': 6}, 'sinkhorn is learned, and its parameters are missing: give params='),
    ('snapkv', {'keep': 6}, 'snapkv acts on a cache of keys and values, not on tokens: give it'),
    ('stride', {'keep': 6, 'protected': 12}, 'protected=12 of 12 tokens leaves nothing to reduce'),
    ('stride', {'keep': 6, 'valid': np.ones((2, 3))}, r'valid of shape \(2, 3\) does not fit'),
])
def test_what_cannot_be_is_one_line(name, more, message):
  with pytest.raises(ValueError, match=message) as error:
    winnow.reduce(np.zeros((2, 12, 8), np.float32), name, **more)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(('x', 'more', 'message'), [
    (np.zeros((12, 8), np.float32), {}, r'x of shape \(12, 8\) and type float32 is no batch'),
    (np.zeros((2, 12, 8), int), {}, r'x of shape \(2, 12, 8\) and type int32 is no batch'),
    (TokenSet.create(jnp.zeros((2, 12, 8))), {'protected': 1}, 'x is a TokenSet, which says'),
])
def test_what_is_no_batch_of_tokens_is_one_line(x, more, message):
  with pytest.raises(ValueError, match=message):
    winnow.reduce(x, 'stride', keep=6, **more)


def test_every_signal_is_an_array_of_known_axes_or_static():
  assert AXES.keys() | signals.STATIC == set(signals.NAMES)
  assert not AXES.keys() & signals.STATIC


def test_methods_are_listed_with_what_they_do():
  found = winnow.methods()
  assert list(found) == sorted(found)
  assert {'tome', 'sinkhorn', 'snapkv', 'none'} <= found.keys()
  assert all(summary.endswith('.') and '\n' not in summary for summary in found.values())
  for entry in catalogue.entries().values():
    assert (ROOT / entry.file).exists(), entry


# Language and vision-language models.


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
  """The packed model, and a folder with a few scenes for it."""
  folder = tmp_path_factory.mktemp('sets')
  with pytest.MonkeyPatch.context() as patch:
    one = digit_scenes.DigitScenes.BUILDER_CONFIGS[0]
    few = dataclasses.replace(one, train=2, test=10)
    patch.setattr(digit_scenes.DigitScenes, 'BUILDER_CONFIGS', [few])
    patch.setattr(digit_scenes.DigitScenes, 'builder_configs', {few.name: few})
    prepare('digit_scenes/64', data_dir=str(folder))
  return winnow.load(SCENES, data_dir=str(folder))


def question(model, number):
  """Text, image and answer of a question of the test split."""
  row = qa_data.example(model.trained.config.data, number)
  pixels = np.round((row['image'] * 0.5 + 0.5) * 255).astype(np.uint8)
  text = model.assistant.tokens.decode(row['ids'][row['valid'] & ~row['answer']].tolist())
  return (text.replace('<image>', '').strip(), Image.fromarray(pixels),
          model.assistant.text(row['ids'][row['answer']].tolist()))


@pytest.mark.long
@pytest.mark.parametrize('reduce', [None, FASTV])
def test_what_it_answers_is_what_it_is_scored_by(scenes, reduce):
  asked = [question(scenes, number) for number in range(12)]
  right = [scenes.generate(text, images=[image], reduce=reduce) == answer
           for text, image, answer in asked]
  found = scenes.evaluate(reduce)
  assert found['questions'] == 12
  assert found['accuracy'] == pytest.approx(np.mean(right))
  # Of 64 visual tokens and 60 of text, half of the visual ones in two of four layers.
  assert found['kept_mean'] == (124 if reduce is None else 124 - 2 * 32 / 4)
  assert scenes.evaluate(reduce, batches=1)['questions'] == 12


def test_reductions_act_on_visual_tokens_unless_they_say_otherwise(scenes):
  own = {'language': {**FASTV['language'], 'token_kinds': 'visual'}}
  assert scenes.explain(FASTV) == scenes.explain(own)
  every = {'language': {**FASTV['language'], 'token_kinds': ('visual', 'text')}}
  assert scenes.explain(FASTV) != scenes.explain(every)


@pytest.mark.long
def test_images_may_be_files_and_compiled_programs_are_kept(scenes, tmp_path):
  text, image, _ = question(scenes, 0)
  image.save(tmp_path / 'scene.png')
  wanted = scenes.generate(text, images=[image])
  made = len(scenes._generators)
  assert scenes.generate(text, images=[tmp_path / 'scene.png']) == wanted
  assert len(scenes._generators) == made


def test_packed_models_need_no_set_and_say_what_it_is(scenes):
  own = qa_data.info(scenes.trained.config.data)
  stored = trained.read_info(SCENES)
  # But for the number of scenes, of which there are few here.
  assert stored == dataclasses.replace(own, num_train=stored.num_train, num_test=stored.num_test)
  model = winnow.load(NEEDLE)
  assert 'language model of' in model.explain({'cache': {'method': 'snapkv', 'keep_ratio': 0.25}})
  assert not model.sees


@pytest.mark.long
def test_checkpoints_of_language_models_answer_and_are_explained(tmp_path):
  model = winnow.load(assistants.checkpoint(tmp_path / 'qwen2', 'qwen2'))
  reduce = {'cache': {'method': 'streaming_llm', 'keep': 6}}
  assert model.generate('w5 w6 w7 w8 w9 w10', new_tokens=3, reduce=reduce).startswith('w')
  assert model.explain(reduce, slots=12) != model.explain(slots=12)
  with pytest.raises(ValueError, match='a checkpoint has no test split of its own'):
    model.evaluate()
  with pytest.raises(ValueError, match='this model reads text alone'):
    model.generate('w5', images=[Image.new('RGB', (8, 8))])
  with pytest.raises(ValueError, match=r"config\.reduce has no component 'langage'"):
    model.generate('w5', reduce={'langage': {'method': 'fastv'}})


# Models of images.


@pytest.mark.long
def test_checkpoints_of_vision_transformers_see(tmp_path):
  settings = {'width': 32, 'depth': 2, 'mlp': 64, 'heads': 2, 'image_size': 24, 'num_classes': 5}
  file = parity.FOLDER / 'timm_vit.safetensors'
  model = winnow.load(file, variant='Ti/8', **settings)
  wanted = parity.expected('timm_vit')
  logits, _ = model(wanted['images'])
  np.testing.assert_allclose(logits, wanted['image_out'], atol=1e-5)
  reduce = {'vision': {'method': 'tome', 'remove': 2}}
  _, out = model(wanted['images'], reduce)
  assert out['tokens'].slots == 10 - 4
  assert 'tome (between) in every layer: 10 to 6 tokens' in model.explain(reduce)
  with pytest.raises(ValueError, match='a checkpoint has no test split of its own'):
    model.evaluate()
  with pytest.raises(ValueError, match='this model sees images and says nothing'):
    model.generate('what is this ?')
  with pytest.raises(ValueError, match=r"reduce\.cache is not a place of this model"):
    model.explain({'cache': {'method': 'snapkv'}})
  with pytest.raises(ValueError, match="its variant, as load"):
    winnow.load(file)
  with pytest.raises(ValueError, match="width belong to an image checkpoint: name its variant"):
    winnow.load(file, width=32)
  with pytest.raises(ValueError, match='there is no checkpoint at'):
    winnow.load(tmp_path / 'nothing')


@pytest.mark.long
def test_runs_of_images_are_scored(tmp_path):
  config = digits.get_config()
  config.model.update(width=16, depth=2, heads=2, mlp=16)
  config.data.data_dir = str(tmp_path / 'data')
  config.data.test_split = 'test[:20]'
  assistants.run_of_images(tmp_path, config)
  model = winnow.load(tmp_path)
  assert model.step == 3
  batch = next(iter(image_data.eval_batches(config.data)))
  for reduce in (None, {'vision': {'method': 'stride', 'layers': 1, 'keep': 16}}):
    logits, _ = model(batch['image'], reduce)
    right = (np.argmax(logits, axis=1) == batch['label']) & (batch['mask'] > 0)
    found = model.evaluate(reduce)
    assert found['accuracy'] == pytest.approx(right.sum() / 20)
    assert found['kept_mean'] == (65 if reduce is None else (65 + 17) / 2)


def test_info_survives_its_file(tmp_path):
  info = trained.read_info(NEEDLE)
  trained.save_info(info, tmp_path)
  assert trained.read_info(tmp_path) == info
  assert trained.read_info(tmp_path / 'none') is None
  assert json.loads((tmp_path / trained.INFO).read_text())['vocabulary'] == info.vocabulary
