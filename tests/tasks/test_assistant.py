"""Models loaded from runs and from checkpoints: prompts, images, answers, and what is left of them.

The checkpoints are tiny ones of golden/, whose random words mean nothing.
"""

import dataclasses
import itertools

import chex
import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from helpers import assistants, mostly_long, parity_vlm, processes
from helpers.parity_vlm import FAMILIES
from helpers.qa import small as small_config
from PIL import Image

from adapters.answerer import Answerer, Question, Settings
from configs import digit_scenes as scenes_config
from configs import stdlib_needle as needle_config
from lib import assistant
from lib.data import qa as qa_data
from lib.data.datasets import digit_scenes, stdlib_needle
from lib.data.pictures import Picture
from lib.data.token_layout import raster_layout
from lib.report import overlay, provenance
from lib.tasks import qa as qa_task
from models.backbones.images import image_counts
from models.decoding.sampling import padded
from models.reduce_config import with_plans
from tools import generate as generate_command

SLOTS = 24


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """A folder with a few examples of each set."""
  return assistants.sets(tmp_path_factory.mktemp('sets'))


@pytest.fixture(scope='module')
def scenes(place, tmp_path_factory):
  """A run's folder, its model and parameters."""
  config = small_config(scenes_config)
  return assistants.run(tmp_path_factory.mktemp('scenes'), config, place,
                        language={'method': 'stride', 'layers': (1,), 'keep': 5})


@pytest.fixture(scope='module')
def needle(place, tmp_path_factory):
  config = small_config(needle_config)
  return assistants.run(tmp_path_factory.mktemp('needle'), config, place)


def photo(seed=0, size=(37, 20)):
  pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
  return Image.fromarray(pixels)


# Loading.


@pytest.mark.long
def test_runs_answer_as_they_were_scored(scenes):
  """Greedy decoding gives what the likeliest tokens were when the run was evaluated."""
  folder, model, params = scenes
  made = assistant.load(folder)
  assert made.reduce['language']['method'] == 'stride'
  batch = next(iter(qa_data.eval_batches(made.data)))
  batch = {name: value[:6] for name, value in batch.items()}
  logits, out = jax.jit(lambda batch: qa_task.apply(model, params, batch))(batch)
  likeliest = qa_task.predictions(logits, out).argmax(axis=-1)
  first = batch['answer'].argmax(axis=1)
  wanted = np.asarray(likeliest)[np.arange(6), first]
  prompts = [row['ids'][row['valid'] & ~row['answer']].tolist() for row in
             (qa_data.example(made.data, number) for number in range(6))]
  pictures = [[Picture(image[None], *raster_layout(16))] for image in batch['image']]
  found = made.generator(buckets=(12,))(prompts, made.encode_images(pictures), new_tokens=1)
  assert [row[0] for row in found] == wanted.tolist()
  assert made.text([4, 5, 1]) == '1 2'
  assert made.prompt('is there a 7 ?', images=1) == [2, *digit_scenes.encode('is there a 7 ?')]


@pytest.mark.long
def test_runs_on_text_answer_with_the_tokens_of_their_set(needle):
  made = assistant.load(needle[0])
  assert made.tokens.size == made.model.vocabulary == stdlib_needle.VOCABULARY
  text = "café = {'anchor': 1}\n    pass\n"
  assert made.text([*made.prompt(text), stdlib_needle.END]) == text
  assert made.look is None
  row = qa_data.example(made.data, 1)
  assert row['answer'].sum() == stdlib_needle.LENGTH + 1
  ids = row['ids'][row['valid']].tolist()
  text = made.text(ids)
  assert text.count('# Remember:') == 4
  # What somebody types is what the model was trained on.
  assert made.prompt(text) == ids[:-1]


