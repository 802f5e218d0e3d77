"""Finds and reads checkpoints: a file, a folder or a name on the hub; safetensors alone."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.npz', '.npy')
INDEX = 'model.safetensors.index.json'
WANTED = ('*.safetensors', '*.json')


def locate(source: str | pathlib.Path) -> pathlib.Path:
  """The file or folder that a source names; a name on the hub ('owner/name') is fetched first.

  Args:
    source: a path, or 'owner/name' or 'owner/name@revision' where no such path exists.

  Raises:
    ValueError: nothing there, the hub does not give it, or the package that fetches is missing.
  """
  path = pathlib.Path(source).expanduser()
  if path.exists():
    return path
  if not re.fullmatch(r'[\w.-]+/[\w.-]+(@[\w./-]+)?', str(source)):
    raise ValueError(f'there is no checkpoint at {source!r}: give a .safetensors file, a folder '
                     'with one, or a name on the hub as owner/name')
  try:
    import huggingface_hub
  except ImportError as error:
    raise ValueError(f'{source!r} is no folder here, and fetching it from the hub needs a package '
                     'that is not installed: `pip install -r requirements-hub.txt`, or give a '
                     'folder') from error
  name, _, revision = str(source).partition('@')
  try:
    folder = huggingface_hub.snapshot_download(name, revision=revision or None,
                                               allow_patterns=list(WANTED))
  except (OSError, ValueError) as error:
    reason = str(error).strip().partition('\n')[0]
    raise ValueError(f'{source!r} is no folder here, and the hub did not give it ({reason}): check '
                     'the path or the name, or give a folder that holds the files') from error
  return pathlib.Path(folder)


def tensor_files(path: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files of a checkpoint.

  Raises:
    ValueError: there are none, there are several and no index, some that the index names are
      missing, or they are pickles.
  """
  if path.is_file():
    if path.suffix in PICKLES:
      raise ValueError(f'{path} is a pickle, which can run anything when it is opened, and is '
                       'never read here: use the .safetensors file of that model, or convert it '
                       'where you trust it')
    if path.suffix != '.safetensors':
      raise ValueError(f'{path} is no .safetensors file, and nothing else is read: convert it, or '
                       'give a folder with one')
    return [path]
  if (path / INDEX).exists():
    names = sorted(set(json.loads((path / INDEX).read_text())['weight_map'].values()))
    missing = [name for name in names if not (path / pathlib.Path(name).name).exists()]
    if missing:
      raise ValueError(f'{path} lacks {", ".join(missing)}, which its {INDEX} names: fetch what is '
                       'missing')
    return [path / pathlib.Path(name).name for name in names]
  tensor_paths = sorted(path.glob('*.safetensors'))
  if path / 'model.safetensors' in tensor_paths:
    return [path / 'model.safetensors']
  if len(tensor_paths) == 1:
    return tensor_paths
  names = sorted(entry.name for entry in path.iterdir())
  if tensor_paths:
    raise ValueError(f'{path} has several safetensors files and no {INDEX}: name one of '
                     f'{", ".join(file.name for file in tensor_paths)}')
  if any(pathlib.Path(name).suffix in PICKLES for name in names):
    raise ValueError(f'{path} has pickles only ({", ".join(names)}), which can run anything when '
                     'they are opened, and are never read here: use a .safetensors file')
  raise ValueError(f'{path} has no .safetensors file, only {", ".join(names) or "nothing"}')


class Tensors:
  """The tensors of some files: names and shapes at once, contents one by one."""

  def __init__(self, handles: list[Any]):
    self._home = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118
    self.shapes = {name: tuple(handle.get_slice(name).get_shape())
                   for name, handle in self._home.items()}

  def read(self, name: str) -> np.ndarray:
    """Reads one tensor, in its stored dtype."""
    return self._home[name].get_tensor(name)


@contextlib.contextmanager
def reading(files: list[pathlib.Path]) -> Iterator[Tensors]:
  """Opens files; nothing is read yet.

  Raises:
    ValueError: a file is missing, is not what its name says, or lacks what the index beside it says
      that it holds.
  """
  with contextlib.ExitStack() as stack:
    handles = []
    for file in files:
      try:
        handles.append(stack.enter_context(safe_open(file, framework='numpy')))
      except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f'{file} cannot be read as safetensors ({error}): fetch it '
                         'again') from error
    _check_index(files, handles)
    yield Tensors(handles)


def _check_index(files: list[pathlib.Path], handles: list[Any]) -> None:
  index = files[0].parent / INDEX
  if not index.exists():
    return
  file_of = json.loads(index.read_text())['weight_map']
  for file, handle in zip(files, handles, strict=True):
    said = {name for name, home in file_of.items() if pathlib.Path(home).name == file.name}
    missing = sorted(said - set(handle.keys()))
    if missing:
      more = f' and {len(missing) - 1} more' if len(missing) > 1 else ''
      raise ValueError(f'{file} lacks {missing[0]}{more}, which {INDEX} says that it holds: fetch '
                       'it again')


def config(path: pathlib.Path) -> Mapping[str, Any]:
  """config.json beside the tensors, or nothing."""
  folder = path if path.is_dir() else path.parent
  file = folder / 'config.json'
  return json.loads(file.read_text()) if file.exists() else {}
