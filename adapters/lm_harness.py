"""Winnow's language models in EleutherAI's lm-evaluation-harness (lm-eval), with any reduction.

  python -m adapters.lm_harness run --model winnow --tasks hellaswag --batch_size 8 \\
      --model_args path=checkpoints/qwen2.5-0.5b dtype=bfloat16
  python -m adapters.lm_harness run --model winnow --tasks gsm8k --apply_chat_template \\
      --model_args path=checkpoints/llama-3.1-8b-instruct \\
      'reduce={"cache": {"method": "snapkv", "keep_ratio": 0.5}}'

All that lm-eval's own command line offers works: this one only makes 'winnow' known to it. In
python, importing this module is enough. Needs `pip install -r requirements-harness.txt`.

A reduction acts on a request's context, as it would when an answer is decoded; the continuation
whose likelihood is asked for, or that is decoded, is read whole. Rolling likelihoods have no
context to speak of, so that only what is reduced of their windows' overlap changes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from adapters.answerer import BUCKETS, Answerer, Question, Settings


@register_model('winnow')
class WinnowLM(TemplateLM):
  """Runs a model by its folder.

  Args:
    path, reduce, dtype, data_dir: as of `adapters.answerer.Answerer`.
    batch_size: rows of a batch; 'auto' is 8.
    buckets: lengths that prompts are padded to, as '64:256:1024'.
    new_tokens: the most to decode where a task does not say.
    max_batch_size, device: lm-eval gives them; JAX chooses its devices itself.
  """

  def __init__(self, path: str, *, reduce: Any = None, batch_size: Any = 8,
               dtype: str = 'float32', buckets: Any = BUCKETS, new_tokens: int = 256,
               data_dir: str = '', max_batch_size: Any = None, device: Any = None):
    del max_batch_size, device
    super().__init__()
    self.answerer = Answerer(path, reduce=reduce, batch_size=batch_size, dtype=dtype,
                             buckets=buckets, data_dir=data_dir)
    self.batch_size = self.answerer.batch_size
    self._new_tokens, self._path = int(new_tokens), str(path)

  @property
  def max_length(self) -> int:
    """Tokens that a prompt and its answer may have together."""
    return self.answerer.context

  @property
  def eot_token_id(self) -> int:
    """Id of the token that ends a text, or of the one that starts texts where none ends them."""
    ends = self.answerer.assistant.ends
    return ends[0] if ends else self.prefix_token_id

  @property
  def prefix_token_id(self) -> int:
    """Id of the token put before a text that has nothing before it.

    Raises:
      ValueError: neither a token that starts texts nor one that ends them is known.
    """
    assistant = self.answerer.assistant
    ids = [*assistant.encode('')[:1], *assistant.ends]
    if not ids:
      raise ValueError(f'{self._path} names no token that starts or ends a text: set eos_token_id '
                       'in its generation_config.json')
    return ids[0]

  def tok_encode(self, string: str, add_special_tokens: bool | None = None,
                 **kwargs: Any) -> list[int]:
    """Returns ids of a text; None adds what starts texts unless the text has it."""
    del kwargs
    assistant = self.answerer.assistant
    if add_special_tokens is None:
      return assistant.encode(string)
    return assistant.tokens.encode(string, special=add_special_tokens)

  def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]],
                            **kwargs: Any) -> list[tuple[float, bool]]:
    """Returns likelihoods of continuations; the beginning of a context that is too long goes."""
    del kwargs
    questions = []
    for _, context, continuation in requests:
      left = max(1, self.max_length - len(continuation) + 1)
      questions.append(Question(tuple(context[-left:]), answer=tuple(continuation)))
    answers = [(score.log_likelihood, score.greedy) for score in self.answerer.scores(questions)]
    for (key, *_), answer in zip(requests, answers, strict=True):
      if key is not None:
        self.cache_hook.add_partial('loglikelihood', key, answer)
    return answers

  def loglikelihood_rolling(self, requests: Sequence[Instance],
                            disable_tqdm: bool = False) -> list[float]:
    """Returns likelihoods of whole texts, in windows of the context where they are longer."""
    del disable_tqdm
    windows, owners = [], []
    for number, request in enumerate(requests):
      ids = self.tok_encode(request.args[0], add_special_tokens=False)
      for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
        windows.append((None, *make_disjoint_window(pair)))
        owners.append(number)
    totals = [0.0] * len(requests)
    for number, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
      totals[number] += score
    for request, score in zip(requests, totals, strict=True):
      self.cache_hook.add_partial('loglikelihood_rolling', request.args, score)
    return totals

  def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
    """Returns answers up to what a task says ends them."""
    del disable_tqdm
    questions = []
    for context, arguments in (request.args for request in requests):
      settings = Settings.of(arguments, new_tokens=self._new_tokens)
      left = self.max_length - settings.new_tokens
      if left < 1:
        raise ValueError(f'{settings.new_tokens} new tokens leave nothing of a context of '
                         f'{self.max_length} for the prompt: set --gen_kwargs max_gen_toks lower')
      questions.append(Question(tuple(self.tok_encode(context)[-left:]), settings=settings))
    return self.answerer.texts_of(requests, questions, self.cache_hook)

  # Chats.

  @property
  def tokenizer_name(self) -> str:
    """Name that caches of requests go by."""
    return self._path

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """Returns the checkpoint's template; only its default one.

    Raises:
      ValueError: there is none.
    """
    if not chat_template:
      return None
    if self.answerer.assistant.chat is None:
      raise ValueError(f'{self._path} has no chat template: leave out --apply_chat_template')
    return self.answerer.assistant.chat.source

  def apply_chat_template(self, chat_history: list[dict[str, str]],
                          add_generation_prompt: bool = True) -> str:
    """Returns the text of a conversation."""
    return self.answerer.assistant.chat(chat_history, answer=add_generation_prompt)


if __name__ == '__main__':
  cli_evaluate()
