"""Winnow's vision-language models in lmms-eval, with any reduction.

  python -m adapters.lmms --model winnow --tasks mme,pope --batch_size 4 \\
      --model_args path=checkpoints/llava-1.5-7b-hf,dtype=bfloat16,reduce=fastv.json

where fastv.json holds {"language": {"method": "fastv", "layers": 2, "keep_ratio": 0.5}}. All that
lmms-eval's own command line offers works: this one only makes 'winnow' known to it. In python,
importing this module is enough. Needs `pip install -r requirements-harness.txt` and lmms-eval.

Images stand where the text says '<image>', or in front. Videos and several rounds are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.__main__ import cli_evaluate
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from adapters.answerer import BUCKETS, Answerer, Question, Settings
from lib.data.image_files import upright

NAME = 'winnow'


class WinnowLMM(lmms):
  """Runs a model by its folder.

  Args:
    path, reduce, dtype, data_dir: as of `adapters.answerer.Answerer`.
    batch_size: rows of a batch.
    buckets: lengths that prompts are padded to, as '64:256:1024'.
    new_tokens: the most to decode where a task does not say.
    template: whether to wrap texts in the checkpoint's chat template, if it has one.
    max_batch_size, device: lmms-eval gives them; JAX chooses its devices itself.
  """

  def __init__(self, path: str, *, reduce: Any = None, batch_size: Any = 1,
               dtype: str = 'float32', buckets: Any = BUCKETS, new_tokens: int = 1024,
               template: bool = True, data_dir: str = '', max_batch_size: Any = None,
               device: Any = None):
    del max_batch_size, device
    super().__init__()
    self.answerer = Answerer(path, reduce=reduce, batch_size=batch_size, dtype=dtype,
                             buckets=buckets, data_dir=data_dir)
    self._new_tokens, self._template = int(new_tokens), template

  def generate_until(self, requests: Sequence[Instance]) -> list[str]:
    """Returns answers up to what a task says ends them."""
    questions = []
    for context, arguments, visual, *place in (request.args for request in requests):
      images = self._images(visual, *place)
      questions.append(Question(self._prompt(context, images), images,
                                settings=Settings.of(arguments, new_tokens=self._new_tokens)))
    return self.answerer.texts_of(requests, questions, self.cache_hook)

  def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
    """Returns (loss, whether greedy decoding gives it) of each answer, as the `text` of a result.

    The loss is the mean over the answer's tokens of minus the logarithm: this harness takes the
    choice with the smallest number, not the largest. A bare pair it would turn into text (0.7.3).
    """
    questions = []
    for context, target, *rest in (request.args for request in requests):
      # Without a document: a choice by itself, for mutual information.
      images = self._images(*rest) if rest else ()
      if callable(target):
        _, number, task, split = rest
        target = target(self.task_dict[task][split][number])
      answer = self.answerer.assistant.tokens.encode(str(target), special=False)
      questions.append(Question(self._prompt(context, images), images, answer=tuple(answer)))
    return [GenerationResult((-score.log_likelihood / len(question.answer), score.greedy))
            for question, score in zip(questions, self.answerer.scores(questions), strict=True)]

  def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
    """Refuses: several rounds are not offered.

    Raises:
      NotImplementedError: always.
    """
    raise NotImplementedError('winnow answers one round: choose a task of generate_until or '
                              'multiple_choice')

  def _prompt(self, context: str, images: Sequence[Image.Image]) -> tuple[int, ...]:
    return tuple(self.answerer.assistant.prompt(context, images=len(images),
                                                template=self._template))

  def _images(self, visual: Any, number: int, task: str, split: str) -> tuple[Image.Image, ...]:
    """Returns the images that a task shows of a document.

    Raises:
      ValueError: anything but images.
    """
    shown = visual(self.task_dict[task][split][number]) if visual else None
    shown = list(shown or ())
    for each in shown:
      if not isinstance(each, Image.Image):
        raise ValueError(f'{task} shows {type(each).__name__}, and winnow sees images alone: '
                         'choose a task of images')
    return tuple(upright(each) for each in shown)


def register() -> None:
  """Makes 'winnow' a model that the harness knows."""
  MODEL_REGISTRY_V2.register_manifest(ModelManifest(
      NAME, simple_class_path='adapters.lmms.WinnowLMM'), overwrite=True)


register()

if __name__ == '__main__':
  cli_evaluate()
