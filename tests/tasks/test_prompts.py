"""What people write and show: prompts that end no turn and show no image by themselves."""

import dataclasses
import json
import pathlib
import shutil

import pytest
from absl import flags
from absl.testing import flagsaver
from helpers import assistants
from helpers.errors import said

from adapters.answerer import Settings, read_reductions, whole_numbers
from configs import digits
from lib import assistant, notebook
from lib.data import prepare
from lib.data.tokenizers import Chat, HubTokenizer, WordTokenizer
from tools import generate

BOS, END, IMAGE = 1, 2, 30
# The model's own template, one that passes over plain texts, and one that passes over everything.
PARTS = ("{{ bos_token }}{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}"
         "<image>{% else %}{{ part['text'] }} {% endif %}{% endfor %}{{ eos_token }}")


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  return {name: assistants.checkpoint(tmp_path_factory.mktemp('models') / name, name)
          for name in ('llava', 'qwen3')}


@pytest.fixture(scope='module')
def llava(folders):
  return assistant.load(folders['llava'])


@pytest.fixture(scope='module')
def text_model(folders):
  return assistant.load(folders['qwen3'])


def counts(ids):
  return ids.count(BOS), ids.count(END), ids.count(IMAGE)


@pytest.mark.parametrize('text', [
    'w5 </s> w6', '</s>', '<s></s><s>', 'w5</s>w6', '<unk>', '<assistant></s>w5', '</s', '<</s>>',
    'w5 \U0010fffd</s>', '\U0010fffd', 'w5\0w6', ' w5 ', '\n\n', '', 'é\U0001f408' * 9,
    'w5 ' * 5000])
def test_texts_end_no_turn_and_start_none(text, llava, text_model):
  for model, images in ((text_model, 0), (llava, 0), (llava, 2)):
    # The template's own: one at the start, one at the end of the turn.
    ids = model.prompt(text, images=images)
    assert counts(ids) == (1, 1, images)
    assert ids[0] == BOS
    # Without a template they start once, and end nowhere.
    bare = dataclasses.replace(model, chat=None)
    assert counts(bare.prompt(text, images=images)) == (1, 0, images)


def test_whoever_writes_the_whole_prompt_writes_special_tokens_too(llava, text_model):
  for model in (llava, text_model):
    assert model.prompt('<s>w5</s><s> w6', template=False) == [BOS, 5, END, BOS, 6]


def test_letters_around_special_tokens_are_read_as_ever(text_model):
  plain = text_model.prompt('w5 w6')
  ids = text_model.prompt('w5 </s> w6')
  assert [each for each in ids if each] == [each for each in plain if each]


@pytest.mark.parametrize(('text', 'images', 'found'), [
    ('<image>', 0, 1), ('<image> w5', 2, 1), ('<image><image>', 1, 2), ('w5<image>', 3, 1)])
def test_marks_of_images_are_as_many_as_images(text, images, found, llava, text_model):
  for template in (True, False):
    assert said(llava.prompt, text, images=images, template=template) == (
        f'the text has {found} <image> and {images} images are given: write one for each image, or '
        'none to put the images in front')
  # To a model of text it is a text.
  ids = text_model.prompt('<image>')
  assert counts(ids)[:2] == (1, 1)
  assert 'reads text alone' in said(text_model.prompt, text, images=1)


def test_images_stand_where_their_own_placeholder_is(llava, folders, tmp_path):
  assert llava.prompt('w5 <image> w6', images=1)[-8:-5] == [5, IMAGE, 6]
  for file in ('tokenizer.json', 'chat_template.jinja', 'tokenizer_config.json'):
    (tmp_path / file).write_text(
        (folders['llava'] / file).read_text().replace('<image>', '<|image_pad|>'))
  qwen = dataclasses.replace(llava, tokens=HubTokenizer.of(tmp_path), chat=Chat.of(tmp_path))
  for mark in ('<image>', '<|image_pad|>'):
    assert counts(qwen.prompt(f'w5 {mark} w6', images=1)) == (1, 1, 1)
    ids = qwen.prompt(f'w5 {mark} w6', images=1, template=False)
    assert ids == [BOS, 5, IMAGE, 6]
  # Another number than images: text, which shows none.
  assert counts(qwen.prompt('w5 <|image_pad|> w6', images=0))[2] == 0
  assert counts(qwen.prompt('<|image_pad|> w6 <|image_pad|>', images=1))[2] == 1


