"""Files around a checkpoint that are not as they should be: one line with the file and the key."""

import json
import os
import pathlib

import pytest
from helpers.errors import said

from lib.data import anyres, preprocess, tokenizers
from lib.data.tokenizers import Chat, HubTokenizer, TextTowerTokenizer
from models.checkpoints import json_files

FOLDER = pathlib.Path(__file__).parents[1] / 'fixtures' / 'parity_vlm'
STEPS = json.loads((FOLDER / 'preprocess.json').read_text())
TOKENIZER = json.loads((FOLDER / 'chat' / 'tokenizer.json').read_text())
NAN, INFINITY = float('nan'), float('inf')


def pipe(path):
  os.mkfifo(path)


def sparse(path):
  with path.open('wb') as file:
    file.truncate(1 << 30)


# How a file may be no file of JSON: what makes it, what is said of it.
NO_JSON = {
    'pipe': (pipe, 'is no regular file'),
    'folder': (pathlib.Path.mkdir, 'is no regular file'),
    'device': (lambda path: path.symlink_to('/dev/zero'), 'is no regular file'),
    'dangling': (lambda path: path.symlink_to('nowhere'), 'is no regular file'),
    'loop': (lambda path: path.symlink_to(path.name), 'is no regular file'),
    'huge': (sparse, 'has more than 64 MB'),
    'empty': (lambda path: path.write_bytes(b''), 'is no valid JSON (Expecting value'),
    'cut': (lambda path: path.write_bytes(b'{"a": [1, 2'), 'is no valid JSON (Expecting'),
    'latin': (lambda path: path.write_bytes(b'{"a": "\xe9"}'), 'is no text in UTF-8'),
    'utf16': (lambda path: path.write_bytes('{"a": 1}'.encode('utf-16')), 'is no text in UTF-8'),
    'zeros': (lambda path: path.write_bytes(b'\0' * 99), 'is no valid JSON'),
    'deep': (lambda path: path.write_bytes(b'[' * 99999), 'is no valid JSON (maximum recursion'),
    'digits': (lambda path: path.write_bytes(b'9' * 9999), 'is no valid JSON (Exceeds the limit'),
    'nan': (lambda path: path.write_bytes(b'{"a": NaN}'), 'is no valid JSON (NaN is no number'),
    'twice': (lambda path: path.write_bytes(b'{"a": 1, "a": 2}'), "the key 'a' is given twice"),
    'list': (lambda path: path.write_bytes(b'[{"a": 1}]'), "holds [{'a': 1}], and an object"),
    'text': (lambda path: path.write_bytes(b'"a"'), "holds 'a', and an object with keys"),
    'null': (lambda path: path.write_bytes(b'null'), 'holds None, and an object with keys'),
}
READERS = {
    'tokenizer_config.json': Chat.of, 'chat_template.json': Chat.of,
    'preprocessor_config.json': preprocess.read, 'processor_config.json': preprocess.read}


@pytest.mark.parametrize('kind', NO_JSON)
@pytest.mark.parametrize('file', READERS)
def test_files_that_hold_no_object(file, kind, tmp_path):
  make, message = NO_JSON[kind]
  make(tmp_path / file)
  text = said(READERS[file], tmp_path)
  assert f'{tmp_path / file} ' in text
  assert message in text


@pytest.mark.parametrize('kind', [
    'pipe', 'folder', 'device', 'dangling', 'loop', 'huge', 'latin', 'utf16'])
@pytest.mark.parametrize(('file', 'reader'), [
    ('chat_template.jinja', Chat.of), ('tokenizer.json', HubTokenizer.of),
    ('tokenizer.json', lambda folder: TextTowerTokenizer(folder, context=4))])
def test_files_that_hold_no_text(file, reader, kind, tmp_path):
  make, message = NO_JSON[kind]
  make(tmp_path / file)
  assert f'{tmp_path / file} {message}' in said(reader, tmp_path)


def test_files_that_may_not_be_read(tmp_path, monkeypatch):
  def refuse(self, mode):
    raise PermissionError(13, 'Permission denied', str(self))

  (tmp_path / 'tokenizer_config.json').write_text('{}')
  monkeypatch.setattr(pathlib.Path, 'open', refuse)
  with pytest.raises(PermissionError, match=r'tokenizer_config\.json'):
    Chat.of(tmp_path)


