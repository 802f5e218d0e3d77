"""Files around weights, chat templates and prompts that no model can be asked with."""

from __future__ import annotations

import functools
import json
import pathlib
import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

from fuzz.case import (
    DAMAGE,
    INFINITY,
    JSON_DAMAGE,
    NAN,
    Case,
    bad_values,
    changed,
    copied,
    once,
    shown,
    write_json,
)

# Keys that nothing here reads, and values that make sense after all.
UNREAD = {
    'tokenizer_config.json': ('backend', 'model_max_length', 'tokenizer_class',
                              'extra_special_tokens'),
    'preprocessor_config.json': ('image_processor_type', 'do_pad', 'do_convert_rgb'),
    # The package that reads it tells post processors apart by their other keys.
    'tokenizer.json': ('version', 'post_processor')}
# A template's texts need be no tokens.
FINE: dict[str, tuple[Any, ...]] = {
    **{f'{name}_token': ('no such thing', '\ud800') for name in ('bos', 'eos', 'unk')},
    'eos_token_id': (5,)}
FILES = ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json',
         'preprocessor_config.json')


def folder_of(name: str, folder: pathlib.Path) -> pathlib.Path:
  """Writes a tiny checkpoint with all its files; returns its folder."""
  from helpers import assistants
  return assistants.checkpoint(folder / name, name)


def source(name: str, shared: pathlib.Path) -> pathlib.Path:
  """Returns the folder of a tiny checkpoint."""
  return once(shared / f'folder_{name}', functools.partial(folder_of, name)) / name


def ask(folder: pathlib.Path, text: str = 'w5 w6', images: int = 1) -> None:
  """Loads a model, and makes a prompt and its images."""
  from PIL import Image

  from lib import assistant
  model = assistant.load(folder)
  model.prompt(text, images=images)
  if images:
    model.encode_images([[Image.new('RGB', (20, 30))]])


def with_file(name: str, file: str, change: Callable[[pathlib.Path], Any], folder: pathlib.Path,
              shared: pathlib.Path) -> None:
  """Asks a tiny checkpoint, one of whose files is changed."""
  place = copied(source(name, shared), folder)
  change(place / file)
  ask(place, images=int('llava' in name or 'vl' in name))


def merged(change: Mapping[str, Any]) -> Callable[[pathlib.Path], None]:
  """Returns the change of keys of a JSON file."""
  return lambda path: write_json(path, json.loads(path.read_text()) | change)


def contents() -> dict[str, Any]:
  """Returns what the JSON files of a tiny checkpoint hold."""
  from helpers import assistants
  return {'preprocessor_config.json': assistants.STEPS[assistants.STEPS_OF['llava']],
          'generation_config.json': {'eos_token_id': [2]},
          **{file: json.loads((assistants.CHAT / file).read_text())
             for file in ('tokenizer.json', 'tokenizer_config.json')}}


