"""Finds and reads checkpoints: a file, a folder or a name on the hub; safetensors alone."""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from models.checkpoints.json_files import read_json, read_json_if_there

PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.npz', '.npy')
INDEX = 'model.safetensors.index.json'
WANTED = ('*.safetensors', '*.json')
# Stored dtypes that are read, as the format calls them.
FLOATS = ('BF16', 'F16', 'F32', 'F64')


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
  if not path.is_dir():
    if path.suffix in PICKLES:
      raise ValueError(f'{path} is a pickle, which can run anything when it is opened, and is '
                       'never read here: use the .safetensors file of that model, or convert it '
                       'where you trust it')
    if path.suffix != '.safetensors':
      raise ValueError(f'{path} is no .safetensors file, and nothing else is read: convert it, or '
                       'give a folder with one')
    return [path]
  if (path / INDEX).exists():
    names = sorted(set(_weight_map(path / INDEX).values()))
    missing = [name for name in names if not (path / name).exists()]
    if missing:
      raise ValueError(f'{path} lacks {", ".join(missing)}, which its {INDEX} names: fetch what is '
                       'missing')
    return [path / name for name in names]
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


def _weight_map(index: pathlib.Path) -> dict[str, str]:
  """Returns the file of each tensor that an index names.

  Raises:
    ValueError: it has another form, or names a file that is not a .safetensors file beside it.
  """
  files = read_json(index).get('weight_map')
  if not (files and isinstance(files, dict)):
    raise ValueError(f'{index} has no weight_map, which says in which file each tensor lies: fetch '
                     'it again')
  for name, file in files.items():
    if not (isinstance(file, str) and re.fullmatch(r'[^/\\]+\.safetensors', file)):
      raise ValueError(f'{index} says that {name} lies in {file!r}, which is no .safetensors file '
                       'of that folder: fetch the checkpoint again')
  return files


class Tensors:
  """The tensors of some files: names, shapes and dtypes at once, contents one by one.

  Attributes:
    shapes: by name.
    dtypes: by name, as the format calls them: 'BF16', 'F16', 'F32', 'F8_E4M3', 'I32', ...

  Raises:
    ValueError: a tensor is in two files.
  """

  def __init__(self, handles: Mapping[pathlib.Path, Any]):
    self._home: dict[str, tuple[pathlib.Path, Any]] = {}
    for file, handle in handles.items():
      for name in handle.keys():  # noqa: SIM118
        if name in self._home:
          raise ValueError(f'{name} is in two files, {self._home[name][0]} and {file.name}: which '
                           'of them is meant, nothing says; fetch the checkpoint again')
        self._home[name] = file, handle
    slices = {name: handle.get_slice(name) for name, (_, handle) in self._home.items()}
    self.shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
    self.dtypes = {name: each.get_dtype() for name, each in slices.items()}

  def check_dtype(self, name: str) -> None:
    """Raises ValueError for a tensor that does not hold floats of 16 to 64 bits."""
    if self.dtypes[name] not in FLOATS:
      raise ValueError(f'{name} of {self._home[name][0]} is stored as {self.dtypes[name]}, as '
                       'quantized weights are, which are not read: use the checkpoint in bfloat16, '
                       'float16 or float32')

  def read(self, name: str) -> np.ndarray:
    """Reads one tensor, in its stored dtype.

    Raises:
      ValueError: it holds no floats, or NaN or infinity among them.
    """
    self.check_dtype(name)
    file, handle = self._home[name]
    array = handle.get_tensor(name)
    if not _finite(array):
      raise ValueError(f'{name} of {file} holds NaN or infinity, with which every output would be '
                       'NaN: use a checkpoint from before its training failed, or fetch it again')
    return array


def _finite(array: np.ndarray) -> bool:
  """Returns whether no value is NaN or infinite, in two passes over the bits and no copy.

  The bits of NaN lie above those of infinity: among integers with a sign above those of every
  positive value, among integers without one above those of every negative one.
  """
  if not array.size:
    return True
  size = array.dtype.itemsize
  top, lowest = np.array([np.inf, -np.inf], array.dtype).view(f'u{size}')
  return bool(array.view(f'i{size}').max() < top and array.view(f'u{size}').max() < lowest)


@contextlib.contextmanager
def reading(files: list[pathlib.Path]) -> Iterator[Tensors]:
  """Opens files; nothing is read yet.

  Raises:
    ValueError: a file is missing, is not what its name says, or lacks what the index beside it says
      that it holds; or a tensor is in two of them.
  """
  with contextlib.ExitStack() as stack:
    handles = {}
    for file in files:
      _check_regular(file)
      try:
        handles[file] = stack.enter_context(safe_open(file, framework='numpy'))
      except (SafetensorError, OSError) as error:
        raise ValueError(f'{file} cannot be read as safetensors ({error}): fetch it '
                         'again') from error
    _check_index(handles)
    yield Tensors(handles)


def _check_index(handles: Mapping[pathlib.Path, Any]) -> None:
  index = next(iter(handles)).parent / INDEX
  if not index.exists():
    return
  file_of = _weight_map(index)
  for file, handle in handles.items():
    said = {name for name, home in file_of.items() if home == file.name}
    missing = sorted(said - set(handle.keys()))
    if missing:
      more = f' and {len(missing) - 1} more' if len(missing) > 1 else ''
      raise ValueError(f'{file} lacks {missing[0]}{more}, which {INDEX} says that it holds: fetch '
                       'it again')


def config(path: pathlib.Path) -> Mapping[str, Any]:
  """Returns the content of config.json beside the tensors, {} where there is none.

  Raises:
    ValueError, OSError: as models/checkpoints/json_files.py.
  """
  return read_json_if_there((path if path.is_dir() else path.parent) / 'config.json')


def _check_regular(file: pathlib.Path) -> None:
  """Raises ValueError for what is there and no regular file: opening a pipe would wait forever."""
  if file.exists() and not file.is_file():
    raise ValueError(f'{file} is no regular file: give the file itself')