def test_a_mark_at_the_beginning_and_odd_letters_are_no_fault(tmp_path):
  (tmp_path / 'tokenizer_config.json').write_bytes(
      '\ufeff{"bos_token": "é", "chat_template": "{{ bos_token }}"}'.encode())
  assert Chat.of(tmp_path)([]) == 'é'
  with pytest.raises(FileNotFoundError):
    json_files.read_json(tmp_path / 'none.json')


# Tokenizers.


def added(**changes):
  return TOKENIZER | {'added_tokens': [TOKENIZER['added_tokens'][0] | changes]}


def model(**changes):
  return TOKENIZER | {'model': TOKENIZER['model'] | changes}


@pytest.mark.parametrize('content', [
    '', '{', '[]', 'null', '[' * 9999, json.dumps(TOKENIZER)[:-99], {},
    {key: value for key, value in TOKENIZER.items() if key != 'model'}, TOKENIZER | {'version': 3},
    TOKENIZER | {'model': None}, model(type='Neural'), model(vocab=['a']), model(vocab={'a': '4'}),
    model(vocab={'a': -1}), model(vocab={'a': 2 ** 40}), added(id=-1), added(id='1'),
    added(content=3), TOKENIZER | {'added_tokens': {}},
    model(type='BPE', vocab={'a': 0}, merges=['a b']),
    model(type='BPE', vocab={'a': 0}, merges=['a']),
    TOKENIZER | {'pre_tokenizer': {'type': 'Split', 'pattern': {'Regex': '(a'},
                                   'behavior': 'Isolated', 'invert': False}},
    # These two are panics of the library, not errors.
    TOKENIZER | {'normalizer': {'type': 'Precompiled', 'precompiled_charsmap': 'AAAA'}},
    TOKENIZER | {'post_processor': TOKENIZER['post_processor'] | {'special_tokens': {}}},
    TOKENIZER | {'decoder': {'type': 'Magic'}}], ids=lambda content: str(content)[-40:])
def test_tokenizers_that_are_none(content, tmp_path, capfd):
  path = tmp_path / 'tokenizer.json'
  path.write_text(content if isinstance(content, str) else json.dumps(content))
  for reader in (HubTokenizer.of, lambda folder: TextTowerTokenizer(folder, context=4)):
    text = said(reader, tmp_path)
    assert text.startswith(f'{path} is no tokenizer that can be read (')
    assert text.endswith('): fetch it again')
  assert capfd.readouterr().err == ''


def test_texts_that_a_tokenizer_cannot_read():
  made = HubTokenizer(json.dumps(TOKENIZER))
  assert said(made.encode, 'a \ud800 cat', special=True) == (
      "the text has half a character, '\\ud800': give whole ones, in UTF-8")
  known = HubTokenizer(json.dumps(model(unk_token='nothing')), 'here')
  assert known.encode('a cat', special=False) == [4, 5]
  assert 'here cannot read this text (WordLevel error: Missing [UNK] token' in said(
      known.encode, 'a dog', special=False)
  # The library's regular expressions give up after so many steps.
  endless = {'type': 'Split', 'pattern': {'Regex': '(a|aa|a+)+$'}, 'behavior': 'Isolated',
             'invert': False}
  made = HubTokenizer(json.dumps(TOKENIZER | {'pre_tokenizer': endless}))
  assert 'retry-limit-in-match' in said(made.encode, 'a' * 40 + '!', special=False)


@pytest.mark.parametrize(('settings', 'message'), [
    ({'add_bos_token': 'yes'}, "add_bos_token='yes' must be True or False"),
    ({'padding_side': 'middle'}, "padding_side='middle' is unknown: choose one of left, right"),
    ({'padding_side': ['left']}, "padding_side=['left'] must be text"),
    ({'pad_token': 3}, 'pad_token=3 must be text or a dict of keys'),
    ({'add_eos_token': True}, 'says add_eos_token, and names no eos_token that'),
    ({'add_bos_token': True, 'bos_token': '<other>'}, 'says add_bos_token, and names no')],
    ids=lambda value: str(value)[:40])
def test_settings_of_a_tokenizer_of_another_form(settings, message, tmp_path):
  (tmp_path / 'tokenizer.json').write_text(json.dumps(TOKENIZER))
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
  text = said(lambda: TextTowerTokenizer(tmp_path, context=1)(['']))
  assert message in text
  assert 'tokenizer_config.json' in text


