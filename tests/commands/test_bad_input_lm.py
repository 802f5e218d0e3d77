"""What language and vision-language models say to input that cannot be: one line, and a way out.

Settings of plans, shards that are not there and prompts beyond the context are tested where those
live (tests/models/test_plan.py, test_checkpoints_lm.py, tests/decoding/test_generate.py).
"""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assistants, parity_lm, parity_vlm
from helpers.errors import said
from helpers.parity_lm import config
from PIL import Image
from safetensors.numpy import load_file, save_file

from lib import assistant
from lib.data.tokenizers import WordTokenizer
from lib.tasks import trained
from models import checkpoints
from models.checkpoints.lm_config import from_config
from models.decoding.generator import Generator
from models.reduce_config import with_plans, with_projector_reduction


@functools.cache
def llava():
  """A generator and a prompt with two images; nothing is compiled."""
  vlm, params = parity_vlm.model('llava')
  ids, valid, images = parity_vlm.inputs('llava', 'three')
  prompts = [row[real].tolist() for row, real in zip(ids, valid, strict=True)]
  return Generator(vlm, params), prompts, images


def ask(prompts, images, **settings):
  return list(llava()[0].stream(prompts, images, **{'new_tokens': 2, **settings}))


def test_images_and_their_placeholders():
  _, prompts, images = llava()
  image = llava()[0]._lm.image_token
  text = [each for each in prompts[0] if each != image]
  assert said(ask, [*prompts[:1], [image, *prompts[1]], prompts[2]], images) == (
      f'row 1 has 1 image tokens ({image}) and 0 images: give an image for each, or take the '
      'tokens out of the text')
  assert said(ask, prompts, None).startswith(f'row 0 has 1 image tokens ({image}) and 0 images')
  assert said(ask, [text, *prompts[1:]], images) == (
      f'row 0 has 1 images and 0 image tokens ({image}): put one into the text for each image')
  # Where nothing says which crops are images, all of them are.
  plain = images.replace(index=None, weight=None)
  assert 'row 1 has 2 images and 0 image tokens' in said(ask, [prompts[2], *prompts[1:]], plain)
  assert said(ask, prompts[:2], images) == (
      'images of 3 rows do not fit 2 prompts: give a row of images, which may be empty, for each')
  lm = Generator(llava()[0]._lm.lm, {})
  assert said(lambda: lm([[1]], images, new_tokens=1)).startswith('this model reads text alone')


def test_ids_that_the_model_does_not_have():
  _, prompts, images = llava()
  for wrong in (40, -1):
    text = said(ask, [prompts[0], [1, wrong, 3], prompts[2]], images)
    assert text == (f'row 1 has the token {wrong}, and the model those from 0 to 39: encode '
                    'prompts with the tokenizer of this checkpoint')
  generator = llava()[0]
  assert 'has the token 77' in said(generator.score, prompts, [[1], [2], [77]], images)
  assert said(generator.score, prompts, [[1], [], [2]], images).startswith(
      'answers of [1, 0, 1] tokens do not fit 3 prompts')


@pytest.mark.parametrize(('place', 'given', 'message'), [
    ('projector', {'keep': 0}, 'keep=0 leaves no token in layer 0, but nothing would be left'),
    ('projector', {'keep': 0, 'method': 'tome'}, 'but this method must leave one at least'),
    ('projector', {'keep_ratio': 0.01, 'rounding': 'floor'}, 'can leave no fewer than 1'),
    ('language', {'keep': 0, 'layers': 1, 'method': 'tome'},
     'keep=0 leaves no token in layer 1, but this method must leave one at least'),
    ('language', {'keep': -1, 'layers': 1}, 'so give 1 to 32'),
    ('language', {'keep_ratio': 0, 'layers': 1, 'method': 'tome'},
     'keep_ratio=0.0 leaves no token in layer 1, but this method must leave one at least'),
    ('language', {'keep_ratio': -0.5, 'layers': 1}, 'is outside [0, 1]'),
])
def test_no_visual_token_kept(place, given, message):
  """One at least must stay, unless a method that prunes is told to leave none between layers."""
  vlm = llava()[0]._lm
  own = {'token_kinds': 'visual'} if place == 'language' else {}
  plans = with_plans(vlm, **{place: {'method': 'stride', **own, **given}})
  assert message in said(plans, 16, (2, 2, 16))
  # What rounds up keeps one.
  if given == {'keep_ratio': 0.01, 'rounding': 'floor'}:
    reduced = with_projector_reduction(vlm, {'method': 'stride', 'keep_ratio': 0.01}, slots=16)
    assert reduced.visual_slots((2, 2, 16)) == 2


