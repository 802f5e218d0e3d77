"""Command lines that cannot be: each runs as `python -m` does, in a process of its own."""

from __future__ import annotations

import functools
import os
import pathlib
import runpy
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from fuzz.case import Accepted, Case
from fuzz.text_cases import source

# Each command with what it needs.
DIGITS = '--config=configs/digits.py'
COMMANDS = {
    'train': (DIGITS, '--workdir=RUN'),
    'eval': ('--config=configs/digits_sweep.py', '--workdir=RUN'),
    'tools.generate': ('--model=MODEL', '--prompt=w5'),
    'tools.explain': ('--config=configs/vit_s16_tome.py', '--notrace'),
    'tools.bench': ('--out=OUT',), 'tools.speed': ('--out=OUT',),
    'tools.bench.images': ('--out=OUT',), 'tools.decode_bench': ('--out=OUT',),
    'tools.buckets': ('--config=configs/digits.py', '--workdir=RUN', '--out=OUT'),
    'tools.pack': (DIGITS, '--workdir=RUN', '--out=OUT'), 'tools.prepare': ('--name=digits',),
    'tools.study': ('--config=configs/digits_study.py', '--workdir=RUN'),
    'tools.reproduce': (), 'tools.targets': ('--out=OUT',), 'tools.targets_lm': ('--out=OUT',)}
# What no command takes.
NEVER = (('--no_such_flag=1',), ('stray',), ('-x',), ('--',  'stray'))
LINES: dict[str, Sequence[Sequence[str]]] = {
    'train': (
        ('--config=configs/no_such.py',), ('--config=configs',), ('--config=README.md',),
        ('--config=',), ('--config=configs/reproduce.py:no_such',), ('--config.seed=abc',),
        ('--config.seed=1.5',), ('--config.seed',), ('--config.no_such=1',),
        ('--config.model.depth=0',), ('--config.optimizer.peak_lr=nan',),
        ('--config.data.batch_size=1000000000',), ('--config.log_steps=0',),
        ('--config.optimizer.distill.teacher=no_such',), ('--config.start=no_such',),
        ('--config.reduce.vision.method=no_such',), ('--workdir=/dev/null/run',),
        ('--workdir=README.md',), ('--workdir=/proc/1/run',), ('--coordinator=nowhere',),
        ('--coordinator=nowhere:1', '--processes=0', '--process=0'),
        ('--coordinator=localhost:99999', '--processes=2', '--process=0'),
        ('--processes=abc',)),
    'eval': (('--workdir=no_such',), ('--config.sweep.budgets=abc',), ('--config.sweep.rounds=-1',),
             (DIGITS,), ('--config.sweep.methods=no_such',)),
    'tools.generate': (
        ('--model=no_such',), ('--model=README.md',), ('--model=',), ('--model=results',),
        ('--new_tokens=abc',), ('--new_tokens=0',), ('--new_tokens=-1',), ('--temperature=nan',),
        ('--temperature=-1',), ('--top_p=0',), ('--top_p=abc',), ('--top_k=-1',), ('--seed=-1',),
        ('--seed=99999999999999999999',), ('--buckets=abc',), ('--buckets=0',), ('--buckets=',),
        ('--dtype=float8',), ('--prompt_file=no_such',), ('--prompt_file=/dev/zero',),
        ('--image=README.md',), ('--example=0',), ('--show=kept.png',), ('--prompt=\udcff',),
        ('--reduce.language.method=no_such',), ('--reduce.language.keep_ratio=0.5',),
        ('--reduce.no_such.method=tome',), ('--reduce.language.layers=(',)),
    'tools.explain': (
        ('--config=',), ('--model=no_such', '--config='), ('--prompt=-1',), ('--prompt=abc',),
        ('--images=-1',), ('--image_size=abc',), ('--image_size=1',), ('--new_tokens=-1',),
        ('--reduce.vision.method=no_such',), ('--reduce.no_such=1',),
        ('--reduce.vision.method=tome', '--reduce.vision.remove=nan'),
        ('--config.reduce.vision.remove=-1',), ('--config.model.depth=10000000',)),
    'tools.bench': (('--only=no_such',), ('--batch=0',), ('--rounds=0',), ('--methods=no_such',),
                    ('--batch=abc',)),
    'tools.bench.images': (('--sites=no_such',), ('--visual=577',), ('--methods=no_such',),
                           ('--images=1',), ('--rounds=0',)),
    'tools.speed': (('--variant=no_such',), ('--batches=abc',), ('--batches=0',), ('--rounds=0',),
                    ('--methods=no_such',), ('--apart=0',)),
    'tools.decode_bench': (('--models=no_such',), ('--rounds=0',), ('--tokens=0',)),
    'tools.pack': (('--workdir=no_such',),),
    'tools.prepare': (('--name=no_such',), ('--name=',), ('--name=/',), ('--name=digits/no_such',),
                      ('--data_dir=/dev/null/data',)),
    'tools.study': (('--config.study.seeds=abc',), (DIGITS,), ('--config.study.seeds=(-1,)',)),
    'tools.reproduce': (('--config=no_such',), ('--rows=no_such',)),
    'tools.targets': (('--targets=no_such',),),
    'tools.targets_lm': (('--targets=no_such',), ('--steps=no_such',))}


def run(command: str, arguments: Sequence[str], folder: pathlib.Path, shared: pathlib.Path) -> None:
  """Runs a command.

  Raises:
    ValueError: it ended with status 2 and one line, which this is.
    Accepted: it ended well.
    RuntimeError: it ended with something else.
  """
  places = {'RUN': folder / 'run', 'OUT': folder / 'out', 'MODEL': source('qwen3', shared)}
  for name, place in places.items():
    arguments = [argument.replace(f'={name}', f'={place}') for argument in arguments]
  screen = folder / 'screen'
  with screen.open('wb') as file:
    os.dup2(file.fileno(), 2)
  sys.argv = [command, *arguments]
  try:
    runpy.run_module(command, run_name='__main__', alter_sys=True)
    status: Any = 0
  except SystemExit as end:
    status = end.code
  sys.stderr.flush()
  said = screen.read_text(errors='replace')
  *before, last = said.splitlines() or ['']
  if not status:
    raise Accepted
  if status != 2 or not last.startswith('error: ') or 'Traceback' in said:
    raise RuntimeError(f'status {status}: {said[-500:]}')
  if before:
    raise RuntimeError(f'{len(before)} lines before the error: {before[0]}')
  raise ValueError(last.removeprefix('error: ').removesuffix(' (--debug shows where)'))


def commands() -> Iterator[Case]:
  """Yields cases of command lines."""
  for command, needed in COMMANDS.items():
    for line in (*NEVER, *LINES.get(command, ())):
      given = {argument.partition('=')[0] for argument in line}
      kept = [argument for argument in needed if argument.partition('=')[0] not in given]
      flag, _, value = line[-1].partition('=')
      yield Case(f'{command} {ascii(" ".join(line))[1:-1]}', functools.partial(
          run, command, [*kept, *line]), seconds=60,
          says=(flag.strip('-').rpartition('.')[2], value or flag, 'names no method', 'no key',
                'half a character'))


KINDS = {'commands': commands}