@pytest.mark.parametrize('family', [*FAMILIES, 'qwen3'])
def test_checkpoints_are_read_with_all_that_stands_around_them(family, tmp_path):
  folder = assistants.checkpoint(tmp_path / family, family)
  made = assistant.load(folder)
  assert made.ends == (assistants.END,)
  assert isinstance((made.params.get('lm') or made.params)['stack']['blocks'], tuple)
  # The template starts with what starts every text, which is not put there twice.
  ids = made.prompt('w5 w6', images=2 * (family in FAMILIES))
  assert ids[0] == 1
  assert ids.count(1) == 1
  if family not in FAMILIES:
    return
  image = made.model.image_token
  assert ids.count(image) == 2
  assert made.prompt('w5', images=2, template=False) == [1, image, image, 5]
  assert made.prompt('w5 <image> w6', images=1, template=False) == [1, 5, image, 6]
  pictures = [photo(), photo(1, (9, 30))]
  seen = made.with_grid_for(pictures)
  assert seen.encode_images([pictures[:1], [], pictures]).layout[1] == 2
  assert seen.encode_images([[], []]) is None
  assert seen is made


@pytest.mark.parametrize('family', ['llava', 'qwen2'])
def test_a_head_that_differs_is_read_though_the_config_ties_it(family, tmp_path):
  plain = assistant.load(assistants.checkpoint(tmp_path / 'plain', family))
  made = assistant.load(assistants.checkpoint(tmp_path / 'tied', family, tie_word_embeddings=True))
  assert 'head' in (plain.params.get('lm') or plain.params)
  assert made.model == plain.model
  chex.assert_trees_all_equal(made.params, plain.params)


def test_grids_grow_for_images_that_do_not_fit(tmp_path):
  made = assistant.load(assistants.checkpoint(tmp_path / 'qwen', 'qwen2_5_vl'))
  small = dataclasses.replace(
      made, model=made.model.clone(tower=made.model.tower.clone(grid=(8, 8))),
      look=dataclasses.replace(made.look, grid=(8, 8)))
  image = photo(2, (120, 20))
  with pytest.raises(ValueError, match='does not fit into the grid of 8 x 8'):
    small.encode_images([[image]])
  grown = small.with_grid_for([image])
  assert grown.model.tower.grid == (8, 24)
  batch = grown.encode_images([[image]])
  assert batch.layout == (1, 1, len(grown.look(image).index))
  # What is shown is what there was, resized.
  shown = grown.look.shown(grown.look(image))
  wide = image.resize(shown.shape[2:0:-1], Image.Resampling.BICUBIC)
  np.testing.assert_allclose(shown[0], np.asarray(wide) / 255, atol=1e-6)


@pytest.mark.long
def test_several_images_of_a_prompt_are_one_crop_each(tmp_path):
  made = assistant.load(assistants.checkpoint(tmp_path / 'onevision', 'llava_onevision'))
  images = [photo(), photo(1, (9, 30))]
  for row in (images, [made.look(image) for image in images]):
    assert image_counts(made.encode_images([row])).tolist() == [[17, 17]]
  assert made.encode_images([images[:1]]).layout[0] > 2
  reader = Answerer(tmp_path / 'onevision', batch_size=2)
  prompt = tuple(made.prompt('w5', images=2))
  answers = reader.texts([Question(prompt, tuple(images), settings=Settings(2))])
  assert answers == [made.text(made.generator()([prompt], made.encode_images([images]),
                                                new_tokens=2)[0])]


class Looker:
  """Stands for a model: remembers the images that it was shown."""

  def __init__(self):
    self.images = []

  def prompt(self, text, *, images, template):
    return [1] * images

  def with_grid_for(self, images):
    assert [image.size for image in images] == [(96, 64)] * 2
    return self

  def look(self, image):
    self.images.append(image)
    return Picture(np.asarray(image)[None], *raster_layout(1))