def test_special_tokens_of_a_text_are_its_letters():
  made = HubTokenizer(json.dumps(TOKENIZER))
  wanted = made.encode('a < / s > cat', special=True)
  for text in ('a</s>cat', 'a </s> cat', f'a {tokenizers.ESCAPE}</s> cat'):
    ids = made.encode(made.literal(text), special=True)
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 1, 0)
    assert (ids[:2], ids[-1]) == (wanted[:2], wanted[-1])
  # Those that a template writes around it are special, and nothing else changes.
  text = '<s>a<image>' + made.literal('<image> cat</s><s>') + '</s>'
  ids = made.encode(text, special=False)
  assert (ids[:3], ids[-1], ids.count(3), ids.count(2), ids.count(1)) == ([1, 4, 3], 2, 1, 1, 1)
  assert made.literal('a cat, <of words> \\') == 'a cat, <of words> \\'
  # Where one special token is within another, neither is left.
  both = TOKENIZER | {'added_tokens': [*TOKENIZER['added_tokens'], TOKENIZER['added_tokens'][2]
                                       | {'id': 12, 'content': '[</s>]'}]}
  both['model'] = TOKENIZER['model'] | {'vocab': TOKENIZER['model']['vocab'] | {'[</s>]': 12}}
  made = HubTokenizer(json.dumps(both))
  assert made.encode('[</s>]</s>', special=False) == [12, 2]
  assert not {12, 2} & set(made.encode(made.literal('[</s>]</s>[</s>'), special=False))
  assert made.encode(made.literal('[</s>]') + '[</s>]', special=False)[-1] == 12


# Steps of images.


def step(name='llava_next', **changes):
  return {key: value for key, value in (STEPS[name] | changes).items() if value != 'missing'}


SIDE = 'a whole number from 1 to 16384 pixels'
SIDES = f'must be {SIDE} or a dict of keys, each {SIDE}'
THREE = 'must be a tuple of 3, each a number from 0 to 255'


@pytest.mark.parametrize(('changes', 'message'), [
    ({'do_resize': 'false'}, "do_resize='false' must be True or False"),
    ({'do_normalize': 1}, 'do_normalize=1 must be True or False'),
    ({'do_center_crop': []}, 'do_center_crop=[] must be True or False'),
    ({'size': 'missing'}, f'size is missing: it {SIDES}'), ({'size': None}, 'size is missing'),
    ({'size': 0}, f'size=0 {SIDES}'), ({'size': -16}, f'size=-16 {SIDES}'),
    ({'size': '16'}, f"size='16' {SIDES}"), ({'size': 16.0}, f'size=16.0 {SIDES}'),
    ({'size': True}, f'size=True {SIDES}'), ({'size': 10 ** 9}, SIDES),
    ({'size': [16, 16]}, f'size=[16, 16] {SIDES}'), ({'size': {}}, 'size={} is unknown'),
    ({'size': {'height': 16}}, 'is unknown: give height and width'),
    ({'size': {'shortest_edge': -1}}, SIDES),
    ({'size': {'height': '16', 'width': 16}}, SIDES),
    ({'crop_size': 'missing'}, 'crop_size is missing'),
    ({'crop_size': {'height': 16}}, 'width is missing: it must be a whole number'),
    ({'crop_size': {'height': 0, 'width': 16}}, SIDES),
    ({'rescale_factor': 0}, 'rescale_factor=0 must be above 0 and at most 1'),
    ({'rescale_factor': 255}, 'rescale_factor=255 must be above 0 and at most 1'),
    ({'rescale_factor': '1/255'}, "rescale_factor='1/255' must be a number"),
    ({'rescale_factor': 10 ** 400}, 'must be finite'),
    ({'image_mean': 'missing'}, f'image_mean is missing: it {THREE}'),
    ({'image_mean': [0.5]}, f'image_mean=[0.5] {THREE}'),
    ({'image_mean': 0.5}, f'image_mean=0.5 {THREE}'),
    ({'image_mean': [0.5, 0.5, NAN]}, 'image_mean[2]=nan must be finite'),
    ({'image_mean': [0.5, '0.5', 0.5]}, "image_mean[1]='0.5' must be a number"),
    ({'image_mean': [0.5, 0.5, 1e9]}, 'image_mean[2]=1000000000.0 must be from 0 to 255'),
    ({'image_mean': [0.5, 0.5, -0.5]}, 'image_mean[2]=-0.5 must be from 0 to 255'),
    ({'image_std': [0.5, 0.5, 0]}, 'image_std[2]=0 must be above 0 and at most 255'),
    ({'image_std': [0.5, 0.5, INFINITY]}, 'image_std[2]=inf must be finite'),
    ({'resample': 9}, 'resample=9 is unknown: choose one of 0 (NEAREST)'),
    ({'resample': 'bicubic'}, "resample='bicubic' is unknown"),
    ({'resample': True}, 'resample=True is unknown'), ({'resample': [3]}, 'resample=[3] is'),
    ({'image_grid_pinpoints': '(1x1)'},
     f"image_grid_pinpoints='(1x1)' must be a tuple, each a tuple of 2, each {SIDE}"),
    ({'image_grid_pinpoints': [[16, '32']]}, "pinpoints[0][1]='32' must be a whole number"),
    ({'image_grid_pinpoints': [16, 32]}, f'pinpoints[0]=16 must be a tuple of 2, each {SIDE}'),
    ({'image_grid_pinpoints': [[16, 32, 48]]}, f'[16, 32, 48] must be a tuple of 2, each {SIDE}'),
    ({'image_grid_pinpoints': [[0, 16]]}, 'pinpoints[0][0]=0 must be from 1 to 16384 pixels'),
    ({'image_grid_pinpoints': [[16, 24]]}, '(16, 24), and a crop is 16 pixels wide: give')],
    ids=lambda value: str(value)[:50])