def beside_weights() -> Iterator[Case]:
  """Yields cases of the files around weights."""
  for name in ('llava', 'qwen2_vl', 'llava_next'):
    yield Case(name, functools.partial(with_file, name, 'config.json', lambda path: None),
               fine=True)
  for file in FILES:
    for how, damage in (DAMAGE | JSON_DAMAGE).items():
      if not (file == 'generation_config.json' and how == 'twice'):
        yield Case(f'{file}: {how}', functools.partial(
            with_file, 'llava', file, functools.partial(damage, rng=random.Random(0))),
            says=(file,))
  for how in ('overwritten', 'folder', 'pipe', 'device', 'dangling'):
    yield Case(f'chat_template.jinja: {how}', functools.partial(
        with_file, 'llava', 'chat_template.jinja',
        functools.partial(DAMAGE[how], rng=random.Random(0))), says=('chat_template.jinja',))
  for file, content in contents().items():
    for path, value in bad_values(content):
      fine = any(value == each and type(value) is type(each) for each in FINE.get(path[-1], ()))
      if path[0] not in UNREAD.get(file, ()) and not fine:
        top = changed(content, path, value)[path[0]]
        yield Case(f'{file}: {".".join(path)}={shown(value)}', functools.partial(
            with_file, 'llava', file, merged({path[0]: top})),
            says=(file, path[0], path[-1], 'half a character'))
  for path, value in bad_values({'min_pixels': 16, 'max_pixels': 256, 'patch_size': 4,
                                 'temporal_patch_size': 2, 'merge_size': 2}):
    yield Case(f'qwen2_vl: {path[0]}={shown(value)}', functools.partial(
        with_file, 'qwen2_vl', 'preprocessor_config.json', merged({path[0]: value})),
        says=(path[0], 'preprocessor_config.json'))
  for value in (3, 'abc', [[]], [['a', 'b']], [[0, 16]], [[-16, 16]], [[16]], [[NAN, 16]], {}):
    yield Case(f'llava_next: image_grid_pinpoints={shown(value)}', functools.partial(
        with_file, 'llava_next', 'preprocessor_config.json',
        merged({'image_grid_pinpoints': value})),
        says=('image_grid_pinpoints', 'preprocessor_config.json'))


# Templates.

CONTENT = "messages[0]['content']"
# What reaches out of a sandbox begins with one of these.
INSIDE = ('__class__', '__mro__', '__subclasses__', '__globals__', '__init__', '__builtins__',
          '__code__', '__dict__', '__import__', '__reduce__')
OBJECTS = ("''", '[]', 'messages', 'namespace', 'range', 'cycler', 'raise_exception', 'self',
           'joiner', 'lipsum')
ENDLESS = {
    'loop': '{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}',
    'itself': '{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}',
    'digits': '{{ (9**99999)|string }}',
    'letters': "{{ 'a' * 10**10 }}", 'list': '{{ [0] * 10**10 }}',
    'sums': '{% set ns = namespace(a="a") %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}'
            '{% endfor %}{{ ns.a }}',
    'format': "{{ '%1000000000000d' % 1 }}", 'width': "{{ '{:>10000000000}'.format(1) }}",
    'range': '{{ range(10**10)|list }}', 'constant': "{{ ('a' * 10**9) * 10**3 }}",
    'pairs': '{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}'
             '{% endfor %}',
    'expression': '{{ ((((((2**31)**31)**31)**31)**31)**31) }}',
    'batch': '{{ range(99999)|batch(1)|map("list")|list|length * "a" * 10**9 }}',
    'centre': '{{ "a"|center(10**10) }}', 'indent': '{{ "a\\n"|indent(10**10, true) }}'}
FAILING = {
    'refuses': "{{ raise_exception('no') }}", 'divides': '{{ 1 / 0 }}',
    'type': "{{ 'a' + 1 }}", 'key': "{{ messages[0]['no']['such'] }}",
    'index': '{{ messages[9].a.b }}',
    'nothing': '{{ nothing.at.all }}', 'calls': '{{ nothing() }}', 'filter': '{{ 1|no_such }}',
    'test': '{{ 1 is no_such }}', 'json': '{{ namespace|tojson }}', 'open': '{{ messages',
    'tag': '{% for m in messages %}', 'end': '{% endfor %}', 'unknown tag': '{% call_me %}',
    'include': "{% include '/etc/passwd' %}", 'import': "{% import 'os' as os %}",
    'extends': "{% extends 'a' %}", 'assign': '{% set messages[0] = 1 %}',
    'append': '{{ messages.append(1) }}', 'pop': '{{ messages.pop() }}', 'deep': '{{ ' + '(' * 5000,
    'strftime': "{{ strftime_now(3) }}",
    'unpack': '{% for a, b in [1] %}{% endfor %}', 'int': "{{ 'a'|int(default='b') + 1 }}"}


def with_template(template: str, folder: pathlib.Path, shared: pathlib.Path) -> None:
  """Asks a tiny checkpoint that comes with a template; it gets little time."""
  from lib.data import templates
  with mock.patch.object(templates, 'SECONDS', 0.5):
    with_file('llava', 'chat_template.jinja', lambda path: path.write_text(template), folder,
              shared)