def test_padding_in_the_middle_is_padding():
  """No error: a slot's place means nothing, so masks may have holes."""
  name = 'qwen3'
  lm = from_config(config(name))
  params = checkpoints.load(lm, parity_lm.path(name))
  ids = np.array([[7, 0, 9, 3, 0, 0, 5, 1], [0, 7, 9, 0, 3, 5, 0, 1]])
  valid = ids > 0
  prefill = jax.jit(functools.partial(lm.apply, room=2, method='prefill'))
  decode = jax.jit(functools.partial(lm.apply, method='decode'))
  logits, cache = prefill({'params': params}, ids, valid)
  wanted, plain = prefill({'params': params}, np.array([[7, 9, 3, 5, 1, 0, 0, 0]] * 2),
                          np.array([[True] * 5 + [False] * 3] * 2))
  np.testing.assert_allclose(logits, wanted, atol=1e-5)
  token = jnp.argmax(logits, axis=-1)
  np.testing.assert_allclose(decode({'params': params}, token, cache)[0],
                             decode({'params': params}, token, plain)[0], atol=1e-5)


# Folders.


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return assistants.checkpoint(tmp_path_factory.mktemp('good') / 'llava', 'llava')


@pytest.fixture
def broken(folder, tmp_path):
  shutil.copytree(folder, tmp_path / 'broken')
  return tmp_path / 'broken'


def change(folder, file, **changes):
  path = folder / file
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_architectures_that_are_not_known(broken):
  change(broken, 'config.json', model_type='gpt2')
  assert said(assistant.load, broken) == (
      "model_type 'gpt2' is unknown: choose one of llama, mistral, qwen2, qwen3, llava, "
      'llava_next, llava_onevision, qwen2_vl, qwen2_5_vl')
  text = json.loads((broken / 'config.json').read_text())['text_config'] | {'model_type': 'gemma'}
  change(broken, 'config.json', model_type='llava', text_config=text)
  assert 'known are llama, mistral, qwen2, qwen3' in said(assistant.load, broken)


def test_tokenizers_of_other_models(broken):
  assistants.tokenizer(broken, 43, 30)
  assert said(assistant.load, broken) == (
      f'the tokenizer of {broken} has ids up to 42 and the model 40 embeddings: put the '
      'tokenizer.json of this checkpoint there')
  assistants.tokenizer(broken, 40, 30)
  change(broken, 'generation_config.json', eos_token_id=[2, 50])
  assert 'the end token 50' in said(assistant.load, broken)
  # Fewer words than embeddings are usual.
  assistants.tokenizer(broken, 35, 30)
  assert assistant.load(broken).tokens.size == 35
  (broken / 'tokenizer.json').unlink()
  assert 'tokenizer.json: give the folder of a checkpoint that has one' in said(
      assistant.load, broken)


def test_placeholders_behind_the_table_are_no_error(folder):
  made = assistant.load(folder)
  far = dataclasses.replace(made, model=made.model.clone(image_token=40))
  words = WordTokenizer(tuple(f'w{number}' for number in range(41)))
  assistant.check_tokens(words, far.model, ())
  assert 'has ids up to 40' in said(assistant.check_tokens, words, made.model, ())


def test_weights_that_are_cut_short(broken):
  file = broken / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:5000])
  text = said(assistant.load, broken)
  assert text.startswith(f'{file} cannot be read as safetensors (')
  assert text.endswith('fetch it again')


def test_shards_without_what_the_index_says(tmp_path):
  lm = from_config(config(parity_lm.NAME))
  parity_lm.sharded(tmp_path)
  file = tmp_path / 'model-00002-of-00003.safetensors'
  tensors = load_file(file)
  gone = sorted(tensors)[:2]
  save_file({name: value for name, value in tensors.items() if name not in gone}, file)
  assert said(checkpoints.load, lm, tmp_path) == (
      f'{file} lacks {gone[0]} and 1 more, which model.safetensors.index.json says that it holds: '
      'fetch it again')


def test_folders_that_are_no_model(tmp_path, broken):
  assert 'is no model: it needs the config.json of a run' in said(assistant.load, tmp_path)
  assert said(assistant.load, broken / 'config.json').endswith(
      'config.json and tokenizer are needed as well')
  assert 'there is no checkpoint at' in said(assistant.load, tmp_path / 'nothing')
  with pytest.raises(FileNotFoundError, match=r'lacks config\.json: train one'):
    trained.load_run(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps({'model': {'variant': 'S/16'}}))
  assert 'was not trained to answer questions' in said(assistant.load, tmp_path)
  assert 'choose one of float32, bfloat16' in said(assistant.load, broken, dtype='float64')


def test_images_for_models_that_see_none(tmp_path):
  made = assistant.load(assistants.checkpoint(tmp_path / 'qwen3', 'qwen3'))
  assert 'reads text alone' in said(made.prompt, 'w5', images=1)
  assert 'reads text alone' in said(made.encode_images, [[Image.new('RGB', (4, 4))]])
  assert 'acts on images, and this model reads text alone' in said(
      made.generator, {'vision': {'method': 'tome', 'remove': 2}})
  assert said(made.generator, {'tower': {}}).endswith(
      'choose from vision, projector, language, cache')


def test_words_that_are_not_there():
  words = WordTokenizer(('<pad>', 'row', 'column'), (0,))
  assert said(words.encode, 'row colum') == (
      "'colum' is no word of this model (did you mean 'column'?): it has <pad>, row, column; put "
      'spaces around each')
  assert words.decode([0, 2, 1]) == 'column row'
