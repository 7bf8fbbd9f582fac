"""The safetensors format: validates headers, and memory-maps tensors instead of reading them.

A file is a JSON header followed by raw numbers (https://github.com/huggingface/safetensors). It is parsed here, without
the safetensors library, to detect damage tensor by tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from instrdiv.runtime.errors import BadInput

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
#: The supported dtypes, by their safetensors names.
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}


def header_of(tensors: Mapping[str, tuple[tuple[int, ...], Any]]) -> bytes:
    """The header of a safetensors file with tensors of these shapes and dtypes; their data must follow in order."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Stored(NamedTuple):
    """A tensor in a file."""

    file: Path
    name: str
    dtype: str  # as named in the file
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    def map(self) -> np.ndarray:
        return np.asarray(np.memmap(self.file, DTYPES[self.dtype], "r", self.offset, self.shape))

    def on_device(self, sharding: Sharding) -> jax.Array:
        """The tensor, unconverted, with each device's part read separately."""
        mapped = self.map()
        return jax.make_array_from_callback(self.shape, sharding, lambda index: mapped[index])


def _stored_tensors(directory: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint, by name; only the headers are read."""
    index = directory / _INDEX
    if (directory / _SINGLE).is_file():
        return {tensor.name: tensor for tensor in tensors_in(directory / _SINGLE)}
    if not index.is_file():
        raise BadInput(_without_weights(directory))
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        by_file: dict[str, list[str]] = {}
        for name, file in places.items():
            if Path(file).name != file:
                raise ValueError(f"{name} is listed under {file}, which is not a plain file name")
            by_file.setdefault(file, []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = "lacks the field weight_map" if isinstance(error, KeyError) else str(error)
        raise BadInput(f"{index}: cannot be read ({what}); download it again") from None
    found: dict[str, Stored] = {}
    for file, names in sorted(by_file.items()):
        path = directory / file
        if not path.is_file():
            raise BadInput(f"{path}: is missing; according to {_INDEX}, it has {names[0]} and "
                           f"{len(names) - 1} other tensors; download it again")  # fmt: skip
        there = {tensor.name: tensor for tensor in tensors_in(path)}
        for name in names:
            if name not in there:
                raise BadInput(f"{path}: lacks the tensor {name}, which {_INDEX} lists; download it again")
        found |= there
    return found


def _without_weights(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory}: there is no such directory"
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(pattern))
    if pickled:
        return (
            f"{directory / pickled[0]}: pickled weights are not read, because a pickle can run any code; if you trust "
            "them, convert them: AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(NEW_DIRECTORY)"
        )
    return f"{directory}: has neither {_SINGLE} nor {_INDEX}; download the checkpoint's *.safetensors"


def tensors_in(path: Path) -> Iterator[Stored]:
    """The tensors of a safetensors file, checked to fit in the file. Raises BadInput if it is damaged."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(start := file.read(8), "little")
            if start == b"version ":
                raise ValueError("it is a Git LFS pointer; run git lfs pull to download the file")
            if len(start) < 8 or length > size - 8:
                raise ValueError(f"the file has {size} bytes, too few for a header of {length}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = [
            (entry["data_offsets"][1], entry["data_offsets"][0], name, entry["dtype"], tuple(entry["shape"]))
            for name, entry in header.items()
        ]
        if not all(isinstance(n, int) and n >= 0 for *ends, _, _, shape in entries for n in (*ends, *shape)):
            raise ValueError("its header has shapes or offsets that are not non-negative integers")
        if not all(isinstance(dtype, str) for *_, dtype, _ in entries):
            raise ValueError("its header has dtypes that are not names")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BadInput(f"{path}: is damaged or not a safetensors file ({error}); download it again") from None
    for end, begin, name, dtype, shape in sorted(entries):
        if 8 + length + end > size:
            raise BadInput(f"{path}: is damaged: its tensor {name} ends at byte {8 + length + end}, but the file "
                           f"ends at {size}; download it again")  # fmt: skip
        if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
            raise BadInput(f"{path}: is damaged: its tensor {name} of {list(shape)} {dtype} has {end - begin} bytes; "
                           "download it again")  # fmt: skip
        yield Stored(path, name, dtype, shape, 8 + length + begin)
