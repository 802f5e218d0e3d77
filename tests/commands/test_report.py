"""Reports: rows on disk, tables, the accuracy-cost plot, and pictures of tokens."""

import fcntl
import itertools
import json
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import image as mpl_image

from lib.report import overlay, plots, tables
from lib.report.rows import append_jsonl, read_jsonl
from ops import assignments
from ops import tokens as tk

# -- rows ----------------------------------------------------------------------------------------


def test_rows_come_back_as_they_went(tmp_path):
  path = tmp_path / 'deep' / 'rows.jsonl'
  rows = [{'method': 'a', 'tokens': [65, 46], 'accuracy': 0.5}, {'method': 'bé'}]
  for row in rows:
    append_jsonl(path, row)
  assert read_jsonl(path) == rows
  assert path.read_bytes().count(b'\n') == 2


def test_array_values_become_plain_and_nan_null(tmp_path):
  path = tmp_path / 'rows.jsonl'
  append_jsonl(path, {'a': np.float32(0.5), 'b': jnp.arange(2), 'c': float('nan'),
                      'd': (np.int64(3), {'e': np.inf})})
  assert read_jsonl(path) == [{'a': 0.5, 'b': [0, 1], 'c': None, 'd': [3, {'e': None}]}]


def test_a_line_cut_anywhere_costs_only_itself(tmp_path):
  path = tmp_path / 'rows.jsonl'
  first, last, later = {'method': 'first'}, {'method': 'last', 'n': 12}, {'method': 'later'}
  whole = json.dumps(first).encode() + b'\n'
  line = json.dumps(last).encode()
  for length in range(len(line) + 1):
    path.write_bytes(whole + line[:length])
    survivors = [first, last] if length == len(line) else [first]
    assert read_jsonl(path) == survivors
    append_jsonl(path, later)
    assert read_jsonl(path) == [*survivors, later]
    assert path.read_bytes().startswith(whole)


def test_a_cut_line_longer_than_one_read_is_removed_whole(tmp_path):
  path = tmp_path / 'rows.jsonl'
  append_jsonl(path, {'n': 1})
  with path.open('ab') as file:
    file.write(b'{"note": "' + b'x' * 20_000)
  append_jsonl(path, {'n': 2})
  assert read_jsonl(path) == [{'n': 1}, {'n': 2}]


