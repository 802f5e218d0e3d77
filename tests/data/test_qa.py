"""Scenes of digits, phrases in the standard library's sources, and the batches made of them."""

import dataclasses
import hashlib
import itertools
import math
import re

import ml_collections
import numpy as np
import pytest
from helpers import mostly_long

from lib.data import qa as qa_data
from lib.data.datasets import digit_scenes, digits, stdlib_needle
from lib.data.prepare import prepare

SMALL, EACH_DIGIT, LARGE = digit_scenes.DigitScenes.BUILDER_CONFIGS
NEEDLES = stdlib_needle.StdlibNeedle.BUILDER_CONFIGS
COUNTS = {'train': 12, 'test': 5}


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """A folder with the smallest config of each set, cut short."""
  folder = tmp_path_factory.mktemp('sets')
  with pytest.MonkeyPatch.context() as patch:
    for builder in (digit_scenes.DigitScenes, stdlib_needle.StdlibNeedle):
      short = [dataclasses.replace(config, **COUNTS) for config in builder.BUILDER_CONFIGS[:1]]
      patch.setattr(builder, 'BUILDER_CONFIGS', short)
      patch.setattr(builder, 'builder_configs', {config.name: config for config in short})
    for name in ('digit_scenes/64', 'stdlib_needle/64'):
      prepare(name, data_dir=str(folder))
  return folder


def config_of(name, place, **changes):
  return ml_collections.ConfigDict(
      {'name': name, 'data_dir': str(place), 'context': 12 if 'digit' in name else 260,
       'batch_size': 8} | changes)


@pytest.fixture(scope='module')
def sources():
  return {split: digit_scenes.Sources.load(split) for split in ('train', 'test')}


# Scenes.


def answer_to(text, cells):
  """Answers a question from a grid of labels, worked out here once more."""
  grid = [[None if label in (0, 11) else int(label) - 1 for label in row] for row in cells]
  here = [digit for row in grid for digit in row if digit is not None]

  def name(digit):
    return 'none' if digit is None else str(digit)

  if text == 'how many digits are there ?':
    return str(len(here))
  if found := re.fullmatch(r'is there a (\d) \?', text):
    return 'yes' if int(found[1]) in here else 'no'
  if found := re.fullmatch(r'which digit is at row (\d) column (\d) \?', text):
    return name(grid[int(found[1]) - 1][int(found[2]) - 1])
  if found := re.fullmatch(r'which digit is directly left of the (\d) \?', text):
    (row, column), = [(r, c) for r, c in itertools.product(range(len(grid)), repeat=2)
                      if grid[r][c] == int(found[1])]
    return name(grid[row][column - 1] if column else None)
  if text == 'what is the sum of the top row ?':
    return str(sum(digit for digit in grid[0] if digit is not None))
  found = re.fullmatch(r'what is in the (top|bottom) (left|right) corner \?', text)
  return name(grid[-1 if found[1] == 'bottom' else 0][-1 if found[2] == 'right' else 0])


@pytest.mark.parametrize('config', [SMALL, EACH_DIGIT, LARGE], ids=lambda config: config.name)
def test_answers_follow_from_the_labels_and_need_the_evidence_alone(config, sources):
  seen = {kind: set() for kind in config.kinds}
  for index in range(60):
    scene = digit_scenes.example(sources['test'], index, config)
    for kind, question, answer, evidence in zip(
        config.kinds, scene['question'], scene['answer'], scene['evidence'], strict=True):
      text, answer = digit_scenes.decode(question), digit_scenes.decode(answer)
      assert question[0] == digit_scenes.IMAGE
      assert answer == answer_to(text, scene['cells']), (text, scene['cells'])
      assert evidence.any()
      # What is elsewhere may change as it likes; a digit elsewhere must not be a second anchor.
      elsewhere = np.where(evidence == 1, scene['cells'], 0)
      assert answer == answer_to(text, elsewhere), (text, scene['cells'])
      seen[kind].add(answer)
  for kind, answers in seen.items():
    assert answers == {'yes', 'no'} if kind.startswith('present') else len(answers) >= 4


