"""Checkpoints: files that are written whole or not at all, and what is in them."""

from minifoundation.checkpoint.files import write_whole
from minifoundation.checkpoint.folder import (
    FINAL,
    FINAL_MANIFEST,
    FORMAT,
    MANIFEST,
    STATE,
    TENSORS,
    UNDONE,
    Checkpoint,
    save_final,
    set_aside,
    step_folder,
    step_folders,
    step_of,
    tidy,
    write_step,
)
from minifoundation.checkpoint.reading import REMEDY, fault, latest_good, load_checkpoint
from minifoundation.checkpoint.saver import Saver

__all__ = [
    "FINAL",
    "FINAL_MANIFEST",
    "FORMAT",
    "MANIFEST",
    "REMEDY",
    "STATE",
    "TENSORS",
    "UNDONE",
    "Checkpoint",
    "Saver",
    "fault",
    "latest_good",
    "load_checkpoint",
    "save_final",
    "set_aside",
    "step_folder",
    "step_folders",
    "step_of",
    "tidy",
    "write_step",
    "write_whole",
]