def test_a_broken_line_inside_is_an_error_that_names_it(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text('{"n": 1}\n{"n": \n{"n": 3}\n')
  with pytest.raises(ValueError, match='line 2'):
    read_jsonl(path)
  path.write_text('{"n": 1}\n[2]\n')
  with pytest.raises(ValueError, match='line 2'):
    read_jsonl(path)


def test_a_row_that_json_cannot_hold_leaves_the_file_alone(tmp_path):
  path = tmp_path / 'rows.jsonl'
  append_jsonl(path, {'n': 1})
  with pytest.raises(TypeError):
    append_jsonl(path, {'n': object()})
  assert read_jsonl(path) == [{'n': 1}]


def test_a_writer_waits_for_another_that_is_half_way_through_a_line(tmp_path):
  path = tmp_path / 'rows.jsonl'
  late = threading.Thread(target=append_jsonl, args=(path, {'who': 'late'}))
  with path.open('ab') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(b'{"who": "ea')
    file.flush()
    late.start()
    late.join(timeout=0.3)
    assert late.is_alive(), 'it wrote beside another writer'
    file.write(b'rly"}\n')
  late.join()
  assert read_jsonl(path) == [{'who': 'early'}, {'who': 'late'}]


# -- tables --------------------------------------------------------------------------------------

ROWS = [
    {'method': 'whole', 'budget': 'all', 'accuracy': 0.8184, 'tokens': [197] * 12, 'gmacs': 17.582,
     'gmacs_ratio': 1.0, 'median_ms': 123.45, 'low_ms': 120.0, 'high_ms': 130.0, 'speedup': 1.0,
     'compile_s': 2.04},
    {'method': 'long|name', 'budget': '60 %', 'accuracy': 0.7, 'tokens': [197, 184, 171, 158, 145,
     132], 'gmacs': 4.4, 'gmacs_ratio': 0.25, 'median_ms': 9.0, 'note': 'untrained'},
]


def test_table_to_the_letter():
  text = tables.table(ROWS, ('method', 'accuracy', 'gmacs', 'latency', 'note'))
  assert text.splitlines() == [
      'method     accuracy %  GMACs        ms [quartiles]  note',
      '---------  ----------  -----  --------------------  ---------',
      'whole           81.84  17.58  123.5 [120.0, 130.0]  -',
      'long|name       70.00   4.40                   9.0  untrained',
  ]


def test_table_columns_start_and_end_together():
  lines = tables.table(ROWS).splitlines()
  gaps = [i for i, dash in enumerate(lines[1]) if dash == ' ']
  assert gaps
  for line in lines:
    assert all(line[i] == ' ' for i in gaps if i < len(line)), line


def test_tokens_are_shown_as_runs():
  shown = tables.table([{'tokens': [65, 65, 46, 46, 32]}, {'tokens': list(range(60, 40, -2))},
                        {'tokens': [65.0, 31.52]}, {}], ('tokens',))
  assert shown.splitlines()[2:] == ['65x2 46x2 32', '60 58 ... 44 42', '65 31.52', '-']


def test_markdown_escapes_and_aligns():
  lines = tables.markdown(ROWS, ('method', 'speedup', 'note')).splitlines()
  assert lines == [
      '| method     | speed-up | note      |',
      '| ---------- | -------: | --------- |',
      '| whole      |    1.00x |           |',
      r'| long\|name |          | untrained |',
  ]


def test_tables_show_keys_they_do_not_know_but_not_typos():
  assert 'blue' in tables.table([{'sky': 'blue'}], ('sky',))
  with pytest.raises(ValueError, match=r"'accuracies'.*accuracy"):
    tables.table(ROWS, ('accuracies',))


def test_an_empty_table_is_its_titles():
  assert tables.table([], ('method', 'gmacs')).splitlines() == ['method  GMACs', '------  -----']


# -- the plot ------------------------------------------------------------------------------------


def sweep(names, *, shares=(0.8, 0.5, 0.3)):
  """Made-up rows: the first name is the reference."""
  rows = [{'method': names[0], 'accuracy': 0.8, 'gmacs': 10.0, 'median_ms': 50.0}]
  for i, name in enumerate(names[1:]):
    rows += [{'method': name, 'accuracy': 0.8 - (1 - share) * 0.04 * (i + 1), 'gmacs': 10 * share,
              'median_ms': 50 * share, 'low_ms': 49 * share, 'high_ms': 53 * share}
             for share in shares]
  return rows


def picture(path):
  return mpl_image.imread(path)[..., :3]


def has_colour(pixels, colour):
  rgb = np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)]) / 255
  return (np.abs(pixels - rgb).max(axis=2) < 0.01).sum() > 50


@pytest.mark.long
def test_plot_draws_methods_in_colour_and_baselines_in_grey(tmp_path):
  rows = sweep(['whole', 'plain', 'first', 'second'])
  path = plots.plot_accuracy_cost(rows, tmp_path / 'new' / 'plot.png', title='A title',
                                  baselines=('plain',), reference='whole')
  pixels = picture(path)
  assert pixels.shape == (1120, 2000, 3)
  assert has_colour(pixels, plots.GREYS[0])
  assert has_colour(pixels, plots.COLOURS[0])
  assert has_colour(pixels, plots.COLOURS[1])
  assert not has_colour(pixels, plots.COLOURS[2])
  edge = np.concatenate([pixels[:4].ravel(), pixels[-4:].ravel(), pixels[:, :4].ravel(),
                         pixels[:, -4:].ravel()])
  assert (edge == 1).all(), 'something is cut off at the edge'


def test_plot_of_latency_without_reference(tmp_path):
  path = plots.plot_accuracy_cost(sweep(['whole', 'a'])[1:], tmp_path / 'plot.png',
                                  cost='median_ms')
  assert has_colour(picture(path), plots.COLOURS[0])


