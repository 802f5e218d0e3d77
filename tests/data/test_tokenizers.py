"""Chat templates and tokenizers, against what the transformers library made of the same files."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from helpers import tiny_lm

from lib.data.tokenizers import Chat, HubTokenizer, word_numbers
from models.plan import make_plan

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


def trained(kind):
  """A tokenizer of few words, by bytes (as GPT-2's) or by pieces of words (as BERT's)."""
  tokenizers = pytest.importorskip('tokenizers')
  if kind == 'bytes':
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, special_tokens=['<s>'], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
  else:
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token='[UNK]'))
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = tokenizers.decoders.WordPiece()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=60, special_tokens=['[UNK]', '<s>'], show_progress=False)
  made.train_from_iterator(['get the token of the text(s), gettext and tokentext'] * 3, trainer)
  return HubTokenizer(made.to_str())


@pytest.mark.parametrize('kind', ['bytes', 'pieces'])
def test_tokens_of_a_word_have_one_number(kind):
  tokens = trained(kind)
  words = ['get', 'tokentext', 'of', 'the', 'gettoken', 'tokenthe', '(', 'text', ')']
  ids = [tokens.id_of('<s>'), *tokens.encode('get tokentext of the gettoken tokenthe (text)',
                                             special=False)]
  numbers = word_numbers(tokens.decode, ids)
  assert len(ids) > numbers.max() + 1
  parts = [[one for one, number in zip(ids, numbers, strict=True) if number == own]
           for own in range(numbers.max() + 1)]
  said = [tokens.decode(part).strip() for part in parts]
  assert [word for word in said[1:] if word] == words
  assert parts[0] == [tokens.id_of('<s>')]
  assert word_numbers(tokens.decode, []).tolist() == []


@pytest.mark.long
def test_a_language_model_reads_the_words_of_a_text_as_one_token_each():
  tokens = trained('bytes')
  ids = np.array([tokens.encode('gettext of tokentext the', special=False)])
  unit = word_numbers(tokens.decode, ids[0])[None]
  lm = tiny_lm.TINY.clone(vocabulary=tokens.size)
  plan = make_plan({'method': 'subtoken_merge', 'token_kinds': 'text', 'layers': 0,
                    'keep': ids.shape[1] - 1}, lm.host(ids.shape[1]))
  variables = jax.jit(lm.init)(jax.random.key(0), ids)
  embedded = lm.apply(variables, ids, method='embed')
  _, out = jax.jit(lm.clone(plan=plan).apply)(variables, embedded.replace(stats={'unit': unit}))
  owner = np.asarray(out['tokens'].owner[0])
  np.testing.assert_array_equal(owner, unit[0])