@pytest.mark.long
@pytest.mark.parametrize('split', mostly_long(['train', 'test']))
def test_pictures_show_what_the_labels_say(split, sources):
  source = sources[split]
  known = {image.tobytes(): label for image, label
           in zip(source.images, source.labels, strict=True)}
  for index in range(15):
    scene = digit_scenes.example(source, index, SMALL)
    for (row, column), label in np.ndenumerate(scene['cells']):
      cell = scene['image'][16 * row:16 * row + 16, 16 * column:16 * column + 16]
      if label == digit_scenes.EMPTY:
        assert cell.max() < 128
        continue
      # Ink of every pixel, as strokes lie on a background of at most 127: full ink is white.
      matches = [digit for image, digit in known.items() if _fits(cell, image)]
      assert (label - 1 in matches) if label != digit_scenes.DISTRACTOR else not matches


def _fits(cell, image):
  ink = np.frombuffer(image, np.uint8).reshape(8, 8).repeat(2, 0).repeat(2, 1)[..., None]
  low = ink.astype(int) * 255 // 255
  return ((cell >= low - 1) & (cell <= low + (255 - ink.astype(int)) * 127 // 255 + 1)).all()


def test_scenes_never_change(sources):
  scene = digit_scenes.example(sources['train'], 7, SMALL)
  again = digit_scenes.example(sources['train'], 7, SMALL)
  other = digit_scenes.example(sources['train'], 8, SMALL)
  digest = hashlib.sha256(b''.join(scene[name].tobytes() for name in sorted(scene))).hexdigest()
  assert digest.startswith('edc3a7e75444270d')
  assert all((scene[name] == again[name]).all() for name in scene)
  assert (scene['image'] != other['image']).any()


def test_splits_share_no_digit_and_no_pixel_of_a_photograph(sources):
  train, test = sources['train'], sources['test']
  assert len(train.images) + len(test.images) == 1797
  own = {split: {image.tobytes() for image in source.images} for split, source in sources.items()}
  assert not own['train'] & own['test']
  assert (train.images.max(), train.images.dtype) == (16 * digits.SCALE, np.uint8)
  for left, right in zip(train.photos, test.photos, strict=True):
    assert left.shape[1] + right.shape[1] == 640
    assert min(left.shape[1], right.shape[1]) >= 128


# Keys.


@pytest.fixture(scope='module')
def texts():
  """The text of each split, and the tokenizer."""
  train, test = (stdlib_needle.corpus(files)
                 for files in stdlib_needle.split(stdlib_needle.sources()))
  return train, test, stdlib_needle.tokenizer(train)


LINE = r'# Remember: (\w+) (\w+ \w+ \w+)\.\n'


@pytest.mark.parametrize('config', mostly_long(NEEDLES, short=2), ids=lambda config: config.name)
def test_the_answers_are_there_once_at_the_stated_depths(config, texts):
  _, real, tokens = texts
  lines = stdlib_needle.Text(real, tokens)
  depths, lengths = [], set()
  for index in range(20):
    found = stdlib_needle.example(lines, index, 1, config)
    ids = found['text'].tolist()
    length = len(ids) + found['question'].shape[1] + found['answer'].shape[1]
    assert length <= config.context
    lengths.add(math.floor(math.log2(config.context / length)))
    text = tokens.decode(ids)
    # What somebody types is what stands there.
    assert tokens.encode(text).ids == ids
    hidden = dict(re.findall(LINE, text))
    asked = [tokens.decode(question.tolist()) for question in found['question']]
    answers = [tokens.decode(answer.tolist()) for answer in found['answer']]
    assert len(set(' '.join(hidden.values()).split())) == 3 * config.keys
    assert dict(zip(asked, answers, strict=True)) == {
        f'# Remember: {first}': f' {words}' for first, words in hidden.items()}
    for answer, place, depth in zip(found['answer'], found['place'], found['depth'], strict=True):
      np.testing.assert_array_equal(found['text'][place:place + 3], answer)
      assert depth == np.float32(place / len(ids))
    # What is left without the phrases is real text.
    assert re.sub(LINE, '', text) in real
    depths.extend(found['depth'])
  # Whole lines fill a text to more than half of its length, or of a half of that, and so on.
  assert lengths == set(range(1 + config.halvings))
  if config.context > 1000:
    assert np.ptp(depths) > 0.7
    assert np.histogram(depths, bins=4, range=(0, 1))[0].min() >= 10


def test_splits_share_no_module(texts):
  modules = stdlib_needle.sources()
  train, test = stdlib_needle.split(modules)
  names = [{name for name, files in modules.items() if set(files) & set(part)}
           for part in (train, test)]
  assert not names[0] & names[1]
  assert names[0] | names[1] == modules.keys()
  assert {'json', 'ast'} <= modules.keys()
  assert not {'test', 'idlelib'} & modules.keys()
  assert 0.05 < len(texts[1]) / len(texts[0]) < 1


def test_too_little_text_is_an_error(texts):
  with pytest.raises(ValueError, match='choose a shorter context'):
    stdlib_needle.example(stdlib_needle.Text(texts[0][:200], texts[2]), 0, 0, NEEDLES[0])


# Batches.


@pytest.mark.long
def test_batches_of_scenes(place, sources):
  config = config_of('digit_scenes/64', place)
  found = qa_data.info(config)
  assert (found.vocabulary, found.pad, found.end, found.image) == (len(digit_scenes.WORDS), 0, 1, 2)
  assert (found.kinds, found.num_train, found.num_test) == (digit_scenes.KINDS, 72, 30)
  assert found.image_shape == (64, 64, 3)
  batches = list(qa_data.eval_batches(config))
  rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
  assert rows['mask'].tolist() == [1] * 30 + [0] * 2
  for row in range(30):
    scene = digit_scenes.example(sources['test'], row // 6, SMALL)
    kind = row % 6
    asked = scene['question'][kind]
    asked = asked[asked != 0]
    wanted = [*asked, *scene['answer'][kind], 1]
    assert rows['ids'][row, :len(wanted)].tolist() == wanted
    assert rows['valid'][row].tolist() == [True] * len(wanted) + [False] * (12 - len(wanted))
    assert np.flatnonzero(rows['answer'][row]).tolist() == [len(asked), len(asked) + 1]
    assert rows['kind'][row] == kind
    np.testing.assert_array_equal(rows['cells'][row], scene['cells'])
    np.testing.assert_array_equal(rows['evidence'][row], scene['evidence'][kind] > 0)
    np.testing.assert_allclose(rows['image'][row], scene['image'] / 127.5 - 1, atol=1e-6)
  for name in rows.keys() - {'mask'}:
    for row in (30, 31):  # What fills a batch up repeats the question before.
      np.testing.assert_array_equal(rows[name][row], rows[name][29])


@pytest.mark.parametrize('name', ['digit_scenes/64', 'stdlib_needle/64'])
def test_padding_on_the_left_moves_rows_and_nothing_else(name, place):
  right = list(qa_data.eval_batches(config_of(name, place)))
  left = list(qa_data.eval_batches(config_of(name, place, pad_side='left')))
  ragged = set()
  for one, other in zip(right, left, strict=True):
    assert one.keys() == other.keys()
    for row in range(8):
      length = one['valid'][row].sum()
      ragged.add(int(length))
      for key in ('ids', 'valid', 'answer'):
        moved = np.roll(one[key][row], one[key].shape[1] - length)
        np.testing.assert_array_equal(moved, other[key][row])
      assert other['valid'][row, other['valid'].shape[1] - length:].all()
      if 'place' in one and one['mask'][row]:
        answer = one['ids'][row][one['answer'][row]][:-1]
        for batch in (one, other):
          at = batch['place'][row]
          np.testing.assert_array_equal(batch['ids'][row, at:at + 3], answer)
  assert len(ragged) > 2


def test_training_batches_go_on_where_they_were(place):
  config = config_of('stdlib_needle/64', place)
  whole = qa_data.train_iterator(config, seed=3)
  batches = [next(whole) for _ in range(4)]
  again = qa_data.train_iterator(config, seed=3)
  for _ in range(2):
    next(again)
  state = again.get_state()
  resumed = qa_data.train_iterator(config, seed=3)
  resumed.set_state(state)
  for batch in batches[2:]:
    found = next(resumed)
    for key, value in batch.items():
      np.testing.assert_array_equal(found[key], value)
  assert batches[0]['ids'].shape == (8, 260)
  assert batches[0]['ids'].dtype == np.int32
  assert batches[0]['valid'].any(axis=1).all()
  for iterator in (whole, again, resumed):
    iterator.close()


def test_some_kinds_of_questions_alone(place):
  config = config_of('digit_scenes/64', place, kinds=('left', 'count'))
  found = qa_data.info(config)
  assert (found.kinds, found.num_train, found.num_test) == (digit_scenes.KINDS, 24, 10)
  whole = [row for batch in qa_data.eval_batches(config_of('digit_scenes/64', place))
           for row in zip(batch['kind'], batch['ids'].tolist(), strict=True)]
  some = [row for batch in qa_data.eval_batches(config)
          for row in zip(batch['kind'], batch['ids'].tolist(), strict=True)]
  assert some[:10] == [row for row in whole[:30] if row[0] in (0, 3)]


def test_a_row_of_training_may_ask_everything_about_its_text(place):
  iterator = qa_data.train_iterator(config_of('stdlib_needle/64', place, context=100, turns=3),
                                    seed=3)
  batch = next(iterator)
  iterator.close()
  for row in range(8):
    ids, answers = batch['ids'][row], batch['answer'][row]
    given = ids[answers].reshape(3, 4)
    assert (given[:, 3] == stdlib_needle.END).all()
    at = batch['place'][row]
    np.testing.assert_array_equal(ids[at:at + 3], given[0, :3])
    # All three words of each stand in the text before.
    text = ids[:answers.argmax()].tolist()
    assert all(text.count(token) == 1 for token in given[:, :3].ravel().tolist())


@pytest.mark.parametrize('side', ['right', 'left'])
def test_a_row_of_training_may_ask_everything_about_its_image(side, place, sources):
  config = config_of('digit_scenes/64', place, context=70, turns=6, pad_side=side)
  iterator = qa_data.train_iterator(config, seed=3)
  batch = next(iterator)
  iterator.close()
  orders = set()
  scenes = [digit_scenes.example(sources['train'], index, SMALL) for index in range(12)]
  images = [scene['image'] / 127.5 - 1 for scene in scenes]
  for row in range(8):
    scene, = [one for one, image in zip(scenes, images, strict=True)
              if np.allclose(image, batch['image'][row], atol=1e-6)]
    ids = batch['ids'][row][batch['valid'][row]].tolist()
    assert ids.count(digit_scenes.IMAGE) == 1
    assert ids[0] == digit_scenes.IMAGE
    answers = batch['answer'][row][batch['valid'][row]]
    order, first = [], 1
    while first < len(ids):
      kind, = [kind for kind, question in enumerate(scene['question'])
               if ids[first:first + sum(question > 0) - 1] == question[question > 0][1:].tolist()]
      last = first + sum(scene['question'][kind] > 0) - 1
      assert ids[last:last + 2] == [*scene['answer'][kind], digit_scenes.END]
      assert not answers[first:last].any()
      assert answers[last:last + 2].all()
      order, first = [*order, kind], last + 2
    assert sorted(order) == list(range(6))
    assert order[0] == batch['kind'][row]
    np.testing.assert_array_equal(batch['evidence'][row], scene['evidence'][order[0]] > 0)
    orders.add(tuple(order))
  assert len(orders) > 4


@pytest.mark.parametrize(('name', 'changes', 'message'), [
    ('digit_scenes/64', {'turns': 7}, 'asks 6 questions'),
    ('stdlib_needle/64', {'turns': 7}, 'asks 3 questions'),
    ('digit_scenes/64', {'turns': 2, 'kinds': ('left',)}, 'asks 1 questions'),
    ('digit_scenes/64', {'kinds': ('right',)}, 'count, present, cell, left, top_row, corner'),
    ('stdlib_needle/64', {'kinds': ('left',)}, 'has one kind of question'),
    ('digit_scenes', {}, 'digit_scenes/64, digit_scenes/64_present'),
    ('stdlib_needle/2k', {}, 'stdlib_needle/16k'),
    ('digits', {}, 'has no questions'),
    ('digit_scenes/64', {'pad_side': 'top'}, 'choose one of left, right'),
    ('digit_scenes/64', {'image_size': 64}, "has no field 'image_size'"),
])
def test_errors_say_what_to_choose(name, changes, message, place):
  with pytest.raises(ValueError, match=re.escape(message)):
    qa_data.info(config_of(name, place, **changes))


def test_a_row_longer_than_the_context_is_an_error(place):
  with pytest.raises(ValueError, match=r'raise data\.context'):
    list(qa_data.eval_batches(config_of('digit_scenes/64', place, context=8)))