def test_plot_refuses_what_it_cannot_draw(tmp_path):
  rows = sweep(['whole', 'a'])
  with pytest.raises(ValueError, match='gmacs, median_ms'):
    plots.plot_accuracy_cost(rows, tmp_path / 'x.png', cost='joules')
  with pytest.raises(ValueError, match=r"reference='none'.*whole, a"):
    plots.plot_accuracy_cost(rows, tmp_path / 'x.png', reference='none')
  with pytest.raises(ValueError, match='nothing to draw'):
    plots.plot_accuracy_cost([{'method': 'a'}], tmp_path / 'x.png')


def test_styles_tell_many_methods_apart_without_colour_alone():
  styles = plots._styles([f'm{i}' for i in range(42)], baselines=())
  assert len({(style['color'], style['marker']) for style in styles.values()}) == 42


@pytest.mark.parametrize(('wanted', 'expected'), [
    ([1.0, 5.0, 9.0], [1.0, 5.0, 9.0]),                  # far apart: left alone
    ([5.0, 5.0], [4.5, 5.5]),                            # pushed apart evenly
    ([5.2, 5.0, 8.0], [5.6, 4.6, 8.0]),                  # order stays, others too
    ([0.0, 0.2], [0.0, 1.0]),                            # kept inside below …
    ([9.9, 10.0, 10.0], [8.0, 9.0, 10.0]),               # … and above
])
def test_spread_moves_labels_as_little_as_need_be(wanted, expected):
  assert plots.spread(wanted, 1.0, 0.0, 10.0) == pytest.approx(expected)


def test_notes_are_marked_once_each():
  lines = {'a': [{'note': 'untrained'}, {'note': 'untrained'}], 'b': [{}], 'c': [{'note': 'slow'}]}
  assert plots._stars(lines) == {'untrained': '*', 'slow': '†'}
  assert plots._marked(lines) == {'a': 'a*', 'b': 'b', 'c': 'c†'}


# -- pictures of tokens --------------------------------------------------------------------------


def token_set(owner, *, slots, **fields):
  """Tokens with a given provenance; features do not matter."""
  owner = jnp.asarray([owner], jnp.int32)
  zeros = jnp.zeros((1, slots), jnp.int32)
  return tk.TokenSet(x=jnp.zeros((1, slots, 1)), pos=zeros, kind=zeros.astype(jnp.int8),
                     owner=owner, **fields)


def test_groups_read_provenance_behind_special_tokens():
  # [CLS] in slot 0; patches: alone, dropped, two merged, one with [CLS], one alone.
  found = overlay.groups(token_set([0, 2, -1, 1, 1, 0, 3], slots=4), 0, (2, 3))
  assert found.labels.tolist() == [[2, -1, 1], [1, 0, 3]]
  assert found.merged.tolist() == [[False, False, True], [True, True, False]]
  assert found.tokens == 4


def test_groups_count_padding_as_gone_and_size_as_merged():
  tokens = token_set([0, 1, 2, 3], slots=4, valid=jnp.array([[True, True, True, False]]),
                     size=jnp.array([[1.0, 1.0, 1.6, 1.0]]))
  found = overlay.groups(tokens, 0, (2, 2))
  assert found.labels.tolist() == [[0, 1], [2, -1]]
  assert found.merged.tolist() == [[False, False], [True, False]]
  assert found.tokens == 3


def test_groups_refuse_what_does_not_fit():
  with pytest.raises(ValueError, match='3 x 3 patches does not fit 4 tokens'):
    overlay.groups(token_set([0, 1, 2, 3], slots=4), 0, (3, 3))
  with pytest.raises(ValueError, match='batch of 1'):
    overlay.groups(token_set([0, 1, 2, 3], slots=4), 1, (2, 2))


def test_outline_lies_inside_merged_groups_exactly_at_their_borders():
  labels = np.array([[0, 0, 1], [0, 2, 3]])
  merged = np.array([[True, True, False], [True, True, False]])
  mask = overlay.outline(labels, merged, cell=(4, 4), line=1)
  expected = [
      '.......#....',
      '.......#....',
      '.......#....',
      '...#####....',
      '...#####....',
      '...##..#....',
      '...##..#....',
      '...##..#....',
  ]
  assert [''.join('.#'[p] for p in row) for row in mask.astype(int)] == expected