def test_templates_that_read_parts_alone_get_parts(llava, tmp_path):
  def model(source):
    (tmp_path / 'chat_template.jinja').write_text(source)
    shutil.copy(assistants.CHAT / 'tokenizer_config.json', tmp_path)
    return dataclasses.replace(llava, chat=Chat.of(tmp_path))

  parts = model(PARTS)
  assert parts.prompt('w5 w6') == [BOS, 5, 6, END]
  assert parts.prompt('w5 <image> w6', images=1) == [BOS, 5, IMAGE, 6, END]
  deaf = model('{{ bos_token }} w7')
  for images in (0, 1):
    assert said(deaf.prompt, 'w5', images=images).startswith(
        'the chat template leaves out what is asked: write the whole prompt by hand')


def test_half_characters(llava, text_model):
  for model in (llava, text_model):
    for template in (True, False):
      assert 'the text has half a character' in said(model.prompt, 'w5 \udcff', template=template)


def test_marks_of_a_set_are_no_words():
  words = WordTokenizer(('<pad>', 'row', '<end>'), (0, 2))
  assert words.encode(words.literal('row row')) == [1, 1]
  for mark in ('<pad>', '<end>'):
    assert said(words.encode, f'row {mark}') == (
        f'{mark!r} is no word of a text, but a mark of this model: leave it out')
  assert [words.token(number) for number in (1, 2)] == ['row', '<end>']


# What ends an answer.


@pytest.mark.parametrize('ends', ['2', [2, '3'], [[2]], 2.0, True, {'a': 2}, [None]], ids=repr)
@pytest.mark.parametrize('file', ['generation_config.json', 'config.json'])
def test_end_tokens_of_another_form(file, ends, folders, tmp_path):
  shutil.copytree(folders['qwen3'], tmp_path, dirs_exist_ok=True)
  (tmp_path / 'generation_config.json').write_text('{"eos_token_id": null, "top_k": "what?"}')
  content = json.loads((tmp_path / file).read_text()) | {'eos_token_id': ends}
  (tmp_path / file).write_text(json.dumps(content))
  assert said(assistant.load, tmp_path) == (
      f'{tmp_path / file}: eos_token_id={ends!r} must be a whole number or a tuple, each a whole '
      'number')


@pytest.mark.parametrize('ends', [-1, 2 ** 40, [2, 999]], ids=repr)
def test_end_tokens_that_the_model_does_not_have(ends, folders, tmp_path):
  shutil.copytree(folders['qwen3'], tmp_path, dirs_exist_ok=True)
  (tmp_path / 'generation_config.json').write_text(json.dumps({'eos_token_id': ends}))
  assert 'is no id of the model' in said(assistant.load, tmp_path)


def test_ids_far_beyond_the_model_are_found_at_once(text_model):
  class Far:
    size = 2 ** 40

  assert f'has ids up to {2 ** 40 - 1}' in said(assistant.check_tokens, Far(), text_model.model, ())


# Flags and arguments.


def asked(**given):
  flags.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver(**given):
    return generate.read_question(None)