def test_the_command_turns_photos_as_their_cameras_say(tmp_path):
  upright = np.zeros((64, 96, 3), np.uint8)
  upright[:32] = 255  # White above, black below; wider than high.
  turned = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
  exif = Image.Exif()
  exif[0x0112] = 6  # "Turn by 90 degrees clockwise to show."
  turned.save(tmp_path / 'phone.jpg', exif=exif, quality=95)
  turned.convert('L').save(tmp_path / 'grey.png', exif=exif)
  flags.FLAGS.mark_as_parsed()
  paths = [str(tmp_path / name) for name in ('phone.jpg', 'grey.png')]
  looker = Looker()
  with flagsaver.flagsaver(image=paths, prompt='what is at the top ?'):
    _, question = generate_command.read_question(looker)
  assert question.prompt == [1, 1]
  for image, picture in zip(looker.images, question.images, strict=True):
    assert (image.mode, image.size) == ('RGB', (96, 64))
    assert picture.pixels[0, :16].mean() > 240
    assert picture.pixels[0, -16:].mean() < 15


# What is left of an image.


REDUCED = {
    'projector': ('llava', {'projector': {'method': 'topk', 'args': {'by': 'cls_attention'},
                                     'keep': 5}}),
    'tower': ('llava_next', {'vision': {'method': 'topk', 'args': {'by': 'cls_attention'},
                                        'layers': (0,), 'site': 'after', 'keep': 9}}),
    'merged': ('llava', {'projector': {'method': 'tome', 'keep': 10, 'across': 'image'}}),
    'pool': ('llava', {'projector': {'method': 'stride', 'keep': 7, 'across': 'prompt'},
                       'language': {'method': 'fastv', 'token_kinds': 'visual', 'layers': 1,
                                    'keep': 4}}),
    'language': ('qwen2_5_vl',
                 {'language': {'method': 'stride', 'token_kinds': 'visual', 'layers': (0, 1),
                               'keep': (12, 5)}}),
}


@pytest.mark.long
@pytest.mark.parametrize('case', mostly_long(REDUCED))
def test_patches_are_followed_to_the_last_cut(case):
  """Exactly the patches that are said to be left change the answer when they change."""
  family, reduce = REDUCED[case]
  vlm, params = parity_vlm.model(family)
  ids, valid, images = parity_vlm.inputs(family, 'three')
  prompts = [row[real].tolist() for row, real in zip(ids, valid, strict=True)]
  reduced = with_plans(vlm, **reduce)(SLOTS, images.layout)
  ids, valid = padded(prompts, SLOTS)
  _, out = jax.jit(reduced.apply)({'params': params}, ids, valid, images)
  row = 2
  found = provenance.stages(reduced, out, row)
  assert [stage.name.partition(',')[0] for stage in found] == [
      name for place in reduce for name in [place] * (2 if case == 'language' else 1)]
  # Visual tokens of the final sequence, counted there.
  tokens = out['tokens']
  group = np.asarray(tokens.stats['group'][row])[np.asarray(tokens.real[row])]
  assert found[-1].tokens.tolist() == [(group == image).sum() for image in (0, 1)]
  # Patches of images lie where the images' features come from.
  for stage, after in itertools.pairwise(found):
    assert ((stage.labels >= 0) | (after.labels < 0)).all()
  last = found[-1]
  if case == 'merged':
    assert (last.labels >= 0).all()
    assert last.merged.sum() > 2 * 6
    for crop in last.labels[:2]:
      assert len(np.unique(crop)) == 10
    return
  assert not last.merged.any()
  labels = last.labels.reshape(len(last.labels), -1)
  if case == 'tower':
    # Of the first crop all are tokens, of others those that are no padding.
    counts = (labels >= 0).sum(axis=1)
    assert counts[0] == 9
    assert 0 < counts[1] <= 9
    return
  # What is left has the features of patches of its labels.
  features = np.asarray(out['tower_tokens'].x)
  crops = len(last.labels)
  features = features.reshape(-1, crops, *features.shape[1:])[row]
  kept = features[labels >= 0]
  sequence = np.asarray(out['sequence'].x[row])
  distance = np.abs(kept[:, None] - sequence[None]).max(axis=-1).min(axis=1)
  assert distance.max() < 1e-5