def test_outline_is_as_wide_as_asked_and_absent_without_merging():
  labels = np.array([[0, 1]])
  mask = overlay.outline(labels, np.array([[True, False]]), cell=(1, 6), line=2)
  assert mask.astype(int).tolist() == [[0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]]
  assert not overlay.outline(labels, np.array([[False, False]]), cell=(6, 6)).any()


def test_composite_keeps_fills_outlines_and_fades():
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)
  labels = np.array([[0, 1, -1], [2, 1, -1]])
  merged = np.array([[False, True, False], [False, True, False]])
  found = overlay.composite(image, labels, merged, scale=3, line=1, hatch=6)
  assert found.shape == (24, 36, 3)
  assert found.dtype == np.uint8
  assert (found[:, :12] == image[:, :4].repeat(3, 0).repeat(3, 1)).all()
  # The group: one colour inside, one contrasting outline at both sides, none at top and bottom.
  inner, mean = found[:, 13:23], np.round(image[:, 4:8].reshape(-1, 3).mean(axis=0))
  assert (inner == mean).all()
  line = 255 if mean @ overlay.LUMA < 127.5 else 0
  assert (found[:, [12, 23]] == line).all()
  # Dropped: light, grey, hatched along anti-diagonals.
  gone = found[:, 24:]
  assert (gone == gone[..., :1]).all()
  hatched = np.add.outer(np.arange(24), np.arange(24, 36)) % 6 < 1
  assert (gone[hatched] == round(255 * 0.66)).all()
  assert (gone[~hatched] >= 204).all()


def test_composite_fills_scattered_members_with_their_common_mean():
  image = np.zeros((1, 4))
  image[0] = [0.0, 0.5, 0.7, 1.0]
  labels, merged = np.array([[5, 1, 2, 5]]), np.array([[True, False, False, True]])
  found = overlay.composite(image, labels, merged, scale=8, line=1)
  assert (found[:, :7] == 128).all()
  assert (found[:, 25:] == 128).all()
  assert (found[:, 8:16] == 128).all(), 'a patch alone keeps its own 0.5'
  assert (found[:, 16:24] == 178).all()


def test_composite_takes_grey_and_colour_alike_and_leaves_its_input_alone():
  grey = np.linspace(0, 1, 16).reshape(4, 4)
  before = grey.copy()
  labels, merged = np.array([[0, 0], [1, -1]]), np.array([[True, True], [False, False]])
  found = overlay.composite(grey, labels, merged, scale=4)
  assert (grey == before).all()
  assert (found == overlay.composite(grey[..., None].repeat(3, 2), labels, merged, scale=4)).all()


@pytest.mark.parametrize(('image', 'words'), [
    (np.full((4, 4), -1.0), 'before any normalising'),
    (np.zeros((5, 4)), 'does not divide into 2 x 2'),
    (np.zeros((4, 4, 2)), '1 or 3 channels'),
])
def test_composite_refuses_what_is_not_a_picture(image, words):
  labels = np.arange(4).reshape(2, 2)
  with pytest.raises(ValueError, match=words):
    overlay.composite(image, labels, np.zeros((2, 2), bool))


def cuts_of(step):
  """What two images look like after a cut in layers 1 and 2, made by the real reduction."""
  tokens = tk.TokenSet.create(jnp.zeros((2, 65, 1)), protected=1)
  cuts = {}
  for layer in (1, 2):
    tokens = tk.reduce(tokens, step(tokens, layer))
    cuts[layer] = tokens
  return cuts


def drop(tokens, layer):
  """Keeps the first slots of one image and the last of the other."""
  keep = 65 - 16 * layer
  first = jnp.arange(keep, dtype=jnp.int32)
  return assignments.Gather(jnp.stack([first, jnp.where(first, first + tokens.slots - keep, 0)]),
                            tokens.slots)


def join(tokens, layer):
  """Merges each of the last slots with the one before, rolled by one in the other image."""
  keep = 65 - 16 * layer
  slot = jnp.arange(tokens.slots, dtype=jnp.int32)
  dst = jnp.minimum(slot, keep - 1 - (slot % 3))
  first = jnp.broadcast_to(jnp.arange(keep, dtype=jnp.int32), (2, keep))
  return assignments.Merge.mean(first, jnp.stack([dst, jnp.roll(dst, 1)]), tokens.sizes)