def test_prompts_that_are_none(tmp_path):
  path = tmp_path / 'prompt.txt'
  for text in ('', ' ', '\n\t'):
    path.write_text(text)
    assert said(asked, prompt=text) == said(asked, prompt_file=str(path)) == (
        'nothing to ask: the prompt is empty')
  assert 'give --prompt, --prompt_file or --example, one of them' in said(asked)
  assert 'one of them' in said(asked, prompt='a', prompt_file='b')
  path.write_bytes(b'\xff')
  assert f'{path} is no text in UTF-8' in said(asked, prompt_file=str(path))
  assert f'{tmp_path} is no regular file' in said(asked, prompt_file=str(tmp_path))
  with pytest.raises(FileNotFoundError):
    asked(prompt_file=str(tmp_path / 'none'))


@pytest.mark.parametrize('seed', [2 ** 70, 2 ** 31, -2 ** 31 - 1])
def test_seeds_of_more_than_32_bits(seed, text_model):
  generator = text_model.generator()
  for seeds in (seed, [seed]):
    assert said(lambda seeds=seeds: next(generator.stream([[1]], new_tokens=1, seeds=seeds))) == (
        f'seed={seed} is impossible: give a whole number of 32 bits')


@pytest.mark.parametrize('value', [0, -1, '0', '64:-1', 'a', '', None, 1.5, '64,256', [[1]], True],
                         ids=repr)
def test_numbers_of_harnesses_that_are_none(value):
  assert said(whole_numbers, value, 'batch_size').startswith(
      f'batch_size={value!r} is impossible: give whole numbers from 1 on')
  assert whole_numbers('64:256', 'buckets') == (64, 256)
  assert whole_numbers(8, 'batch_size') == whole_numbers('8', 'batch_size') == (8,)


@pytest.mark.parametrize('text', ['{', '[1]', 'fastv', '(' * 9999, '{"language": 3}', '3',
                                  '{[]: 1}'], ids=lambda text: text[:9])
def test_reductions_of_harnesses_that_are_none(text, tmp_path):
  assert said(read_reductions, text).startswith('reduce=')
  path = tmp_path / 'reduce.json'
  path.write_text(text)
  assert said(read_reductions, str(path))
  assert Settings.of({'until': ['', 'stop']}, new_tokens=1).until == ('stop',)


# A run of somebody else.


@pytest.mark.parametrize(('stated', 'stored', 'wanted'), [
    ('', False, ''), ('data', False, 'data'), ('chosen', False, 'data'), ('chosen', True, 'chosen'),
    ('../up', False, 'data'), ('~/set', False, 'data')])
def test_a_run_does_not_decide_where_sets_are_written(stated, stored, wanted, tmp_path,
                                                      monkeypatch):
  monkeypatch.chdir(tmp_path)
  if stored:
    info = pathlib.Path(stated, 'digits', str(prepare.BUNDLED['digits'].VERSION),
                        'dataset_info.json')
    monkeypatch.setattr(prepare, '_is_prepared',
                        lambda builder: builder.data_path / 'dataset_info.json' == info)
  data = {'name': 'digits', 'data_dir': stated}
  assert prepare.data_dir_of_run(data) == wanted
  assert prepare.data_dir_of_run(data | {'name': 'digits/no such'}) in ('', 'data')
  assert not list(tmp_path.iterdir())
  assert 'name is missing' in said(prepare.data_dir_of_run, {'data_dir': stated})
  assert 'data_dir=3 must be text' in said(prepare.data_dir_of_run, data | {'data_dir': 3})


def test_a_run_of_images_reads_its_own_weights_alone(tmp_path, monkeypatch):
  seen = []
  monkeypatch.setattr(notebook.image_sweep, 'load',
                      lambda config, path, mesh: seen.append(config) or (1, {}))
  config = digits.get_config()
  config.model.weights, config.data.data_dir = 'somebody/else', str(tmp_path / 'chosen')
  (tmp_path / 'config.json').write_text(config.to_json_best_effort())
  notebook.load(tmp_path)
  notebook.load(tmp_path, data_dir='mine')
  assert [(config.data.data_dir, config.model.weights) for config in seen] == [
      ('data', ''), ('mine', '')]
  assert not (tmp_path / 'chosen').exists()
