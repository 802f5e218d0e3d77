"""Commands and code in processes of their own, forked from one that has imported JAX already.

A process forked so is one of its own in all that a run asks of it: arguments, environment, output,
signals, exit code, and Python's own end. It is only spared the imports, most of a short run's time.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types

ROOT = pathlib.Path(__file__).parents[2]
COLLECTIVE = r'\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\('
# What all of them import; flags are not to be defined.
PRELOADED = ('lib.assistant', 'lib.tasks.registry', 'lib.report.measuring', 'lib.runtime.metrics',
             'lib.runtime.meter', 'lib.runtime.timing', 'optax', 'orbax.checkpoint')


class Process:
  """Holds a running `python ARGUMENTS`, as subprocess.Popen does.

  Args:
    arguments: '-m', a module and its arguments; or '-c', code and its arguments.
    environment: what differs from this process's own.
    together: whether errors stand in one text with the rest.
  """

  def __init__(self, *arguments, environment=None, together=False):
    self.args, self.returncode = arguments, None
    self._texts = [tempfile.TemporaryFile() for _ in range(2 - together)]  # noqa: SIM115
    status, theirs = os.pipe()
    self._status = os.fdopen(status)
    with tempfile.TemporaryFile('w+') as asked:
      json.dump([list(map(str, arguments)), os.environ | (environment or {})], asked)
      asked.seek(0)
      socket.send_fds(_server()[0], [b'.'], [asked.fileno(), self._texts[0].fileno(),
                                             self._texts[-1].fileno(), theirs])
    os.close(theirs)
    self.pid = int(self._status.readline())

  def send_signal(self, number):
    os.kill(self.pid, number)

  def kill(self):
    self.send_signal(signal.SIGKILL)

  def poll(self):
    """Returns the exit code, a signal's number below 0; None while it runs."""
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.wait(0)
    return self.returncode

  def wait(self, timeout):
    if self.returncode is None:
      if not select.select([self._status], [], [], timeout)[0]:
        raise subprocess.TimeoutExpired(self.args, timeout)
      self.returncode = int(self._status.readline())
      self._status.close()
    return self.returncode

  def text(self, stream=0):
    """Returns what it has printed so far; stream 1 is that of errors."""
    file = self._texts[stream].fileno()
    return os.pread(file, os.fstat(file).st_size, 0).decode()

  def end(self):
    """Ends it if it runs, and closes what holds its output."""
    if self.poll() is None:
      self.kill()
    self.communicate()

  def communicate(self, timeout=600):
    """Returns what it printed, and its errors: None where both are together."""
    self.wait(timeout)
    texts = [None if file.closed else self.text(stream)
             for stream, file in enumerate(self._texts)]
    for file in self._texts:
      file.close()
    return *texts, *[None] * (2 - len(texts))


def run(*arguments, environment=None, timeout=600):
  """Runs `python ARGUMENTS` to its end; returns a subprocess.CompletedProcess."""
  process = Process(*arguments, environment=environment)
  try:
    texts = process.communicate(timeout)
  finally:
    if process.poll() is None:
      process.kill()
  return subprocess.CompletedProcess(arguments, process.returncode, *texts)


@functools.cache
def _server():
  """A socket to a process that forks the others, and that process; it ends with this one."""
  ours, theirs = socket.socketpair()
  with theirs:
    process = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())], cwd=ROOT, pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
  for end in (process.wait, process.kill, ours.close):  # From the last one on.
    atexit.register(end)
  return ours, process


def _serve(channel):
  """Imports what is costly; returns in every process that is asked for, with what is to be run."""
  sys.path[0] = ''
  for name in PRELOADED:
    importlib.import_module(name)
  gc.collect()
  gc.freeze()
  # None waits for those that wait below.
  signal.signal(signal.SIGCHLD, signal.SIG_IGN)
  while True:
    asked, files, *_ = socket.recv_fds(channel, 1, 4)
    if not asked:
      sys.exit()
    if not os.fork():
      break
    for file in files:
      os.close(file)
  channel.close()
  signal.signal(signal.SIGCHLD, signal.SIG_DFL)
  asked, *streams, status = files
  child = os.fork()
  if child:
    for stream in streams:
      os.close(stream)
    os.write(status, b'%d\n' % child)
    os.write(status, b'%d\n' % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)
  os.close(status)
  for number, stream in enumerate(streams, 1):
    os.dup2(stream, number)
    os.close(stream)
  # A run that nohup hides a signal from would hide it from what it starts.
  signal.signal(signal.SIGHUP, signal.SIG_DFL)
  with open(asked) as file:
    arguments, environment = json.load(file)
  os.environ.clear()
  os.environ.update(environment)
  return arguments


def on_devices(count, code, *args, flags=''):
  """Runs code on fake devices; what it prints last is JSON."""
  done = run('-c', PRELUDE + code, *args, timeout=900, environment={
      'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} {flags} '
                   f'--xla_force_host_platform_device_count={count}'})
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


PRELUDE = '''
import functools, json, re, sys
import jax, jax.numpy as jnp, numpy as np, optax
from configs import digits
from configs.parts import VIT_SHARDING
from lib.cost import vit as vit_cost
from lib.runtime import sharding
from lib.tasks.image import loss
from models.build import build
from models.stack import unstack
from models.backbones.vit import make_vit
from models.plan import make_plan
import train

def small(mesh, reduce=None, **settings):
  model = dict(variant='Ti/8', width=64, heads=4, mlp=128, depth=3, image_size=32, channels=1,
               num_classes=10) | settings
  return build(model, reduce, macs=vit_cost.solver, mesh=mesh)

def init(vit, key):
  images = jnp.zeros((1, vit.image_size, vit.image_size, vit.channels))
  return vit.clone(mesh=None).init(key, images)['params']
'''


if __name__ == '__main__':
  how, what, *sys.argv[1:] = _serve(socket.socket(fileno=int(sys.argv[1])))
  if how == '-m':
    runpy.run_module(what, run_name='__main__', alter_sys=True)
  else:
    sys.argv[0] = '-c'
    sys.modules['__main__'] = types.ModuleType('__main__')
    exec(what, vars(sys.modules['__main__']))