@pytest.mark.long
def test_pictures_show_every_crop(tmp_path):
  made = assistant.load(assistants.checkpoint(tmp_path / 'next', 'llava_next'))
  reduce = {'language': {'method': 'stride', 'token_kinds': 'visual', 'layers': 1,
                         'keep_ratio': 0.3}}
  picture = made.look(photo())
  images = made.encode_images([[picture]])
  prompt = made.prompt('w5', images=1)
  reduced = with_plans(made.model, **reduce)(len(prompt), images.layout)
  _, out = jax.jit(reduced.apply)({'params': made.params}, *padded([prompt], len(prompt)), images)
  stage, = provenance.stages(reduced, out)
  assert stage.labels.shape == (5, 4, 4)
  groups = {stage.name: [overlay.Groups(*both, 0) for both in
                         zip(stage.labels, stage.merged, strict=True)]}
  file = overlay.stages(made.look.shown(picture), groups, tmp_path / 'kept.png')
  with Image.open(file) as drawn:
    assert min(drawn.size) > 900
  with pytest.raises(ValueError, match='give one each'):
    overlay.stages(made.look.shown(picture)[:2], groups, tmp_path / 'kept.png')


# The command line.


def generate(*flags):
  done = processes.run('-m', 'tools.generate', *flags, timeout=300)
  return done.returncode, done.stdout, done.stderr


@pytest.mark.long
def test_the_command_streams_and_tells_what_it_took(scenes, tmp_path):
  folder, *_ = scenes
  code, said, told = generate(
      f'--model={folder}', '--example=3', '--new_tokens=4', f'--show={tmp_path / "kept.png"}',
      '--reduce.projector.method=topk', '--reduce.projector.keep=6',
      "--reduce.projector.args={'by': 'received_attention'}")
  assert code == 0, told
  row = qa_data.example(assistant.load(folder).data, 3)
  lines = said.splitlines()
  assert lines[0] == digit_scenes.decode(row['ids'][row['valid'] & ~row['answer']])
  assert lines[-1] == f'(the true answer: {digit_scenes.decode(row["ids"][row["answer"]])})'
  assert 'ids in the prompt, 16 visual tokens' in told
  assert 'projector: topk keeps 6 of 16\n' in told
  assert 'language: stride keeps 5 of 6 between layer 1' in told
  assert 'first token after' in told
  assert '2 programs compiled' in told
  assert '5 tokens left after language, layer 1' in told
  assert (tmp_path / 'kept.png').stat().st_size > 10_000


@pytest.mark.long
def test_the_command_asks_a_checkpoint_about_an_image(tmp_path):
  folder = assistants.checkpoint(tmp_path / 'llava', 'llava')
  photo().save(tmp_path / 'photo.png')
  code, said, told = generate(
      f'--model={folder}', f'--image={tmp_path / "photo.png"}', '--prompt=w5 w6', '--new_tokens=5',
      '--reduce.language.method=fastv', '--reduce.language.layers=1',
      '--reduce.language.keep_ratio=0.5')
  assert code == 0, told
  made = assistant.load(folder)
  prompt = made.prompt('w5 w6', images=1)
  reduce = {'language': {'method': 'fastv', 'token_kinds': 'visual', 'layers': 1,
                         'keep_ratio': 0.5}}
  answer, = made.generator(reduce)([prompt], made.encode_images([[photo()]]), new_tokens=5)
  assert said.strip() == made.text(answer).strip()
  assert 'language: fastv keeps 8 of 16 before layer 1' in told


@pytest.mark.long
def test_the_command_refuses_pictures_in_one_line(tmp_path):
  folder = assistants.checkpoint(tmp_path / 'llava', 'llava')
  path = tmp_path / 'photo.png'
  photo().save(path, 'EPS')
  code, said, told = generate(f'--model={folder}', f'--image={path}', '--prompt=w5')
  assert (code, said) == (2, '')
  assert told == (f"error: {path} holds PostScript (it begins with b'%!PS-Ado'), and PNG, "
                  'JPEG, WEBP, GIF, BMP are read: save it as PNG or JPEG (--debug shows where)\n')
