"""GGUF files: settings, names, quantized types, rotations, tokenizers; and caches measured on one.

Skipped without the gguf package.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from ml_collections import ConfigDict

import winnow
from configs import real_language
from lib.data import gguf_tokenizer
from lib.studies import language as study
from models.checkpoints import gguf as files
from models.checkpoints import load, save
from models.checkpoints.lm_config import from_config
from models.plan import make_cache_plan

gguf = pytest.importorskip('gguf')

SIZES = {'embedding_length': 64, 'block_count': 2, 'feed_forward_length': 96,
         'attention.head_count': 4, 'attention.head_count_kv': 2, 'context_length': 1024}


def written(path, *, architecture='llama', changed=None, tensors=True, tokens=()):
  """Writes a small model, its MLPs quantized; returns its tensors by the name in the file.

  With `tokens`, a byte-level tokenizer of them without merges, the first two of them special.
  """
  writer = gguf.GGUFWriter(path, architecture)
  for key, value in SIZES.items():
    writer.add_uint32(f'{architecture}.{key}', value)
  writer.add_float32(f'{architecture}.attention.layer_norm_rms_epsilon', 1e-5)
  writer.add_float32(f'{architecture}.rope.freq_base', 1e5)
  for key, value in (changed or {}).items():
    writer.add_string(key, value)
  if tokens:
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre('smollm')
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}"
                             '{{ eos_token }}{% endfor %}')
    writer.add_token_list(list(tokens))
    writer.add_token_types([3 if i < 2 else 1 for i in range(len(tokens))])
    writer.add_token_merges(['a b'])
  rng, wanted = np.random.default_rng(0), {}
  shapes = {'token_embd': (max(len(tokens), 50), 64), 'output_norm': (64,), **{
      f'blk.{layer}.{part}': shape for layer in range(2) for part, shape in {
          'attn_norm': (64,), 'ffn_norm': (64,), 'attn_q': (64, 64), 'attn_k': (32, 64),
          'attn_v': (32, 64), 'attn_output': (64, 64), 'ffn_gate': (96, 64), 'ffn_up': (96, 64),
          'ffn_down': (64, 96)}.items()}}
  for name, shape in shapes.items() if tensors else ():
    array = rng.normal(size=shape).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0 if 'ffn' in name and len(shape) > 1 else None
    if kind is None:
      writer.add_tensor(f'{name}.weight', array)
    else:
      packed = gguf.quantize(array, kind)
      writer.add_tensor(f'{name}.weight', packed, raw_dtype=kind)
      array = gguf.dequantize(packed, kind)
    wanted[name] = array
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return wanted


def test_a_file_is_read_as_the_model_that_it_holds(tmp_path):
  wanted = written(tmp_path / 'small.gguf')
  config = files.config(tmp_path / 'small.gguf')
  lm = from_config(config)
  assert (lm.width, lm.depth, lm.heads, lm.kv_heads, lm.head_width, lm.vocabulary, lm.tied) == (
      64, 2, 4, 2, 16, 50, True)
  assert (lm.rope.theta, lm.norm_eps, lm.context) == (1e5, 1e-5, 1024)
  params = load(lm, tmp_path / 'small.gguf')
  blocks = params['stack']['blocks']
  np.testing.assert_array_equal(params['table'], wanted['token_embd'])
  np.testing.assert_array_equal(blocks['down']['kernel'][1], wanted['blk.1.ffn_down'].T)
  # Feature 1 of a stored head is the second half of the first rotation, 8 further on here.
  stored = wanted['blk.0.attn_k'].reshape(2, 16, 64)
  got = np.moveaxis(blocks['k']['kernel'][0], 0, -1)
  np.testing.assert_array_equal(got, np.concatenate([stored[:, ::2], stored[:, 1::2]], axis=1))
  save(lm, params, tmp_path / 'again.safetensors', layout='transformers/lm')
  again = load(lm, tmp_path / 'again.safetensors')
  jax.tree.map(np.testing.assert_array_equal, params, again)
  logits, _ = lm.apply({'params': params}, jnp.arange(6)[None])
  assert np.isfinite(logits).all()


@pytest.mark.parametrize(('settings', 'message'), [
    ({'architecture': 'mamba'}, "holds the architecture 'mamba', which is unknown here: known are"),
    ({'changed': {'llama.rope.scaling.type': 'yarn'}}, 'scales RoPE, which is not read from GGUF'),
    ({'tensors': False}, 'does not say the shape of token_embd.weight')])
def test_files_that_are_not_read_are_refused_in_a_line(tmp_path, settings, message):
  written(tmp_path / 'odd.gguf', **settings)
  with pytest.raises(ValueError, match=message) as caught:
    files.config(tmp_path / 'odd.gguf')
  assert '\n' not in str(caught.value)


def test_what_is_no_such_file_is_refused_in_a_line(tmp_path):
  (tmp_path / 'text.gguf').write_text('no')
  for path, message in ((tmp_path / 'text.gguf', 'cannot be read as GGUF'),
                        (tmp_path, 'is no regular file')):
    with pytest.raises(ValueError, match=message):
      files.config(path)


PREFIX, BEHIND = 40, 8


@pytest.fixture(scope='module')
def subject(tmp_path_factory):
  folder = tmp_path_factory.mktemp('quality')
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  written(folder / 'small.gguf', tokens=('<|im_start|>', '<|im_end|>', 'ab', *alphabet))
  words = [f'abc def{i} ghi 42 jk' for i in range(4)]
  (folder / 'text.txt').write_text('\n\n'.join(f'{word} ' * 12 for word in words))
  config = ConfigDict({'weights': str(folder / 'small.gguf'), 'text': str(folder / 'text.txt'),
                       'prefix': PREFIX, 'behind': BEHIND, 'texts': 2, 'words': 12,
                       'pass_keys': 2, 'seed': 0})
  return study.Subject(config)


def test_a_file_alone_is_a_model_that_answers(tmp_path):
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  path = tmp_path / 'small.gguf'
  written(path, tokens=('<|im_start|>', '<|im_end|>', 'ab', *alphabet))
  model = winnow.load(path)
  assistant = model.assistant
  assert assistant.ends == (1,)
  ids = assistant.prompt('ab<|im_end|>')
  # What is asked is text: the end of a turn in it is none.
  assert (ids[0], ids[-1], ids.count(1)) == (0, 1, 1)
  cut = {'cache': {'method': 'snapkv', 'keep_ratio': 0.5, 'args': {'window': 2}}}
  assert isinstance(model.generate('ab cd', new_tokens=3, reduce=cut), str)


def test_pieces_with_scores_are_merged_best_first(tmp_path):
  """SentencePiece: bytes for what no token covers, and a space in front."""
  pieces = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256)),
            'a', 'b', 'c', '\u2581', 'ab', 'bc', '\u2581a']
  scores = [0.0] * 259 + [-9.0] * 4 + [-2.0, -1.0, -3.0]
  writer = gguf.GGUFWriter(tmp_path / 'pieces.gguf', 'llama')
  writer.add_tokenizer_model('llama')
  writer.add_token_list(pieces)
  writer.add_token_scores(scores)
  writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * 7])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  for write in (writer.write_header_to_file, writer.write_kv_data_to_file,
                writer.write_tensors_to_file, writer.close):
    write()
  made = gguf_tokenizer.tokenizer(tmp_path / 'pieces.gguf')
  number = pieces.index
  # 'bc' has the higher score, so that 'ab' cannot be made.
  assert made.encode('abc', special=True) == [1, number('\u2581a'), number('bc')]
  assert made.encode('ab', special=False) == [number('\u2581'), number('ab')]
  ids = made.encode('a é', special=False)
  assert ids[-2:] == [number('<0xC3>'), number('<0xA9>')]
  assert made.decode(ids) == 'a é'
  assert gguf_tokenizer.chat(tmp_path / 'pieces.gguf') is None
  assert gguf_tokenizer.ends(tmp_path / 'pieces.gguf') == (2,)


@pytest.mark.parametrize(('change', 'message'), [
    (lambda writer: None, 'holds no tokenizer, and known are gpt2, llama'),
    (lambda writer: writer.add_tokenizer_model('bert'), "holds a tokenizer of kind 'bert'"),
    (lambda writer: (writer.add_tokenizer_model('gpt2'), writer.add_token_list(['a'])),
     'does not say token_type and merges of its tokenizer'),
    (lambda writer: (writer.add_tokenizer_model('gpt2'), writer.add_token_list(['a']),
                     writer.add_token_types([1]), writer.add_token_merges(['a b']),
                     writer.add_tokenizer_pre('tekken')),
     "splits texts in a way that is not read here: 'tekken'"),
    (lambda writer: (writer.add_tokenizer_model('gpt2'), writer.add_token_list(['a']),
                     writer.add_token_types([1]), writer.add_token_merges(['a b']),
                     writer.add_tokenizer_pre('smollm')), 'contradicts itself .*: fetch the file'),
    (lambda writer: (writer.add_tokenizer_model('llama'), writer.add_token_list(['a']),
                     writer.add_token_types([1]), writer.add_token_scores([0.0]),
                     writer.add_unk_token_id(7)), 'contradicts itself .*: fetch the file')],
    ids=['none', 'kind', 'parts', 'split', 'merges', 'unknown'])
def test_tokenizers_that_are_not_read_are_refused_in_a_line(tmp_path, change, message):
  writer = gguf.GGUFWriter(tmp_path / 'odd.gguf', 'llama')
  change(writer)
  for write in (writer.write_header_to_file, writer.write_kv_data_to_file,
                writer.write_tensors_to_file, writer.close):
    write()
  with pytest.raises(ValueError, match=message) as caught:
    gguf_tokenizer.tokenizer(tmp_path / 'odd.gguf')
  assert '\n' not in str(caught.value)


@pytest.mark.long
def test_the_tokenizer_of_a_file_gives_its_text_back(subject):
  ids = subject._encode('<|im_start|>ab 128é')
  assert ids[0] == 0
  assert subject._tokens.decode(ids) == 'ab 128é'
  # A special token, a merged pair, and digits one by one.
  assert len(ids) == 1 + 1 + 1 + 3 + 2


@pytest.mark.long
def test_whole_caches_measure_the_model_itself(subject):
  row = subject.measure({'name': 'full', 'ranking': 'own', 'reduce': {}})
  assert row['memory'] == 1
  ids = jnp.concatenate([jnp.asarray(_ids(subject)), subject.behind], axis=1)
  logits, _ = subject.lm.apply(subject.weights, ids)
  likelihood = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits[:, PREFIX:-1])),
                                  np.asarray(ids[:, PREFIX + 1:, None]), axis=2)
  assert row['perplexity'] == pytest.approx(np.exp(-likelihood.mean()), rel=1e-3)


def _ids(subject):
  text = [f'{word} ' * 12 for word in ('abc def0 ghi 42 jk', 'abc def1 ghi 42 jk')]
  return [subject._encode(each)[:PREFIX] for each in text]


@pytest.mark.long
@pytest.mark.parametrize('row', [
    {'ranking': 'chance', 'reduce': {'method': 'knorm', 'keep_ratio': 0.5}},
    {'ranking': 'own', 'reduce': {'method': 'adakv', 'keep_ratio': 0.5, 'args': {
        'inner': {'method': 'tova'}}}}], ids=lambda row: row['reduce']['method'])
def test_reduced_caches_are_as_small_as_the_row_says(subject, row):
  measured = subject.measure({'name': 'x', **row})
  assert 0.5 <= measured['memory'] <= 0.55
  assert np.isfinite(measured['perplexity'])
  assert measured['recall'].endswith('of 2')


@pytest.mark.long
def test_every_row_of_the_config_is_a_plan_and_no_two_are_one(subject):
  rows = real_language.get_config().rows
  for row in rows[1:]:
    assert make_cache_plan(row['reduce'], subject.lm.host(1000)).events
  assert len({json.dumps(row, sort_keys=True) for row in rows}) == len(rows)
