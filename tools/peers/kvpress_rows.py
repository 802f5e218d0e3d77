"""What two sides make of the same prompts: figures side by side, and tables of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lib.cost import lm as lm_cost
from lib.report import tables
from lib.report.rows import Row
from lib.runtime import timing
from models.backbones.lm import LM
from tools.peers import command
from tools.peers.environment import Peer
from tools.peers.prompts import Prompt
from tools.peers.reading import Reader

ANSWER, DECODED = 8, 24
SIDES = ('ours', 'theirs')


@dataclasses.dataclass(frozen=True)
class Case:
  """Says what to measure.

  Attributes:
    press: its name on the other side.
    share: of the entries, that stay.
    length: tokens of a prompt.
    reduce: what our plan is made of.
  """

  press: str
  share: float
  length: int
  reduce: Mapping[str, Any]

  @property
  def name(self) -> str:
    """Returns the key of its entry."""
    return f'{self.press} {self.share:g} {self.length}'


def measure(case: Case, made: Sequence[Prompt], reader: Reader, peer: Peer, *,
            decode: Callable[[Sequence[int]], str], rounds: int) -> Row:
  """Returns the figures of a case.

  Args:
    case: what to measure.
    made: prompts.
    reader, peer: either side.
    decode: ids -> text.
    rounds: timed ones, 0 to measure neither times nor memory.
  """
  asked = {'press': case.press, 'share': case.share}
  found = [_of_prompt(case, prompt, reader, peer, decode, asked) for prompt in made]
  row: dict[str, Any] = {**asked, 'length': case.length, 'prompts': len(made), 'rounds': rounds}
  row |= {key: float(np.mean([each['kept'][key] for each in found]))
          for key in ('equal_heads', 'equal_numbers', 'exchanged')}
  row['layers'] = sorted({layer for each in found for layer in each['kept']['layers']})
  row['same_answers'] = sum(each['same'] for each in found)
  cost = _cost(case, made[0].ids, reader, peer, rounds) if rounds else {}
  for side in SIDES:
    row[side] = {
        'perplexity': float(np.exp(-np.mean([each[side]['likely'] for each in found]))),
        'answers': sum(each[side]['told'] for each in found), **cost.get(side, {})}
  return row


def _cost(case: Case, ids: Sequence[int], reader: Reader, peer: Peer,
          rounds: int) -> dict[str, dict[str, float]]:
  """Measures memory and time that either side needs for a prompt and tokens behind it."""
  run: dict[str, Callable[..., Any]] = {
      'ours': functools.partial(_ours, reader, case),
      'theirs': functools.partial(peer.ask, press=case.press, share=case.share)}
  asked = {'ids': list(ids), 'count': DECODED}
  # These warm both up.
  memory = {side: run[side]('memory', **asked) for side in SIDES}
  times = in_turns({side: functools.partial(run[side], 'time', **asked) for side in SIDES}, rounds)
  return {side: {
      'added_mb': memory[side]['peak'] - memory[side]['before'],
      'resident_mb': memory[side]['peak'], 'cache_mb': memory[side]['cache'],
      **{f'{part}_{key}': value for part, seconds in
         zip(('first', 'token'), zip(*times[side], strict=True), strict=True)
         for key, value in timing.Timing.of([1e3 * each for each in seconds]).fields().items()}}
      for side in SIDES}


def _ours(reader: Reader, case: Case, do: str, **asked: Any) -> Any:
  return getattr(reader, do)(case.reduce, **asked)


def _of_prompt(case: Case, prompt: Prompt, reader: Reader, peer: Peer,
               decode: Callable[[Sequence[int]], str],
               asked: Mapping[str, Any]) -> dict[str, Any]:
  """Reads what is kept of a prompt, how likely its next tokens are, and what is answered."""
  kept = compared(reader.read(case.reduce, prompt.ids), peer.ask('read', ids=prompt.ids, **asked))
  row: dict[str, Any] = {'kept': kept}
  answers = {}
  for side, follow in (('ours', reader.follow), ('theirs', functools.partial(peer.ask, 'follow'))):
    likely, _ = follow(given=prompt.behind, count=0)
    _, picked = follow(given=prompt.question, count=ANSWER)
    answers[side] = decode(picked)
    row[side] = {'likely': likely, 'told': prompt.key in answers[side].replace(' ', '')}
  return {**row, 'same': answers['ours'] == answers['theirs']}


def in_turns(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
  """Runs both sides in turns; which is first changes from round to round."""
  found: dict[str, list[Any]] = {side: [] for side in sides}
  for turn in range(rounds):
    for side in list(sides)[::-1 if turn % 2 else 1]:
      found[side].append(sides[side]())
  return found


def compared(ours: Sequence[Any], theirs: Sequence[Any]) -> dict[str, Any]:
  """Compares what two sides keep, [layer][head][position]."""
  layers = [[(set(mine), set(other)) for mine, other in zip(one, two, strict=True)]
            for one, two in zip(ours, theirs, strict=True)]
  pairs = [pair for layer in layers for pair in layer]
  return {'equal_heads': float(np.mean([mine == other for mine, other in pairs])),
          'equal_numbers': float(np.mean([len(mine) == len(other) for mine, other in pairs])),
          'exchanged': (sum(len(mine - other) for mine, other in pairs)
                        / sum(len(mine) for mine, _ in pairs)),
          'layers': [number for number, layer in enumerate(layers)
                     if any(mine != other for mine, other in layer)]}


def floors(lm: LM, lengths: Sequence[int]) -> dict[str, Any]:
  """Measures what bounds either side here: a prompt multiplies all weights, a token reads them."""
  costs = {str(length): lm_cost.of(lm, length, room=DECODED) for length in lengths}
  weights = next(iter(costs.values())).decode_weight_bytes
  products, read = timing.device_speed(jnp.float32)[0], timing.read_speed(weights)
  return {'weights_mb': weights / 2 ** 20, 'gflops': products / 1e9, 'read_gbytes': read / 1e9,
          'first_floor_ms': {key: 2e3 * cost.macs / products for key, cost in costs.items()},
          'token_floor_ms': 1e3 * weights / read}


def table(entries: Mapping[str, Any]) -> str:
  """Returns Markdown: how they agree, and what they cost."""
  machine = entries['machine']
  rows = [row for name, row in entries.items() if name != 'machine']
  floor = ', '.join(f'{ms:.0f} ms for {length} tokens'
                    for length, ms in machine['first_floor_ms'].items())
  agreement = [[row['press'], *_budget(row), f'{row["equal_heads"]:.1%}',
                f'{row["exchanged"]:.2%}', _few(row['layers']),
                *(f'{row[side]["perplexity"]:.3f}' for side in SIDES),
                *(f'{row[side]["answers"]} of {row["prompts"]}' for side in SIDES),
                f'{row["same_answers"]} of {row["prompts"]}'] for row in rows]
  cost = [[row['press'], *_budget(row), *_pair(row, 'first'), *_pair(row, 'token'),
           *(f'{row[side]["added_mb"]:.0f}' for side in SIDES),
           *(f'{row[side]["cache_mb"]:.1f}' for side in SIDES)] for row in rows if row['rounds']]
  return (
      f'SmolLM2-135M-Instruct, 4-bit weights dequantised to float32; '
      f'{command.versions(machine)}; '
      f'threads of each side: {machine["threads"]}, {tables.describe_machine(machine)}.\n\n'
      + tables.markdown_lines(
          ['press', 'kept', 'tokens', 'equal heads', 'exchanged', 'in layers',
           'perplexity ours', 'theirs',
           'keys told ours', 'theirs', 'same answer'], agreement)
      + '\nMedians [quartiles] of rounds in turns, ratios theirs / ours; a token reads '
      f'{machine["weights_mb"]:.0f} MB of weights, at {machine["read_gbytes"]:.1f} GB/s in '
      f'{machine["token_floor_ms"]:.0f} ms at least; a prompt multiplies at '
      f'{machine["gflops"]:.0f} GFLOP/s, at least {floor}. Added MB: peak of resident memory while '
      'reading and decoding above that before.\n\n'
      + tables.markdown_lines(
          ['press', 'kept', 'tokens', 'first token ms ours', 'theirs', 'ratio', 'ms a token ours',
           'theirs', 'ratio', 'added MB ours', 'theirs', 'cache MB ours', 'theirs'], cost))



def _few(layers: Sequence[int]) -> str:
  return ' '.join(map(str, layers)) if len(layers) <= 5 else f'{len(layers)} of them'


def _budget(row: Row) -> list[str]:
  return [f'{row["share"]:.0%}', str(row['length'])]


def _pair(row: Row, part: str) -> list[str]:
  """Times of both sides, and how many times as long the other side takes."""
  keys = [f'{part}_{each}_ms' for each in ('median', 'low', 'high')]
  times = ['{:.0f} [{:.0f}, {:.0f}]'.format(*(row[side][key] for key in keys)) for side in SIDES]
  return [*times, f'{row["theirs"][keys[0]] / row["ours"][keys[0]]:.2f}']
