"""Chat templates and tokenizers, against what the transformers library made of the same files."""

import json
import pathlib
import shutil

import pytest

from lib.data.tokenizers import Chat, HubTokenizer

FOLDER = pathlib.Path(__file__).parents[1] / 'fixtures' / 'parity_vlm' / 'chat'
EXPECTED = json.loads((FOLDER / 'expected.json').read_text())


@pytest.mark.parametrize('name', EXPECTED)
def test_text_and_ids_are_those_of_the_reference(name):
  wanted = EXPECTED[name]
  text = Chat.of(FOLDER)(wanted['messages'], answer=wanted['answer'], **wanted['more'])
  assert text == wanted['text']
  tokens = HubTokenizer.of(FOLDER)
  assert tokens.encode(text, special=False) == wanted['ids']
  assert tokens.encode(text, special=True) == wanted['ids_special']
  assert wanted['ids'].count(tokens.id_of('<image>')) == text.count('<image>')


def test_a_template_may_lie_in_any_of_the_files(tmp_path):
  shutil.copy(FOLDER / 'tokenizer_config.json', tmp_path)
  template = (FOLDER / 'chat_template.jinja').read_text()
  wanted = EXPECTED['images/True/False']

  def render(**which):
    return Chat.of(tmp_path, **which)(wanted['messages'])

  with pytest.raises(ValueError, match='there is no chat template'):
    render()
  path = tmp_path / 'chat_template.json'
  path.write_text(json.dumps({'chat_template': template}))
  assert render() == wanted['text']
  path.unlink()
  settings = json.loads((FOLDER / 'tokenizer_config.json').read_text())
  path = tmp_path / 'tokenizer_config.json'
  named = [{'name': 'default', 'template': template}, {'name': 'short', 'template': 'hello'}]
  path.write_text(json.dumps(settings | {'chat_template': named}))
  assert render() == wanted['text']
  assert render(name='short') == 'hello'
  with pytest.raises(ValueError, match="no template 'long': choose from default, short"):
    render(name='long')


def test_a_template_may_refuse_and_may_not_reach_out(tmp_path):
  with pytest.raises(ValueError, match='refuses these messages: no such role: judge'):
    Chat.of(FOLDER)([{'role': 'judge', 'content': 'x'}])
  (tmp_path / 'chat_template.jinja').write_text('{{ messages.__class__.__mro__ }}')
  with pytest.raises(Exception, match='unsafe'):
    Chat.of(tmp_path)([])
  (tmp_path / 'chat_template.jinja').write_text('{% for %}')
  with pytest.raises(ValueError, match='is no valid template'):
    Chat.of(tmp_path)


def test_ids_back_to_text_and_errors(tmp_path):
  tokens = HubTokenizer.of(FOLDER)
  assert tokens.decode([1, 4, 5, 2]) == 'a cat'
  with pytest.raises(ValueError, match="'<dog>' is no token"):
    tokens.id_of('<dog>')
  with pytest.raises(ValueError, match=r'there is no .*tokenizer\.json'):
    HubTokenizer.of(tmp_path)
