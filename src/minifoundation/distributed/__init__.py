"""These processes: who am I, how many are we, and what we compute together. Alone imports torch.distributed."""

from minifoundation.distributed.context import Context, sharing_rows
from minifoundation.distributed.replica import Copied, Replica
from minifoundation.distributed.split import Parallel, Split, finish_gradients, local_gradients, share_weights, spread, trained
from minifoundation.distributed.start import is_first_process, join
from minifoundation.distributed.tensors import is_split, local, part_of, whole
from minifoundation.distributed.watch import LONGER, Watch, leave
from minifoundation.distributed.world import World

__all__ = [
    "LONGER",
    "Context",
    "Copied",
    "Parallel",
    "Replica",
    "Split",
    "Watch",
    "World",
    "finish_gradients",
    "is_first_process",
    "is_split",
    "join",
    "leave",
    "local",
    "local_gradients",
    "part_of",
    "share_weights",
    "sharing_rows",
    "spread",
    "trained",
    "whole",
]
