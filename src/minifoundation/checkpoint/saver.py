"""Step checkpoints beside the training: copied to host memory, then written by one thread."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor

from minifoundation.checkpoint.folder import Checkpoint, first_of_a_row, prune, write_step
from minifoundation.checkpoint.tensors import HostCopy, Layout, raw
from minifoundation.container import free_memory_bytes
from minifoundation.errors import UserError

SPARE = 0.5
"""Share of the free host memory that the copy of a checkpoint may take; where it would take more, training waits for the write."""

SLACK = 2**20
"""Bytes of a checkpoint that are not tensors: settings, ledger, tokenizer and what the file system keeps of them, about."""


class Saver:
    """Writes the checkpoints of a run, one at a time.

    In the background a save only has the state copied to host memory, which is kept from one save to the next; ``hold`` has to be
    called before the state is changed. One thread then writes and hashes the copy, in large blocks that leave the interpreter free.
    A second save waits for the first, and what went wrong in one is raised by ``check`` or the next call. As a context it waits at its end
    for what is being written (``close``).

    Args:
        background: write beside the training.
        if_fails: ``stop`` raises what a save failed with; ``continue`` says it and trains on.
        say: prints a line for the person.
    """

    def __init__(
        self,
        out_dir: Path,
        *,
        keep: int,
        keep_every: int | None,
        background: bool,
        if_fails: Literal["stop", "continue"],
        say: Callable[[str], None],
    ) -> None:
        self.out_dir = out_dir
        self._keep = keep
        self._keep_every = keep_every
        self._background = background
        self._if_fails = if_fails
        self._say = say
        self._copy: HostCopy | None = None
        self._writing: Future[None] | None = None
        self._saved: int | None = None
        """The step that was saved, or given to the writer, last."""

    def save(self, checkpoint: Checkpoint) -> None:
        """Save ``checkpoint``, or begin to; one of the same step is not written twice.

        Raises:
            UserError, OSError: as ``accepts`` and ``write``.
        """
        if self.accepts(checkpoint):
            self.write(checkpoint)

    def accepts(self, checkpoint: Checkpoint) -> bool:
        """Return whether ``checkpoint`` is to be written now, when the one before has been: not twice, and not to a disk without room.

        Raises:
            UserError, OSError: there is no room, or the save before could not be written, and ``if_fails`` is ``stop``.
        """
        step = checkpoint.progress["step"]
        if step == self._saved:
            return False
        if not self.idle:
            began = time.perf_counter()
            self.finish()
            self._say(f"step {step:,}: waited {time.perf_counter() - began:.1f} s for the checkpoint before to be written")
        self.finish()
        try:
            self._check_space(checkpoint.layout.n_bytes)
        except (UserError, OSError) as error:
            self.failed(error)
            return False
        return True

    def write(self, checkpoint: Checkpoint) -> None:
        """Write ``checkpoint``, or begin to; of tensors that are split the other processes give their parts (``Checkpoint.gathered``).

        Raises:
            UserError, OSError: it could not be written, and ``if_fails`` is ``stop``.
        """
        self._saved = checkpoint.progress["step"]
        tensors = checkpoint.tensors()
        layout, gathered = checkpoint.layout, checkpoint.gathered()
        arguments = (checkpoint.state(), layout, checkpoint.tokenizer_model)
        copy = self._host_copy(layout, tensors) if self._background else None
        if copy is None:
            self._writing = Future()
            self._write(self._writing, *arguments, (raw(tensor) for _, tensor in gathered))
            for _ in gathered:
                pass  # the others give all of it, whatever became of the file
            self.finish()
            return
        copy.fill(gathered)
        self._writing = Future()
        # A daemon, so that a second Ctrl-C leaves at once; what it leaves behind is not a checkpoint yet.
        Thread(target=self._write, args=(self._writing, *arguments, copy.blocks()), name="checkpoint", daemon=True).start()

    def hold(self) -> None:
        """Have the device finish copying what is being saved before it changes anything; nothing waits on the host."""
        if self._copy is not None:
            self._copy.hold()

    def check(self) -> None:
        """Raise what a save in the background has failed with, if one has."""
        if self.idle:
            self.finish()

    @property
    def idle(self) -> bool:
        """Whether nothing is being written."""
        return self._writing is None or self._writing.done()

    def finish(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            UserError, OSError: what the save failed with, when ``if_fails`` is ``stop``.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        error = writing.exception()
        if error is not None:
            self._saved = None
            self.failed(self._gone() or error)

    def close(self) -> None:
        """Wait for what is being written, say it if that fails, and give the host memory back."""
        if self._writing is not None and (error := self._writing.exception()) is not None:
            self._say(f"warning: not written: {_reason(self._gone() or error)}")
        if self._copy is not None:
            self._copy.close()
            self._copy = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, KeyboardInterrupt):  # a second signal leaves at once, whatever is being written
            self.close()

    def failed(self, error: BaseException) -> None:
        """Raise what could not be written, or say it and go on, as ``if_fails`` has it."""
        if self._if_fails == "stop" or not isinstance(error, (UserError, OSError)):
            raise error
        self._say(f"warning: not written: {_reason(error)}; training on, since train.if_save_fails is continue")

    def _gone(self) -> UserError | None:
        """Return what to say of a folder that has been moved or removed under the run; None while it is there."""
        if self.out_dir.is_dir():
            return None
        return UserError(str(self.out_dir), "the folder of the run is gone", "find out where it went, and continue with --resume auto")

    def _check_space(self, tensor_bytes: int) -> None:
        if gone := self._gone():
            raise gone
        needed, free = tensor_bytes + SLACK, shutil.disk_usage(self.out_dir).free
        if needed > free:
            raise UserError(
                str(self.out_dir),
                f"a checkpoint takes {size(needed)}, and {size(free)} are free on its disk",
                "free some space and continue with --resume auto",
            )

    def _host_copy(self, layout: Layout, tensors: Mapping[str, Tensor]) -> HostCopy | None:
        """Return host memory for ``tensors``; None, from now on, where there is too little of it."""
        if self._copy is not None and self._copy.layout == layout:
            return self._copy
        if self._copy is not None:
            self._copy.close()
            self._copy = None
        device = next((tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"), torch.device("cpu"))
        free = free_memory_bytes()
        try:
            if layout.n_bytes > SPARE * free:
                raise MemoryError(f"{size(layout.n_bytes)} would be needed, and {size(free)} are free")
            self._copy = HostCopy(layout, device)
        except MemoryError as error:
            self._say(f"warning: train.async_save: too little host memory ({error}); training waits for each checkpoint")
            self._background = False
        return self._copy

    def _write(self, writing: Future[None], state: dict[str, Any], layout: Layout, tokenizer: bytes, body: Iterable[memoryview]) -> None:
        try:
            folder = write_step(state, layout, body, tokenizer, self.out_dir)
            prune(folder, keep=self._keep, keep_every=self._keep_every, before=first_of_a_row(state["progress"]))
        except BaseException as error:
            writing.set_exception(error)
        else:
            writing.set_result(None)


def _reason(error: BaseException) -> str:
    return f"{error.filename}: {str(error.strerror).lower()}" if isinstance(error, OSError) else str(error)


def size(n_bytes: int) -> str:
    """Return a number of bytes for a person."""
    return f"{n_bytes / 2**30:,.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:,.1f} MiB"
