"""What every run in a test would pay again: a tokenizer trained on the same text, and collections of all that a test process holds."""

from __future__ import annotations

import gc
import io
from collections.abc import Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from sentencepiece import SentencePieceTrainer

from minifoundation import runtime

_trained: dict[tuple[Any, ...], bytes] = {}
_train = SentencePieceTrainer.train


def _train_once(*, sentence_iterator: Iterable[str], model_writer: Any, **settings: Any) -> None:
    sentences = list(sentence_iterator)
    key = (tuple(sentences), *sorted(settings.items()))
    if key not in _trained:
        model = io.BytesIO()
        _train(sentence_iterator=iter(sentences), model_writer=model, **settings)
        _trained[key] = model.getvalue()
    model_writer.write(_trained[key])


@pytest.fixture(autouse=True)
def cheaper_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers of the same text and settings are trained once a process, and the collector looks at the youngest objects alone.

    A full collection takes a fifth of a second in a process that holds the test suite, a fifth of a tiny run.
    """
    monkeypatch.setattr(SentencePieceTrainer, "train", staticmethod(_train_once))
    of_the_youngest = {name: getattr(gc, name) for name in ("enable", "disable", "isenabled", "freeze", "unfreeze")}
    monkeypatch.setattr(runtime, "gc", SimpleNamespace(**of_the_youngest, collect=partial(gc.collect, 0)))