def photos():
  rng = np.random.default_rng(1)
  return rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)


def find(pixels, image, state):
  """Where a figure shows an image in a state, pixel for pixel: [(y, x)].

  The outermost pixels are left out; the thin frame lies on them.
  """
  part = overlay.composite(image, state.labels, state.merged, scale=round(overlay.SIDE / 32),
                           line=overlay.LINE)[2:-2, 2:-2]
  high, wide = part.shape[:2]
  clue, places = part[high // 2].tobytes(), []
  for y in range(len(pixels) - high + 1):
    x = pixels[y + high // 2].tobytes().find(clue)
    while x >= 0:
      if (pixels[y:y + high, x // 3:x // 3 + wide] == part).all():
        places.append((y, x // 3))
      x = pixels[y + high // 2].tobytes().find(clue, x + 1)
  return places


@pytest.fixture
def small(monkeypatch):
  """Figures of images 128 pixels wide: quicker, by the same code."""
  monkeypatch.setattr(overlay, 'SIDE', 128)


def bytes_of(path):
  return np.ascontiguousarray(np.round(255 * picture(path)).astype(np.uint8))


@pytest.mark.long
def test_overlay_shows_each_image_layer_by_layer_pixel_for_pixel(tmp_path, small):
  images, cuts, places = photos(), cuts_of(join), {}
  path = overlay.overlay(images, cuts, (8, 8), tmp_path / 'new' / 'o.png', names=['a', 'bee'],
                         title='A title, longer than so narrow a figure would be without one, fits')
  pixels = bytes_of(path)
  for index, layer in itertools.product(range(2), (0, 1, 2)):
    state = overlay.groups(cuts[layer], index, (8, 8)) if layer else overlay.untouched(65, (8, 8))
    places[index, layer], = find(pixels, images[index], state)
  (top, left), (_, right) = places[0, 0], places[0, 1]
  (bottom, _), step = places[1, 0], places[0, 1][1] - left
  assert step > 32 * round(overlay.SIDE / 32)
  assert right == left + step
  assert places == {(index, layer): ((top, bottom)[index], left + layer * step)
                    for index, layer in places}
  edge = np.concatenate([pixels[:4].ravel(), pixels[-4:].ravel(), pixels[:, :4].ravel(),
                         pixels[:, -4:].ravel()])
  assert (edge == 255).all(), 'something is cut off at the edge'


@pytest.mark.long
def test_compare_draws_the_last_cut_where_a_method_has_none(tmp_path, small):
  image, grid = photos()[1], (8, 8)
  dropped, joined = cuts_of(drop), cuts_of(join)
  path = overlay.compare(image, {'drop': {1: dropped[1]}, 'join': joined, 'whole': {}}, grid,
                         tmp_path / 'c.png', index=1)
  pixels = bytes_of(path)
  gone = find(pixels, image, overlay.groups(dropped[1], 1, grid))
  assert len(gone) == 2, 'layer 2 still shows what layer 1 left'
  assert len({y for y, _ in gone}) == 1
  assert len(find(pixels, image, overlay.groups(joined[2], 1, grid))) == 1
  whole = find(pixels, image, overlay.untouched(65, grid))
  assert len(whole) == 3 + 2, 'three inputs, and the method that cuts nowhere'


def test_overlay_picks_six_layers_of_many_and_knows_which_there_are():
  many = dict.fromkeys(range(12))
  assert overlay._columns(many, None) == [0, 2, 4, 7, 9, 11]
  assert overlay._columns(dict.fromkeys((3, 6, 9)), None) == [3, 6, 9]
  assert overlay._columns(many, (5, 1)) == [5, 1]
  with pytest.raises(ValueError, match='layer 4: choose from 3, 6, 9'):
    overlay._columns(dict.fromkeys((3, 6, 9)), (4,))


def test_overlay_refuses_names_that_do_not_match(tmp_path):
  with pytest.raises(ValueError, match='1 names for 2 images'):
    overlay.overlay(photos(), {}, (8, 8), tmp_path / 'x.png', names=['a'])
