"""The data path on real TFDS sets: scikit-learn's digits, and PNG files written here."""

import dataclasses
import hashlib
import importlib.util
import io
import itertools
import json

import ml_collections
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from lib.data import augment, prepare
from lib.data import images as image_data
from lib.data.datasets import digits
from lib.data.image_reader import CorruptRecordError
from lib.data.settings import ON_CORRUPT

TRAIN, TEST = 23, 7
MODES = {3: 'P', 4: 'RGBA'}
SIZES = ((9, 12), (16, 16), (40, 30))
# Where a PNG file of `Pictures` is cut short.
DAMAGED = 5


def png(image):
  stream = io.BytesIO()
  image.save(stream, 'png')
  return stream.getvalue()


def picture(index):
  """A picture whose only colour tells its index; sizes and colour modes differ."""
  image = Image.new('RGB', SIZES[index % len(SIZES)], (10 * index, 255 - 10 * index, 77))
  return image.convert(MODES.get(index, 'RGB'), palette=Image.Palette.ADAPTIVE)


class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """PNG files behind the real TFDS `Image` feature; the label is the index.

  Without TensorFlow that feature cannot encode an array, but it stores encoded files as they are.
  The class is not registered, so TFDS finds the set by the files that it wrote.
  """

  VERSION = tfds.core.Version('1.2.0')
  url_infos = None

  def _info(self):
    return tfds.core.DatasetInfo(
        builder=self, supervised_keys=('image', 'label'), disable_shuffling=True,
        features=tfds.features.FeaturesDict({
            'image': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
            'label': tfds.features.ClassLabel(num_classes=TRAIN)}))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(TRAIN), 'test': self._generate_examples(TEST),
            'damaged': self._generate_examples(TEST, damaged=DAMAGED)}

  def _generate_examples(self, count, damaged=None):
    for index in range(count):
      file = png(picture(index))
      if index == damaged:
        file = file[:len(file) // 2]
      yield index, {'image': io.BytesIO(file), 'label': index}


class Arrays(Pictures):
  """As `Pictures`, but gives arrays, which TFDS can only encode with TensorFlow; registered."""

  def _generate_examples(self, count, damaged=None):
    for index in range(count):
      yield index, {'image': np.asarray(picture(index).convert('RGB')), 'label': index}


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  folder = tmp_path_factory.mktemp('sets')
  tfds.disable_progress_bar()
  Pictures(data_dir=folder, file_format='array_record').download_and_prepare()
  return folder


def config_of(name, place, **changes):
  channels = 1 if name == 'digits' else 3
  config = ml_collections.ConfigDict({
      'name': name, 'data_dir': str(place), 'image_size': 16, 'batch_size': 4, 'channels': channels,
      'train_split': 'train', 'test_split': 'test', 'mean': (0.5,) * channels,
      'std': (0.25,) * channels, 'augment': {}})
  config.update(changes)
  return config


def pictures(place, **changes):
  return config_of('pictures', place, **changes)


def take(iterator, count):
  return list(itertools.islice(iterator, count))


def labels_of(batches):
  return np.concatenate([batch['label'] for batch in batches]).tolist()


def assert_equal(first, second):
  assert len(first) == len(second)
  for a, b in zip(first, second, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


# The digits.


def test_digits_are_the_originals_split_by_class(place):
  config = config_of('digits', place, image_size=8, batch_size=359, mean=(0.0,), std=(1.0,))
  info = image_data.info(config)
  assert dataclasses.astuple(info) == (10, 1438, 359, (8, 8, 1), tuple('0123456789'))
  (batch,) = image_data.eval_batches(config)
  config.test_split = 'train'
  parts = [batch, *image_data.eval_batches(config)]
  real = np.concatenate([part['mask'] for part in parts]) == 1
  labels = np.concatenate([part['label'] for part in parts])[real]
  images = np.concatenate([part['image'] for part in parts])[real]
  original = load_digits()
  train, test = digits.split(original.target)
  order = np.concatenate([test, train])
  assert sorted(order) == list(range(1797))
  np.testing.assert_array_equal(labels, original.target[order])
  # Stored as bytes of 15 times the original: dividing undoes it exactly.
  np.testing.assert_array_equal(np.rint(images[..., 0] * 255) / digits.SCALE,
                                original.images[order])
  of_class = np.bincount(original.target)
  assert (abs(np.bincount(original.target[test]) - 0.2 * of_class) <= 0.5).all()


def test_the_split_of_the_digits_never_moves():
  train, test = digits.split(load_digits().target)
  digest = hashlib.sha256(np.concatenate([train, test]).astype('<i4').tobytes()).hexdigest()
  assert digest.startswith('7786366b8bc45509')


def test_a_process_that_prepares_second_keeps_what_the_first_wrote(tmp_path):
  late = digits.Digits(data_dir=tmp_path, file_format='array_record')
  folder = prepare.prepare('digits', data_dir=str(tmp_path))
  before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}
  prepare._prepare_bundled('digits', late)
  assert {file.name: (file.stat().st_mtime_ns, file.read_bytes())
          for file in folder.iterdir()} == before
  assert [entry.name for entry in folder.parent.iterdir()] == ['1.0.0']


# Order, shards, resuming.


def test_every_epoch_has_each_example_once_in_another_order(place):
  def epochs(seed):
    order = labels_of(take(image_data.train_iterator(pictures(place), seed=seed), TRAIN))
    return np.asarray(order).reshape(4, TRAIN).tolist()  # 23 batches of 4 are 4 epochs of 23.

  first = epochs(seed=0)
  assert all(sorted(epoch) == list(range(TRAIN)) for epoch in first)
  assert len({tuple(epoch) for epoch in first}) == 4
  assert first == epochs(seed=0)
  # Not the same orders one epoch later either.
  assert not any(epoch in first for epoch in epochs(seed=1))


@pytest.mark.long
@pytest.mark.parametrize('before', [0, 1, 5, 9])
def test_resuming_goes_on_bit_for_bit(place, before):
  augment = {'method': 'affine', 'shift': 0.1, 'degrees': 10.0, 'scale': (0.9, 1.1)}
  config = config_of('digits', place, image_size=32, batch_size=300, augment=augment)
  running = image_data.train_iterator(config, seed=3)
  take(running, before)
  state = json.loads(json.dumps(running.get_state()))
  resumed = image_data.train_iterator(config, seed=3)
  take(resumed, 2)
  resumed.set_state(state)
  assert_equal(take(running, 5), take(resumed, 5))
  assert running.get_state() == resumed.get_state()


@pytest.mark.parametrize('threads', [0, 1, 3])
def test_threads_change_nothing(place, threads):
  def batches(threads):
    config = pictures(place, augment={'method': 'crop'}, threads=threads)
    return take(image_data.train_iterator(config, seed=0), 4)

  assert_equal(batches(threads), batches(2))


def test_augmentation_differs_between_epochs_and_seeds(place):
  augment = {'method': 'affine', 'shift': 0.2}
  config = config_of('digits', place, batch_size=1, train_split='train[:1]', augment=augment)
  stream = take(image_data.train_iterator(config, seed=0), 3) + take(
      image_data.train_iterator(config, seed=1), 3)
  assert len({batch['image'].tobytes() for batch in stream}) == 6


def test_processes_share_each_batch_of_the_one_process_stream(place):
  config = pictures(place, augment={'method': 'crop'})

  def rows(processes):
    """Steps of sets of (label, pixels), over all processes."""
    streams = [take(image_data.train_iterator(config, seed=0, process_index=index,
                                              process_count=processes), 9)
               for index in range(processes)]
    return [sorted((int(label), image.tobytes()) for batch in step
                   for label, image in zip(batch['label'], batch['image'], strict=True))
            for step in zip(*streams, strict=True)]

  alone = rows(1)
  assert [len(step) for step in alone] == [4] * 9
  assert rows(2) == alone
  assert rows(4) == alone


def test_the_place_in_the_data_serves_any_number_of_processes(place):
  config = pictures(place)
  alone = image_data.train_iterator(config, seed=0)
  take(alone, 3)
  half = image_data.train_iterator(config, seed=0, process_index=1, process_count=2)
  half.set_state(alone.get_state())
  assert set(next(half)['label']) < set(next(alone)['label'])


@pytest.mark.parametrize('processes', [1, 2, 4])
def test_evaluation_sees_every_example_once(place, processes):
  seen, counts = [], set()
  for index in range(processes):
    batches = image_data.eval_batches(pictures(place), process_index=index, process_count=processes)
    counts.add(len(batches))
    for batch in batches:
      assert batch['image'].shape == (4 // processes, 16, 16, 3)
      assert set(batch['mask']) <= {0.0, 1.0}
      assert not batch['image'][batch['mask'] == 0].any()
      seen += batch['label'][batch['mask'] == 1].tolist()
  assert counts == {2}
  assert sorted(seen) == list(range(TEST))


def test_evaluation_can_be_left_early_and_started_again(place):
  batches = image_data.eval_batches(pictures(place))
  assert_equal([next(iter(batches))], list(batches)[:1])


# Pixels.


def test_png_files_come_out_as_their_colours(place):
  config = pictures(place, batch_size=8)
  assert dataclasses.astuple(image_data.info(config))[:4] == (TRAIN, TRAIN, TEST, (None, None, 3))
  (batch,) = image_data.eval_batches(config)
  assert {key: value.dtype.name for key, value in batch.items()} == {
      'image': 'float32', 'label': 'int32', 'mask': 'float32'}
  for index in range(TEST):
    colour = np.asarray([10 * index, 255 - 10 * index, 77]) / 255
    expected = np.broadcast_to((colour - 0.5) / 0.25, (16, 16, 3))
    np.testing.assert_allclose(batch['image'][index], expected, atol=1e-6)


class Extreme:
  """Draws the highest number every time; a coin always shows heads."""

  def uniform(self, low, high, size=None):
    return high if size is None else np.full(size, high)

  def random(self, size=None):
    return 0.0 if size is None else np.zeros(size)


RANDOM = np.random.default_rng(0)
NOISE = Image.fromarray(RANDOM.integers(0, 256, (8, 8, 3), dtype=np.uint8))
PIXELS = np.asarray(NOISE)


@pytest.mark.parametrize(('method', 'arguments', 'expected'), [
    ('none', {}, PIXELS),
    ('affine', {}, PIXELS),
    ('affine', {'flip': 1.0}, PIXELS[:, ::-1]),
    ('affine', {'degrees': 90.0}, np.rot90(PIXELS, -1)),
    ('affine', {'shift': 0.25}, np.pad(PIXELS[2:, 2:], ((0, 2), (0, 2), (0, 0)))),
    ('affine', {'scale': (0.5, 0.5)},
     np.pad(PIXELS.astype(int).reshape(4, 2, 4, 2, 3).mean((1, 3)), ((2, 2), (2, 2), (0, 0)))),
    ('crop', {'area': (1.0, 1.0), 'aspect': (1.0, 1.0), 'flip': 0.0}, PIXELS),
    ('crop', {'area': (1.0, 1.0), 'aspect': (1.0, 1.0), 'flip': 1.0}, PIXELS[:, ::-1]),
    ('crop', {'area': (0.25, 0.25), 'aspect': (1.0, 1.0), 'flip': 0.0},
     np.asarray(NOISE.resize((8, 8), Image.Resampling.BILINEAR, box=(0, 0, 4, 4)))),
])
def test_augmentations_do_what_their_numbers_say(method, arguments, expected):
  """Within one level of 255: Pillow rounds."""
  found = augment.AUGMENTS[method](NOISE, 8, Extreme(), filter='bilinear', **arguments)
  np.testing.assert_allclose(np.asarray(found).astype(float), expected, atol=1)


@pytest.mark.parametrize('method', augment.AUGMENTS)
@pytest.mark.parametrize('filter', augment.FILTERS)
def test_augmentations_accept_any_shape(method, filter):
  for width, height in [(1, 9), (300, 5), (64, 64)]:
    image = Image.new('L', (width, height), 100)
    found = np.asarray(augment.AUGMENTS[method](image, 32, np.random.default_rng(0),
                                                filter=filter))
    assert found.shape == (32, 32)
    assert (found == 100).all()


def test_enlarging_by_a_matrix_is_enlarging(place):
  """Training and evaluation see the same scale: an affine that does nothing is `whole`."""
  same = augment.affine(NOISE, 32, RANDOM, filter='bilinear')
  whole = augment.whole(NOISE, 32, filter='bilinear')
  np.testing.assert_allclose(np.asarray(same).astype(int), np.asarray(whole).astype(int), atol=2)


@pytest.mark.parametrize(('method', 'arguments'), [
    ('none', {}), ('affine', {}), ('crop', {'area': (1.0, 1.0), 'aspect': (1.0, 1.0)})])
def test_shrinking_antialiases(method, arguments):
  """Black and white noise of spread 127 turns grey: 8 x 8 pixels fall on one, and not 4 of them."""
  noise = Image.fromarray(np.random.default_rng(0).integers(0, 2, (64, 64), np.uint8) * 255)
  found = augment.AUGMENTS[method](noise, 8, Extreme(), filter='bilinear', **arguments)
  assert np.asarray(found).std() < 127 / 8


def test_the_centre_crop_of_evaluation():
  image = Image.fromarray(np.arange(10 * 6, dtype=np.uint8).reshape(6, 10))
  np.testing.assert_array_equal(augment.whole(image, 6, filter='bilinear'),
                                np.asarray(image)[:, 2:8])
  np.testing.assert_array_equal(augment.whole(image, 3, filter='bilinear', fraction=0.5),
                                np.asarray(image.resize((3, 3), Image.Resampling.BILINEAR,
                                                        box=(3.5, 1.5, 6.5, 4.5))))


# Damage.


def test_a_damaged_picture_raises_with_its_place(place):
  config = pictures(place, test_split='damaged', train_split='damaged')
  text = (rf"example {DAMAGED} of pictures 'damaged'.*pictures-damaged.array_record.*"
          rf'record {DAMAGED}')
  with pytest.raises(CorruptRecordError, match=text):
    list(image_data.eval_batches(config))
  with pytest.raises(CorruptRecordError, match=text):
    take(image_data.train_iterator(config, seed=0), 2)


def test_a_damaged_picture_is_skipped_and_counted(place):
  config = pictures(place, test_split='damaged', train_split='damaged', on_corrupt='skip')
  batches = image_data.eval_batches(config)
  found = list(batches)
  assert sum(batch['mask'].sum() for batch in found) == TEST - 1
  assert found[1]['mask'].tolist() == [1, 0, 1, 0]
  assert list(batches.corrupt) == [DAMAGED]
  iterator = image_data.train_iterator(config, seed=0)
  # 7 batches of 4 are 4 epochs of 7: the one after the damaged one stands in for it.
  expected = sorted(4 * [0, 1, 2, 3, 4, 6, 6])
  assert sorted(labels_of(take(iterator, 7))) == expected
  assert list(iterator.corrupt) == [DAMAGED]
  assert 'pictures-damaged.array_record' in iterator.corrupt[DAMAGED]


def damage(folder, split, indices):
  """Flips bytes in the middle of stored pictures."""
  (file,) = folder.rglob(f'pictures-{split}.array_record*')
  content = bytearray(file.read_bytes())
  for index in indices:
    start = content.index(png(picture(index)))
    content[start:start + 4] = bytes(255 - byte for byte in content[start:start + 4])
  file.write_bytes(content)


def test_a_damaged_file_names_the_record_and_spares_the_others(tmp_path):
  Pictures(data_dir=tmp_path, file_format='array_record').download_and_prepare()
  damage(tmp_path, 'test', [2])
  with pytest.raises(CorruptRecordError, match=r'example 2 of pictures .*, record 2\)'):
    list(image_data.eval_batches(pictures(tmp_path)))
  batches = image_data.eval_batches(pictures(tmp_path, on_corrupt='skip', batch_size=8))
  (batch,) = batches
  assert batch['mask'].tolist() == [1, 1, 0, 1, 1, 1, 1, 0]
  assert list(batches.corrupt) == [2]


def test_skipping_ends_where_nothing_can_be_read(tmp_path):
  Pictures(data_dir=tmp_path, file_format='array_record').download_and_prepare()
  damage(tmp_path, 'train', range(1, TRAIN))
  config = pictures(tmp_path, on_corrupt='skip')
  assert labels_of(take(image_data.train_iterator(config, seed=0), 6)) == [0] * 24
  damage(tmp_path, 'train', [0])
  with pytest.raises(CorruptRecordError, match=r'100 records in a row cannot be read'):
    next(image_data.train_iterator(config, seed=0))


@pytest.mark.parametrize('on_corrupt', ON_CORRUPT)
def test_a_missing_file_is_never_skipped(tmp_path, on_corrupt):
  Pictures(data_dir=tmp_path, file_format='array_record').download_and_prepare()
  (file,) = tmp_path.rglob('pictures-test.array_record*')
  file.unlink()
  with pytest.raises(FileNotFoundError, match=f'{file} is missing.*prepare the set again'):
    list(image_data.eval_batches(pictures(tmp_path, on_corrupt=on_corrupt)))


# What people get wrong.


@pytest.mark.parametrize(('changes', 'error', 'text'), [
    ({'name': 'pictres'}, ValueError, "'pictres' is not known to TFDS.*did you mean"),
    ({'name': 'cifr10'}, ValueError, 'did you mean cifar10,'),
    ({'name': 'cifar10'}, FileNotFoundError,
     r'cifar10 is not prepared in .*: run `python -m tools.prepare --name=cifar10 --data_dir='),
    ({'train_split': 'validation'}, ValueError,
     "no split 'validation': it has damaged, test, train,.*set data.train_split"),
    ({'channels': 1, 'mean': (0.5,), 'std': (0.5,)}, ValueError,
     'images of 3 channels, but data.channels=1'),
    ({'channels': 2}, ValueError, 'data.channels=2 is unknown: choose one of 1, 3'),
    ({'mean': (0.5,)}, ValueError, 'data.mean has 1 numbers for 3 channels'),
    ({'batchsize': 3}, ValueError,
     r"data has no field 'batchsize' \(did you mean 'batch_size'\?\): choose from name, batch_"),
    ({'augment': {'method': 'mixup'}}, ValueError,
     "augment.method='mixup' is unknown: choose one of none, crop, affine"),
    ({'augment': {'method': 'affine', 'rotate': 3}}, ValueError,
     r"augment: 'affine' has no argument 'rotate'.*: choose from shift, degrees, scale, flip"),
    ({'augment': {'flip': 0.5}}, ValueError,
     "augment.method='none' takes no arguments, and data.augment has flip"),
    ({'on_corrupt': 'ignore'}, ValueError, 'choose one of raise, skip'),
    ({'filter': 'lanczos'}, ValueError, 'choose one of bilinear, bicubic'),
    ({'test_crop': 1.5}, ValueError, 'test_crop=1.5 must be above 0'),
])
def test_mistakes_are_answered_in_one_line(place, changes, error, text):
  with pytest.raises(error, match=text) as caught:
    image_data.info(ml_collections.ConfigDict(pictures(place).to_dict() | changes))
  assert '\n' not in str(caught.value)


def test_a_missing_field_is_named(place):
  config = pictures(place).to_dict()
  del config['image_size'], config['std']
  with pytest.raises(ValueError, match='data lacks image_size, std'):
    image_data.info(ml_collections.ConfigDict(config))


def test_a_batch_must_divide_over_the_processes(place):
  with pytest.raises(ValueError, match='batch_size=4 cannot be divided over 3 processes'):
    image_data.train_iterator(pictures(place), seed=0, process_index=1, process_count=3)
  with pytest.raises(ValueError, match='make it a multiple of 3'):
    image_data.eval_batches(pictures(place), process_index=1, process_count=3)


@pytest.mark.parametrize(('seed', 'changes', 'text'), [
    (1, {}, "seed=0, but the config says 1"),
    (0, {'batch_size': 8}, "batch_size=4, but the config says 8"),
    (0, {'train_split': 'test'}, "split='train', but the config says 'test'"),
])
def test_the_place_of_another_stream_is_refused(place, seed, changes, text):
  state = image_data.train_iterator(pictures(place), seed=0).get_state()
  with pytest.raises(ValueError, match=text):
    image_data.train_iterator(pictures(place, **changes), seed=seed).set_state(state)


def test_another_version_on_disk_is_offered(tmp_path):
  older = tmp_path / 'cifar10' / '3.0.0' / 'dataset_info.json'
  older.parent.mkdir(parents=True)
  older.touch()
  with pytest.raises(FileNotFoundError, match=r'or set data.name=cifar10:3\.0\.0, which is there'):
    image_data.info(config_of('cifar10', tmp_path))


def test_preparing_says_what_a_person_must_download(tmp_path):
  with pytest.raises(ValueError, match=r'imagenet2012 has files that you must download yourself.*'
                                       r'downloads/manual has none.*ILSVRC2012_img_train.tar'):
    prepare.prepare('imagenet2012', data_dir=str(tmp_path))


@pytest.mark.skipif(importlib.util.find_spec('tensorflow') is not None,
                    reason='TensorFlow is installed')
def test_preparing_says_that_a_set_needs_tensorflow(tmp_path):
  with pytest.raises(ValueError, match='needs the package tensorflow to write arrays'):
    prepare.prepare('arrays', data_dir=str(tmp_path))


def test_other_formats_are_refused(tmp_path):
  Pictures(data_dir=tmp_path, file_format='array_record').download_and_prepare()
  (info,) = tmp_path.rglob('dataset_info.json')
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  with pytest.raises(ValueError, match=r'stored as tfrecord, but random access needs array_record'):
    image_data.info(pictures(tmp_path))
