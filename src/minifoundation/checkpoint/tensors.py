"""Named tensors as one file in the layout of safetensors: a header, then their bytes one after the other.

https://huggingface.co/docs/safetensors describes the layout. The library reads these files; it does not write them here because it
copies each tensor to a Python object first, and its file would have to be read again for its hash.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Field:
    """One tensor in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """Which tensors a file holds, in the order of their bytes: wide types first, so that each begins at a multiple of its width."""

    fields: tuple[Field, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """Return the layout of ``tensors``; it depends on names, types and shapes alone."""
        fields = [Field(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        return cls(tuple(sorted(fields, key=lambda field: (-field.dtype.itemsize, field.name))))

    @property
    def ends(self) -> list[int]:
        """Where the bytes of each tensor end, counted from the end of the header."""
        return list(accumulate(field.n_bytes for field in self.fields))

    @property
    def n_bytes(self) -> int:
        """Of all tensors, without the header."""
        return sum(field.n_bytes for field in self.fields)

    def header(self) -> bytes:
        """Return what stands before the tensors' bytes."""
        entries: dict[str, Any] = {}
        for field, end in zip(self.fields, self.ends, strict=True):
            entries[field.name] = {"dtype": DTYPES[field.dtype], "shape": field.shape, "data_offsets": [end - field.n_bytes, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in host memory, which are not copied when it is there and contiguous."""
    flat: Any = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()
    return memoryview(flat)


class HostCopy:
    """Host memory for the tensors of one layout, kept from one save to the next.

    For tensors of a GPU it is page-locked, and filled by a stream beside that of the computation: ``hold`` has the computation wait for
    it on the device, ``blocks`` waits for it on the host.

    Raises:
        MemoryError: there is not as much memory to be had.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied = torch.cuda.Event() if self._stream is not None else None
        try:
            self._buffer = torch.empty(max(1, layout.n_bytes), dtype=torch.uint8)
        except RuntimeError as error:
            raise MemoryError(str(error).splitlines()[0]) from None
        if self._stream is not None:
            # Not torch's own allocator of page-locked memory: that rounds each piece up to a power of two.
            code = torch.cuda.cudart().cudaHostRegister(self._buffer.data_ptr(), self._buffer.numel(), 0)
            if int(code) != 0:
                raise MemoryError(f"CUDA cannot lock {layout.n_bytes / 2**30:.1f} GiB of host memory (error {int(code)})")
        # Made once: the device has nothing to do while the host begins a save.
        self._places = [
            self._buffer[end - field.n_bytes : end].view(field.dtype).view(field.shape)
            for field, end in zip(layout.fields, layout.ends, strict=True)
        ]

    def fill(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the tensors of the layout, in its order, by name; on a GPU they only begin, when what has been launched so far is done."""
        if self._stream is None or self._copied is None:
            self._copy(tensors)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._copy(tensors)
            self._copied.record()

    def _copy(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for field, place, (name, tensor) in zip(self.layout.fields, self._places, tensors, strict=True):
            assert name == field.name
            place.copy_(tensor, non_blocking=True)

    def hold(self) -> None:
        """Have what is launched on the device from now on begin after the copies."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def blocks(self) -> Iterator[memoryview]:
        """Give the bytes of all tensors in their order, once the copies are there."""
        if self._copied is not None:
            self._copied.synchronize()
        yield raw(self._buffer[: self.layout.n_bytes])

    def close(self) -> None:
        """Give the memory back."""
        if self._stream is not None:
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())