def template_cases() -> Iterator[Case]:
  """Yields cases of chat templates."""
  rng = random.Random(6)
  real = (pathlib.Path(__file__).parents[1] / 'fixtures' / 'parity_vlm' / 'chat'
          / 'chat_template.jinja').read_text()
  yield Case('the real one', functools.partial(with_template, real), fine=True)
  openings = [place for place in range(len(real)) if real[place:place + 2] in ('{{', '{%')]
  # A block that opens as text leaves its end alone.
  blocks = [found.start() for found in re.finditer('{%-? *(for|if)', real)]
  for place in rng.sample(openings, 12):
    yield Case(f'cut behind letter {place + 4}', functools.partial(with_template, real[:place + 4]),
               says=('template',))
  for place in blocks:
    yield Case(f'without letters from {place}', functools.partial(
        with_template, real[:place + 1] + real[place + 2:]), says=('template',))
  # What the sandbox hides is printed as nothing; nobody gets through it.
  for thing in OBJECTS:
    for first in rng.sample(INSIDE, 3):
      form = rng.choice(['{0}.{1}()', "{0}['{1}'].a", "({0}|attr('{1}')).a", '{0}.{1}[0].a'])
      inside = form.format(thing, first)
      yield Case(inside, functools.partial(with_template, f'{real}{{{{ {inside} }}}}'),
                 says=('template',))
  for how, template in (ENDLESS | FAILING).items():
    yield Case(how, functools.partial(with_template, real + template), says=('template',))


# Prompts, and how they are answered.


@functools.cache
def model(name: str, shared: pathlib.Path) -> Any:
  """Returns a tiny model, loaded once."""
  from lib import notebook
  return notebook.load(source(name, shared))


def generate(name: str, text: Any, settings: Mapping[str, Any], folder: pathlib.Path,
             shared: pathlib.Path) -> None:
  """Asks a tiny model."""
  del folder
  model(name, shared).generate(text, **settings)


def sample(name: str, sampling: tuple[Any, ...], folder: pathlib.Path,
           shared: pathlib.Path) -> None:
  """Asks a tiny model for an answer at random."""
  from models.decoding.sampling import Sampling
  del folder
  model(name, shared).generate('w5', sampling=Sampling(*sampling), new_tokens=2)


def decode(prompts: Any, settings: Mapping[str, Any], folder: pathlib.Path,
           shared: pathlib.Path) -> None:
  """Gives ids to a generator."""
  del folder
  made = model('qwen3', shared).assistant
  options = {key: settings[key] for key in ('buckets', 'side') if key in settings}
  rest = {key: value for key, value in settings.items() if key not in options}
  made.generator({}, **options)(prompts, **{'new_tokens': 2, **rest})


def chat(messages: Any, folder: pathlib.Path, shared: pathlib.Path) -> None:
  """Renders messages."""
  del folder
  model('llava', shared).assistant.chat(messages)


def harness(settings: Mapping[str, Any], folder: pathlib.Path, shared: pathlib.Path) -> None:
  """Makes what harnesses ask."""
  from adapters.answerer import Answerer
  del folder
  Answerer(str(source('qwen3', shared)), **settings)


REDUCTIONS: Mapping[str, Any] = {'language': {'method': 'fastv', 'layers': (1,), 'keep_ratio': 0.5}}


