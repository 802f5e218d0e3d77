"""Chat templates of strangers: what they may not do, and that they end."""

import json
import signal

import pytest
from helpers.errors import said

from lib.data import templates
from lib.data.tokenizers import Chat

USER = [{'role': 'user', 'content': 'a cat'}]
MEMORY = 'takes more than 512 MB of memory'
TIME = 'does not end within 0.1 s'
SANDBOX = 'is stopped by the sandbox'
# template: what is said of it.
FAULTS = {
    "{% for i in range(10**12) %}{% endfor %}": 'Range too big',
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": TIME,
    "{{ (10**9) ** (10**9) }}": TIME,
    "{{ 'a' * 10**10 }}": MEMORY,
    "{% set n = 10**10 %}{{ 'a' * n }}": MEMORY,
    "{{ [messages] * 10**10 }}": MEMORY,
    "{{ 'x'.rjust(10**10) }}": MEMORY,
    "{{ 'x' | center(10**10) }}": MEMORY,
    "{{ 'x' | indent(10**10) }}": MEMORY,
    "{{ '%0999999999d' % 1 }}": MEMORY,
    "{{ '{:>9999999999}'.format(1) }}": MEMORY,
    "{{ messages | tojson(indent=10**10) }}": MEMORY,
    "{% set n = 17 * 10**6 %}{{ 'a' * n }}": 'makes a text of 17,000,000 characters',
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": 'RecursionError',
    "{{ " + "(" * 9999 + ")" * 9999 + " }}": 'RecursionError',
    "{{ messages.__class__.__mro__ }}": SANDBOX,
    "{{ cycler.__init__.__globals__ }}": SANDBOX,
    "{{ messages.append(1) }}": SANDBOX,
    "{{ tool.name }}": "UndefinedError: 'tool' is undefined",
    "{{ nothing() }}": "'nothing' is undefined",
    "{{ 1 / 0 }}": 'ZeroDivisionError',
    "{{ 1 + 'a' }}": 'TypeError',
    "{% include 'other' %}": 'no loader',
    "{% for %}": 'is no valid template',
    "{{ messages": 'is no valid template',
    "{% unknown %}": 'is no valid template',
    "{{ x | unknown }}": 'is no valid template',
    "{{ raise_exception('not\nthis') }}": 'refuses these messages: not this',
}


def chat(folder, source):
  (folder / 'chat_template.jinja').write_text(source)
  return Chat.of(folder)


@pytest.mark.parametrize('source', FAULTS, ids=lambda source: source[:40])
def test_templates_that_fail_reach_out_or_do_not_end(source, tmp_path, monkeypatch):
  monkeypatch.setattr(templates, 'SECONDS', 0.1)
  text = said(lambda: chat(tmp_path, source)(USER))
  assert text.startswith(f'the chat template in {tmp_path} ')
  assert FAULTS[source] in text
  assert text.endswith((
      '; correct it, or take it away',
      '; correct it, or write the whole prompt by hand (template=False, or --notemplate)'))


def test_the_next_template_is_rendered_after_one_that_was_ended(tmp_path, monkeypatch):
  (tmp_path / 'endless').mkdir()
  monkeypatch.setattr(templates, 'SECONDS', 0.1)
  endless = chat(tmp_path / 'endless', '{% for i in range(9999) %}{% for j in range(99999) %}'
                                       '{% endfor %}{% endfor %}')
  good = chat(tmp_path, '{{ messages[0].content }}')
  before = good(USER)
  assert 'does not end' in said(endless, USER)
  assert good(USER) == before == 'a cat'


def test_who_interrupts_gets_the_next_text_all_the_same(tmp_path):
  made = chat(tmp_path, '{{ messages[0].content }}')
  process = templates._child._process
  process.send_signal(signal.SIGINT)
  assert made(USER) == 'a cat'
  process.kill()
  assert 'ended the process that renders it (status -9)' in said(made, USER)
  assert made(USER) == 'a cat'


def test_what_the_child_says_is_what_was_asked(tmp_path):
  """One process renders them all."""
  made = []
  for number in range(3):
    (tmp_path / str(number)).mkdir()
    made.append(chat(tmp_path / str(number),
                     f'{number}{{{{ messages[0].content }}}}{{{{ extra }}}}'))
  odd = 'é \U0001f408 \0 \ud800 "\\ \n</s>'
  for number in (2, 0, 1, 0):
    assert made[number]([{'role': 'user', 'content': odd}], extra=[1, None]) == (
        f'{number}{odd}[1, None]')


def test_what_marks_the_answer_in_training_is_its_content(tmp_path):
  source = '{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}'
  assert chat(tmp_path, source)(USER) == 'a cat'


@pytest.mark.parametrize('message', [
    'hello', ['user', 'hi'], {}, {'content': 'x'}, {'role': None, 'content': 'x'},
    {'role': 3, 'content': 'x'}, {'role': 'user'}, {'role': 'user', 'content': None},
    {'role': 'user', 'content': 3}, {'role': 'user', 'content': ['x']},
    {'role': 'user', 'content': [{'text': 'x'}]}, {'role': 'user', 'content': [{'type': 3}]}],
    ids=repr)
def test_messages_of_another_form(message, tmp_path):
  made = chat(tmp_path, '{{ messages }}')
  assert said(made, [message]).endswith('is no message: give a role, and as content a text, or a '
                                        'list of parts with a type')
  assert made([{'role': 'assistant', 'content': None, 'tool_calls': [{'name': 'f'}]}])


def test_variables_that_are_no_data(tmp_path):
  made = chat(tmp_path, '{{ tools }}')
  assert 'takes texts, numbers, lists and dicts alone' in said(made, USER, tools=[object()])


FORMS = 'must be text or a dict of keys, each text or a tuple, each a dict of keys'


@pytest.mark.parametrize(('value', 'message'), [
    *((each, f'={each!r} {FORMS}') for each in (
        3, True, [3], ['{{ a }}'], {'default': None}, {'default': ['{{ a }}']}, [[]])),
    ([{'name': 'default'}], ': template is missing: it must be text'),
    ([{'name': 3, 'template': ''}], ': name=3 must be text')], ids=repr)
@pytest.mark.parametrize('file', ['tokenizer_config.json', 'chat_template.json'])
def test_templates_of_another_form(file, value, message, tmp_path):
  (tmp_path / file).write_text(json.dumps({'chat_template': value}))
  assert said(Chat.of, tmp_path) == f'{tmp_path / file}: chat_template{message}'


def test_templates_by_name_as_an_object(tmp_path):
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(
      {'chat_template': {'default': 'one', 'tool_use': 'two'}, 'bos_token': {'content': '<s>'}}))
  assert (Chat.of(tmp_path)(USER), Chat.of(tmp_path, name='tool_use')(USER)) == ('one', 'two')
  assert Chat.of(tmp_path).tokens == {'bos_token': '<s>'}


@pytest.mark.parametrize(('token', 'message'), [
    (3, '=3 must be text or a dict of keys'), (['<s>'], "=['<s>'] must be text or a dict of keys"),
    ({'content': 3}, ': content=3 must be text'),
    ({'text': '<s>'}, ': content is missing: it must be text'),
    (False, '=False must be text or a dict of keys')], ids=repr)
def test_special_tokens_of_another_form(token, message, tmp_path):
  (tmp_path / 'chat_template.jinja').write_text('{{ bos_token }}')
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'bos_token': token}))
  assert said(Chat.of, tmp_path) == f'{tmp_path / "tokenizer_config.json"}: bos_token{message}'
