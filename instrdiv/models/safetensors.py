"""The safetensors format: headers that are checked, and tensors that are mapped, not read.

The format is a header in JSON and raw numbers (https://github.com/huggingface/safetensors); it is read here, without
its library, so that a damaged file can be told from a good one, tensor by tensor.
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
#: What safetensors names the dtypes that are read.
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}


def header_of(tensors: Mapping[str, tuple[tuple[int, ...], Any]]) -> bytes:
    """What a safetensors file begins with, given the shapes and dtypes of its tensors; their numbers follow in turn."""
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
    dtype: str  # as the file has it
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    def map(self) -> np.ndarray:
        return np.asarray(np.memmap(self.file, DTYPES[self.dtype], "r", self.offset, self.shape))

    def on_device(self, sharding: Sharding) -> jax.Array:
        """The tensor as it is, each device's part read by itself."""
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
                raise ValueError(f"{name} is said to be in {file}, which is no name of a file")
            by_file.setdefault(file, []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = "lacks the field weight_map" if isinstance(error, KeyError) else str(error)
        raise BadInput(f"{index}: cannot be read ({what}); fetch it again") from None
    found: dict[str, Stored] = {}
    for file, names in sorted(by_file.items()):
        path = directory / file
        if not path.is_file():
            raise BadInput(f"{path}: is missing; {_INDEX} says that it has {names[0]} and {len(names) - 1} other "
                           "tensors; fetch it again")  # fmt: skip
        there = {tensor.name: tensor for tensor in tensors_in(path)}
        for name in names:
            if name not in there:
                raise BadInput(f"{path}: lacks the tensor {name}, which {_INDEX} says that it has; fetch it again")
        found |= there
    return found


def _without_weights(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory}: there is no such directory"
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(pattern))
    if pickled:
        return (
            f"{directory / pickled[0]}: pickled weights are not read, for a pickle can run any code; where you trust "
            "them, convert them: AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(NEW_DIRECTORY)"
        )
    return f"{directory}: has neither {_SINGLE} nor {_INDEX}; fetch the checkpoint's *.safetensors"


def tensors_in(path: Path) -> Iterator[Stored]:
    """The tensors of a safetensors file, which is long enough for all of them. Raises BadInput where it is damaged."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(start := file.read(8), "little")
            if start == b"version ":
                raise ValueError("it is a pointer of Git LFS; git lfs pull fetches the file")
            if len(start) < 8 or length > size - 8:
                raise ValueError(f"of {size} bytes, its header alone should have {length}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = [
            (entry["data_offsets"][1], entry["data_offsets"][0], name, entry["dtype"], tuple(entry["shape"]))
            for name, entry in header.items()
        ]
        if not all(isinstance(n, int) and n >= 0 for *ends, _, _, shape in entries for n in (*ends, *shape)):
            raise ValueError("its header has places that are no numbers")
        if not all(isinstance(dtype, str) for *_, dtype, _ in entries):
            raise ValueError("its header has dtypes that are no names")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BadInput(f"{path}: is damaged, or no safetensors file ({error}); fetch it again") from None
    for end, begin, name, dtype, shape in sorted(entries):
        if 8 + length + end > size:
            raise BadInput(f"{path}: is damaged: its tensor {name} ends at byte {8 + length + end}, and the file at "
                           f"{size}; fetch it again")  # fmt: skip
        if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
            raise BadInput(f"{path}: is damaged: its tensor {name} of {list(shape)} {dtype} has {end - begin} bytes; "
                           "fetch it again")  # fmt: skip
        yield Stored(path, name, dtype, shape, 8 + length + begin)
