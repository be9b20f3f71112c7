"""Shards for a run: what is there or quickly made at once, the rest by a process in the background while the run trains."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

from minifoundation.config import DataConfig
from minifoundation.container import cores
from minifoundation.data.engines import Engine, local
from minifoundation.data.prepare import prepare_shards, shards_folder
from minifoundation.data.samples import samples_from
from minifoundation.data.shards import MANIFEST, Shards
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.errors import UserError

GAVE_A_REASON = 3
"""Exit code of the background process when its error is in the pipe."""

_SPAWN = multiprocessing.get_context("spawn")

RESTARTS = 1
"""A background process that is killed, by the system when memory runs out for one, is started again this often."""

FIRST_ROUND = 64
"""The first round makes this part of what is wanted of each source of a mixture."""

NICENESS = 10
"""The background leaves the processor to training where both want it."""


@dataclass(frozen=True)
class Want:
    """Training samples that a run reads of one source."""

    source: str
    first_shard: int
    samples: int
    """Counted from ``first_shard`` on."""
    seq_len: int

    def met(self, shards: Shards, samples: int) -> bool:
        """Return whether the shards hold the first ``samples`` of the samples wanted, or the whole corpus."""
        return shards.complete or samples_from(shards, self.first_shard, self.seq_len) >= min(samples, self.samples)


def prepared(
    want: Want, samples: int, config: DataConfig, tokenizer: Tokenizer, *, engine: Engine | None = None, show_progress: bool = True
) -> Shards:
    """Return the source's shards, with at least the first ``samples`` of the samples wanted, or the whole corpus.

    No more shards are made than that takes. What another process is making in the folder is waited for.

    Raises:
        UserError, OSError: as ``prepare_shards``.
    """
    samples = min(samples, want.samples)
    make = partial(prepare_shards, want.source, config, tokenizer, engine=engine, wait_for_lock=True, show_progress=show_progress)

    # A shard's last tokens may be too few for a sample, so as many tokens as the samples take can fall short of them, by a shard or two.
    begun = (shards_folder(want.source, config, tokenizer) / MANIFEST).exists()
    shards = make(tokens=1 if begun else want.first_shard * config.shard_tokens + samples * want.seq_len + 1)
    while not want.met(shards, samples):
        missing = samples - samples_from(shards, want.first_shard, want.seq_len)
        shards = make(tokens=shards.train_tokens + missing * want.seq_len)
    return shards


def rounds(wants: Sequence[Want]) -> Iterator[tuple[Want, int]]:
    """Yield (what is wanted of a source, samples of it to have by then) in an order in which no source is far behind the others.

    A single source is made in one go. The sources of a mixture are taken in turn, and each round doubles how far the run can come.
    """
    parts = 1 if len(wants) == 1 else FIRST_ROUND
    while parts >= 1:
        for want in wants:
            yield want, -(-want.samples // parts)
        parts //= 2


class Supply:
    """A process that makes the shards which ``wants`` ask for, and which ends with its parent, however that ends.

    Leaving the context stops the work; complete shards are kept.
    """

    def __init__(self, wants: Sequence[Want], config: DataConfig, tokenizer: Path) -> None:
        self._arguments = (tuple(wants), config, tokenizer)
        self._restarts = RESTARTS
        self._error: Exception | None = None
        self._start()

    def _start(self) -> None:
        self._pipe, other_end = _SPAWN.Pipe(duplex=False)
        # No daemon in the sense of multiprocessing, since those cannot have worker processes.
        self._process = _SPAWN.Process(target=_make, args=(other_end, *self._arguments), name="prepare")
        self._process.start()
        other_end.close()

    def fault(self) -> Exception | None:
        """Return what ended the work too early; None while it goes on and when all is made."""
        if self._error is not None or self._process.is_alive() or self._process.exitcode == 0:
            return self._error
        code = self._process.exitcode or 0
        if self._process.exitcode == GAVE_A_REASON:
            self._error = self._pipe.recv()
        elif code < 0 and self._restarts:
            self._restarts -= 1
            self._pipe.close()
            self._start()
        else:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            self._error = UserError("data", f"the process that makes token shards {how}", "lower data.workers if memory ran out")
        return self._error

    def close(self) -> None:
        """Stop the work."""
        if self._process.is_alive():
            self._process.terminate()
        self._process.join()
        self._pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _make(pipe: Connection, wants: Sequence[Want], config: DataConfig, tokenizer: Path) -> None:
    """Make what is wanted; the entry of the background process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal goes to every process there; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(NICENESS)
    try:
        loaded = Tokenizer.load(tokenizer)
        with closing(local(config.workers or cores())) as engine:  # one for all the rounds
            for want, samples in rounds(wants):
                prepared(want, samples, config, loaded, engine=engine, show_progress=False)
    except (UserError, OSError) as error:
        pipe.send(error)
        sys.exit(GAVE_A_REASON)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