def prompts() -> Iterator[Case]:
  """Yields cases of prompts, messages and settings of answers."""
  ask_text = functools.partial(generate, 'qwen3')
  ask_both = functools.partial(generate, 'llava')
  yield Case('text', functools.partial(ask_text, 'w5 w6', {'new_tokens': 2}), fine=True, seconds=60)
  for text in ('a \ud800', '\udcff', 'w5 ' * 5000):
    yield Case(f'text {shown(text)}', functools.partial(ask_text, text, {}))
  for count in (1, 2, 5):
    yield Case(f'{count} marks, no image', functools.partial(ask_both, '<image>' * count, {}))
  for key, values in {
      'new_tokens': (0, -1, 10 ** 9, 2 ** 70), 'seed': (2 ** 70, [1, 2, 3]),
      'images': (['no_such.png'], [''], ['/'], ['/dev/zero'], ['\udcff'], ['x' * 300])}.items():
    for value in values:
      yield Case(f'{key}={shown(value)}', functools.partial(
          ask_both if key == 'images' else ask_text, 'w5', {'new_tokens': 2, key: value}),
          says=() if key == 'images' else (key, 'new ones'))
  yield Case('images of a text model', functools.partial(ask_text, 'w5', {'images': ['a.png']}))
  for place, value in (('temperature', NAN), ('temperature', -1.0), ('temperature', INFINITY),
                       ('top_k', -1), ('top_k', 2 ** 70), ('top_p', 0.0), ('top_p', -1.0),
                       ('top_p', 1.5), ('top_p', NAN), ('top_p', INFINITY)):
    sampling = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0} | {place: value}
    yield Case(f'{place}={shown(value)}', functools.partial(
        sample, 'qwen3', tuple(sampling.values())), says=(place,))
  for ids in ([], [[]], [[5], []], [[-1]], [[10 ** 6]], [[2 ** 70]], [[5] * 5000]):
    yield Case(f'ids {shown(ids)}', functools.partial(decode, ids, {}))
  for key, values in {
      'buckets': ((),), 'side': ('middle', ''),
      'seeds': ([1, 2, 3], [], 2 ** 70)}.items():
    for value in values:
      yield Case(f'generator: {key}={shown(value)}',
                 functools.partial(decode, [[5, 6]], {key: value}), says=(key, key[:-1]))
  good = {'role': 'user', 'content': 'w5'}
  for messages in (
      'abc', [None], ['abc'], [{}], [{'role': 'user'}], [{'content': 'w5'}],
      [good | {'role': 3}], [good | {'role': None}], [good | {'role': 'wizard'}],
      [good | {'content': 3}], [good | {'content': None}], [good | {'content': [3]}],
      [good | {'content': [{}]}], [good | {'content': [{'type': 3}]}],
      [good | {'content': {'a': 1}}],
      [good | {'content': [{'type': 'text'}]}],
      [good | {'content': [{'type': 'text', 'text': 3}]}]):
    yield Case(f'messages {shown(messages)}', functools.partial(chat, messages))
  for path, value in bad_values(REDUCTIONS):
    reduce = changed(REDUCTIONS, path, value)
    yield Case(f'reduce {".".join(path)}={shown(value)}', functools.partial(
        ask_text, 'w5 w6 w7', {'new_tokens': 2, 'reduce': reduce}), says=(path[-1], path[0]))
  for reduce in ({'nowhere': {}}, {'language': 3}, {'language': 'fastv'},
                 {'language': {'method': 'no_such'}}, {'language': {'keep': 4}},
                 {'vision': {'method': 'tome', 'remove': 2}}):
    yield Case(f'reduce={shown(reduce)}', functools.partial(
        ask_text, 'w5 w6 w7', {'new_tokens': 2, 'reduce': reduce}))
  for key, values in {
      'reduce': ('{', '[1]', 'abc', '3', 'no_such.json', '{"nowhere": {}}', '(' * 9999,
                 '{1: ' * 999),
      'batch_size': (0, -1, 'abc', 'nan', 1.5, '2:3'), 'dtype': ('float8', ''),
      'buckets': ('abc', '64:', '0', '-4', 0, '1.5', 'nan')}.items():
    for value in values:
      yield Case(f'harness: {key}={shown(value)}', functools.partial(harness, {key: value}),
                 says=() if key == 'reduce' else (key,))


KINDS = {'files beside weights': beside_weights, 'templates': template_cases, 'prompts': prompts}