def test_steps_of_another_form(changes, message, tmp_path):
  path = tmp_path / 'preprocessor_config.json'
  config = {'model_type': 'llava_next', 'vision_config': {'image_size': 16, 'patch_size': 4}}
  assert message in said(anyres.from_config, step(**changes), config)
  path.write_text(json.dumps(step(**changes)))
  text = said(anyres.read, tmp_path, config)
  if 'NaN' in text or 'Infinity' in text:
    message = 'is no number of JSON'
  else:
    assert text.startswith(f'{path}: ')
  assert message in text


@pytest.mark.parametrize(('changes', 'message'), [
    ({'patch_size': 0}, 'patch_size=0 must be from 1 to 256'),
    ({'merge_size': '2'}, "merge_size='2' must be a whole number"),
    ({'patch_size': 5}, 'patch_size=5 differs from vision_config.patch_size=4 in config.json'),
    ({'temporal_patch_size': 1}, 'differs from vision_config.temporal_patch_size=2'),
    ({'min_pixels': -1}, 'min_pixels=-1 must be from 1 to 16777216'),
    ({'max_pixels': 10 ** 12}, 'max_pixels=1000000000000 must be from 1 to 16777216'),
    ({'size': {'shortest_edge': 'a'}}, "shortest_edge='a' must be a whole number"),
    ({'size': 16}, 'size=16 must be a dict of keys'),
    ({'size': {'shortest': 256}}, "size has no key 'shortest' (did you mean 'shortest_edge'?)"),
    ({'do_resize': 'no'}, "do_resize='no' must be True or False"),
    ({'min_pixels': 1700}, 'images have at least 1700 and at most 1600 pixels')],
    ids=lambda value: str(value)[:40])
def test_steps_of_patches_of_another_form(changes, message):
  config = {'model_type': 'qwen2_vl',
            'vision_config': {'patch_size': 4, 'temporal_patch_size': 2, 'spatial_merge_size': 2}}
  made = anyres.from_config(step('qwen2_vl'), config)
  assert made == anyres.from_config(
      step('qwen2_vl', size={'min_pixels': 256, 'max_pixels': 1600}), config)
  assert message in said(anyres.from_config, step('qwen2_vl', **changes), config)


def test_steps_inside_the_file_of_a_whole_processor(tmp_path):
  """As newer releases save them; older files beside it are older."""
  wanted = preprocess.from_config(STEPS['llava_pad'])
  path = tmp_path / 'processor_config.json'
  path.write_text(json.dumps({'image_processor': STEPS['llava_pad'], 'patch_size': 4}))
  assert preprocess.read(tmp_path) == wanted
  (tmp_path / 'preprocessor_config.json').write_text(json.dumps(STEPS['llava_next'] | {'size': 9}))
  assert preprocess.read(tmp_path) == wanted
  path.write_text(json.dumps({'patch_size': 4}))
  assert preprocess.read(tmp_path).size == (9, 9)
  path.write_text(json.dumps({'image_processor': 'LlavaImageProcessor'}))
  assert said(preprocess.read, tmp_path).startswith(
      f"{path}: image_processor='LlavaImageProcessor' must be a dict of keys")
