"""Pictures of emoji, drawn by the test, and the questions about them."""

import numpy as np
from PIL import Image

from lib.data.datasets import emoji_scenes
from lib.data.datasets.emoji_scenes import COUNTS, NAMES, Sources, example

CONFIGS = {config.name: config for config in emoji_scenes.EmojiScenes.BUILDER_CONFIGS}


def made(config, split, index):
  """The features of one picture, and its questions and answers as text."""
  # Of one colour each: red tells the name, green is nowhere else.
  drawings = [[Image.new('RGBA', (64, 64), (number, 255, vendor, 255)) for number in range(121)]
              for vendor in range(1 + 2 * (split == 0))]
  photo = np.zeros((300, 300, 3), np.uint8)
  sources = Sources(split, drawings, (photo,), lambda text: [ord(letter) for letter in text])
  record = example(sources, index, CONFIGS[config])
  texts = [[''.join(chr(each) for each in ids if each) for ids in record[name]]
           for name in ('question', 'answer')]
  asked = [text.split('<file_sep>')[1].split('<|im_end|>')[0] for text in texts[0]]
  return record, list(zip(asked, (text.strip() for text in texts[1]), strict=True))


def test_questions_are_answered_by_the_picture(monkeypatch):
  monkeypatch.setattr(emoji_scenes, 'LONGEST', 16)
  there, counts = [], set()
  for index in range(60):
    record, questions = made('grid', 1, index)
    image = record['image']
    quarters = {corner: image[top:top + 112, left:left + 112] for corner, (top, left) in zip(
        emoji_scenes.CORNERS, ((0, 0), (0, 112), (112, 0), (112, 112)), strict=True)}
    shown = {corner: NAMES[quarter[inside][0, 0]] for corner, quarter in quarters.items()
             if (inside := (quarter[..., 1:] == (255, 0)).all(axis=-1)).sum() > 500}
    (name, answer), (present, yes), (_, count) = questions
    corner = name.removeprefix('What is in the ').removesuffix(' corner?')
    assert shown[corner] == answer
    assert count == COUNTS[len(shown) - 1]
    wanted = present.removesuffix('?').split()[-1]
    assert yes == ('yes' if wanted in shown.values() else 'no')
    there.append(yes == 'yes')
    counts.add(count)
  assert 20 < sum(there) < 40
  assert counts == {'two', 'three', 'four'}


def test_every_name_is_tested_and_pictures_are_the_same_every_time(monkeypatch):
  monkeypatch.setattr(emoji_scenes, 'LONGEST', 16)
  answers = [made('one', 1, index)[1][0] for index in range(121)]
  assert answers == [('What is this?', name) for name in NAMES]
  first, again = (made('mixed', 0, 7)[0]['image'] for _ in range(2))
  np.testing.assert_array_equal(first, again)
  assert (first != made('mixed', 0, 8)[0]['image']).any()
