"""Going back: to the last checkpoint before a row of bad steps, and over the samples of these."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minifoundation.checkpoint import MANIFEST, UNDONE, latest_good, set_aside, step_folders, step_of, write_whole
from minifoundation.errors import UserError
from minifoundation.train.printer import Say
from minifoundation.wording import counted

ROLLBACKS = "rollbacks.json"
"""In the folder of a run: each time it went back, so that a run that is killed after that steps over the same samples again."""


@dataclass(frozen=True)
class Bad:
    """Steps in a row that were skipped, with nothing learnt from any."""

    first_step: int
    last_step: int
    first_sample: int
    end: int
    """The sample after the last of them."""
    seen: str
    """What was wrong with the last one, in words."""

    def __str__(self) -> str:
        return f"steps {self.first_step:,} to {self.last_step:,} (samples {self.first_sample:,} to {self.end - 1:,}): {self.seen}"


def rollbacks(out_dir: Path) -> list[dict[str, Any]]:
    """Return each time the run in ``out_dir`` went back: ``to``, the step, and the fields of ``Bad``.

    Raises:
        UserError: the file is damaged.
    """
    path = out_dir / ROLLBACKS
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for one in found:
            Bad(**{name: value for name, value in one.items() if name != "to"})
            int(one["to"]), int(one["first_sample"]), int(one["end"])
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        raise UserError(str(path), "is damaged", "restore it, or remove it: the samples it names will then be read again") from None
    return list(found)


def stepped_over(out_dir: Path) -> list[list[int]]:
    """Return the samples that the run in ``out_dir`` leaves out: first and end of each range."""
    return [[one["first_sample"], one["end"]] for one in rollbacks(out_dir)]


def checkpoint_before(bad: Bad, out_dir: Path, begun: Path | None, *, most: int, say: Say) -> Path | None:
    """Return the checkpoint to go back to, None for the beginning; nothing is changed.

    It is the newest good one from before the first bad step; from before the one that was gone back to last, when no step since was good:
    then the weights in that were bad already. Where the run has none of its own it is the one that it went on from.

    Args:
        begun: the checkpoint that it went on from, perhaps in another folder or under another name than a run's own.

    Raises:
        UserError: the run has gone back ``most`` times, or all that is left from before is a checkpoint of bad weights.
    """
    before = rollbacks(out_dir)
    if len(before) >= most:
        told = "; ".join(f"{one['seen']} at step {one['last_step']:,}" for one in before[-3:])
        raise UserError(
            "train.max_rollbacks",
            f"{bad}, after going back {counted(len(before), 'time')}" + (f" ({told})" if told else ""),
            "begin again in another --out_dir with a lower --lr, a longer --train.warmup or bf16 instead of fp16; "
            "or, when the text is at fault, look at these samples",
        )
    at_once = bool(before) and before[-1]["to"] >= bad.first_step - 1
    earlier_than = before[-1]["to"] if at_once else bad.first_step
    own = latest_good(out_dir, say, before=earlier_than)
    if own is not None:
        return own
    elsewhere = begun is not None and begun.exists() and begun.resolve() not in [folder.resolve() for folder in step_folders(out_dir)]
    if begun is not None and elsewhere and _step_in(begun) < earlier_than:
        return begun
    if at_once and before[-1]["to"] > 0:  # a run of days does not begin anew by itself
        raise UserError(
            str(out_dir),
            f"{bad}, at once after going back to step {before[-1]['to']:,}, and there is no checkpoint from before that",
            "begin again in another --out_dir; a higher --train.keep, or --train.keep_every, has more to go back to",
        )
    return None


def record_rollback(bad: Bad, folder: Path | None, out_dir: Path) -> None:
    """Set the run's checkpoints after ``folder`` aside, and note that it goes back to that one and steps over ``bad``.

    In this order: a run that is killed in between comes to the same steps again and goes back then. The other way round it would go on
    from a later checkpoint.
    """
    step = 0 if folder is None else _step_in(folder)
    for later in step_folders(out_dir):
        if step_of(later) > step:
            set_aside(later, UNDONE)
    write_whole(out_dir / ROLLBACKS, json.dumps([*rollbacks(out_dir), {"to": step, **asdict(bad)}], indent=1).encode())


def _step_in(place: Path) -> int:
    """Return the step of a good checkpoint to go on from, under whatever name it lies; a ``final.pth`` is one at step 0 alone."""
    return 0 if place.is_file() else int(json.loads((place / MANIFEST).read_bytes())["step"])
