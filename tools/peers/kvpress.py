"""Runs kvpress and this library on the same prompts, weights and budgets, side by side.

  python -m tools.peers.kvpress --folder=real [--peer=.../bin/python]

Writes --out, a JSON entry a press, budget and length, and a table in Markdown beside it; entries
that are there are not measured again. A prompt is read whole, each head of each layer keeps its
share of the entries, and the model goes on from there: float32, batch 1, the same number of cores.
Figures of an entry:
  equal_heads    share of the heads of all layers that keep the same positions
  equal_numbers  share of those that keep equally many
  exchanged      share of the positions kept that the other side does not keep
  layers         those in which heads differ
  same_answers   prompts whose answers are the same word for word
and of each side ('ours', 'theirs'):
  perplexity     of the next tokens of the article
  answers        pass keys told right
  first_*_ms     from a prompt to its first token; compiling and warming up apart
  token_*_ms     of a token after it
  added_mb       the most memory meanwhile, above what was resident before
  resident_mb    the same, with all that was: libraries, weights, programs
  cache_mb       of keys and values as they are held, with what belongs to them
Times are medians and quartiles of rounds in which both take turns; --rounds=0 measures neither them
nor memory.
"""

from __future__ import annotations

import functools
import json
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

from absl import flags
from tqdm import tqdm

from lib.assistant import NO_TEMPLATE, REPEAT, REPEAT_PART
from lib.data import gguf_tokenizer
from lib.data.real.articles import articles
from lib.report.rows import update_json
from lib.runtime import cli
from models import checkpoints
from models.checkpoints import gguf
from models.checkpoints.lm_config import from_config
from ops import choices
from tools.peers import command
from tools.peers.kvpress_rows import DECODED, Case, floors, measure, table
from tools.peers.prompts import prompts
from tools.peers.reading import Reader

SNAPKV = {'method': 'snapkv', 'args': {'window': 32}}
EXPECTED = {'method': 'expected_attention'}
# No entries stay in any case.
WHOLE = {'sinks': 0, 'recent': 0}
# What both have, under the names that tools/peers/theirs/kvpress_lm.py knows.
PRESSES: dict[str, dict[str, Any]] = {
    'full': {},
    'knorm': {'method': 'knorm'},
    'streaming_llm': {'method': 'streaming_llm'},
    'snapkv': SNAPKV,
    'tova': {'method': 'tova'},
    'expected_attention': EXPECTED,
    'observed_attention': {'method': 'observed_attention'},
    'keydiff': {'method': 'keydiff'},
    'lagkv': {'method': 'lagkv', 'args': {'lag': 32}},
    'cur': {'method': 'cur'},
    'pyramidkv': {'method': 'pyramidkv', 'args': {
        'beta': 3, 'inner': {'method': 'snapkv', 'args': {'window': 16}}}},
    'chunkkv_snapkv': {'method': 'chunkkv', 'args': {'inner': SNAPKV}},
    'criticalkv_snapkv': {'method': 'criticalkv', 'args': {'inner': SNAPKV}},
    'chunk_knorm': {'method': 'chunk', 'args': {'length': 64, 'inner': {'method': 'knorm'}}},
    'adakv_snapkv': {'method': 'adakv', 'args': {'inner': SNAPKV}},
    'criticaladakv_snapkv': {'method': 'criticaladakv', 'args': {'inner': SNAPKV}},
    'adakv_expected_attention': {'method': 'adakv', 'args': {'inner': EXPECTED}},
    'simlayerkv': {'method': 'simlayerkv', 'args': {'recent': 64}},
    # Both of these draw a sketch, each side its own.
    'compactor': {'method': 'compactor'},
    'leverage': {'method': 'compactor', 'args': {'by': 'leverage', **WHOLE}},
    'non_causal_attention': {'method': 'compactor', 'args': {'by': 'attention', **WHOLE}},
    'kvzip': {'method': 'kvzip'},
    'kvzip_plus': {'method': 'kvzip', 'args': {'weigh': 'output'}},
}
# These have no budget: they keep what they keep.
UNBUDGETED = ('full', 'simlayerkv')
BEHIND = 64

ONLY = flags.DEFINE_list('presses', list(PRESSES), 'Those to measure.')
LENGTHS = flags.DEFINE_list('lengths', ['512', '1024'], 'Tokens of a prompt.')
PERCENT = flags.DEFINE_list('percent', ['50', '25'], 'Of the entries, that stay.')
PROMPTS = flags.DEFINE_integer('prompts', 4, 'Prompts of each length.', lower_bound=1)
for _name in ('lengths', 'percent'):
  cli.check_counts(_name, high=100 if _name == 'percent' else 8000)


def cases(presses: Sequence[str], shares: Sequence[float],
          lengths: Sequence[int]) -> list[Case]:
  """Lists all to measure; what has no budget once a length.

  Raises:
    ValueError: an unknown press.
  """
  for press in presses:
    choices.check('press ', press, PRESSES)
  return [Case(press, share, length, {**PRESSES[press], **budget})
          for length in lengths for press in presses
          for share, budget in ([(1.0, {})] if press in UNBUDGETED else
                                [(share, {'keep_ratio': share}) for share in shares])]


def main(argv: Sequence[str]) -> None:
  """Measures what the file lacks, and writes the tables."""
  del argv
  lengths, out = list(map(int, LENGTHS.value)), command.out('kvpress')
  every = cases(ONLY.value, [int(each) / 100 for each in PERCENT.value], lengths)
  path, read = command.needed('smollm2', f'*{gguf.SUFFIX}'), articles(command.folder() / 'articles')
  done = json.loads(out.read_text()) if out.exists() else {}
  missing = [case for case in every
             if done.get(case.name, {}).get('rounds', -1) < min(command.ROUNDS.value, 1)]
  if missing:
    lm, tokens = from_config(gguf.config(path)), gguf_tokenizer.tokenizer(path)
    made = {length: prompts(read, functools.partial(tokens.encode, special=False), length=length,
                            behind=BEHIND, count=PROMPTS.value) for length in lengths}
    with command.start('kvpress', 'kvpress', 'kvpress_lm') as peer:
      texts = {text: tokens.encode(text, special=False) for text in (
          '', NO_TEMPLATE, f'\n\n{REPEAT}.', REPEAT_PART)}
      _, opening, ask, ask_part = texts.values()
      reader = Reader(lm, checkpoints.load(lm, path), room=max(BEHIND, DECODED),
                      requests={'ask': ask, 'ask_part': ask_part, 'opening': opening})
      with tempfile.TemporaryDirectory() as scratch:
        reader.save(pathlib.Path(scratch), gguf.config(path))
        peer.ask('load', folder=scratch, threads=command.THREADS.value, texts=texts)
      update_json(out, {'machine': {**command.about(peer), **floors(lm, lengths)}})
      for case in tqdm(missing):
        update_json(out, {case.name: measure(case, made[case.length], reader, peer,
                                             decode=tokens.decode, rounds=command.ROUNDS.value)})
  command.write(out, json.loads(out.read_text()), table)


if __name__ == '__main__':
  cli.run(main)
