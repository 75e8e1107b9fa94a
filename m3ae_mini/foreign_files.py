"""Reads safetensors and torch archives as data: nothing in a file is ever run."""
import io
import json
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import reading, require

# Names in safetensors and in pickles. Tensors of other types are skipped.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32,
          "torch.HalfStorage": torch.float16, "torch.BFloat16Storage": torch.bfloat16}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file -> {name: float32 tensor}. UserError if it is damaged.

    The format: the header's length, the header in JSON, the tensors without gaps."""
    tensors, end_of_last = {}, 0
    with reading(path), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        room = path.stat().st_size - 8 - length            # for the tensors
        require(room >= 0, f"{path} can't be read: its header claims {length:,} bytes")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            require(end_of_last == start <= end <= room,
                    f"{path} can't be read: the data range of tensor {name} is invalid")
            data, end_of_last = bytearray(file.read(end - start)), end
            if entry["dtype"] in DTYPES:
                numbers = torch.frombuffer(data, dtype=DTYPES[entry["dtype"]])
                tensors[name] = numbers.float().view(entry["shape"])
    return tensors


class StoredTensor(NamedTuple):
    """A tensor of an archive that is not read yet."""
    dtype: torch.dtype
    entry: str                         # the archive's entry that holds its numbers
    offset: int
    shape: tuple
    stride: tuple


class Inert(dict):
    """Stands for any other name in a pickle: it keeps items and attributes, does nothing."""
    __init__ = __call__ = append = add = lambda self, *args: None
    __setstate__ = lambda self, state: self.update(state if isinstance(state, dict) else {})
    __hash__ = object.__hash__


class Unpickler(pickle._Unpickler):
    """Reads a pickle as data and imports nothing. (The C unpickler trusts claimed sizes.)"""
    persistent_load = lambda self, storage: storage    # ("storage", dtype, entry of the archive, …)
    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: None}      # reserves memory, too

    def find_class(self, module: str, name: str) -> Any:
        known = {"torch._utils._rebuild_tensor_v2":
                 lambda storage, *view: StoredTensor(*storage[1:3], *view[:3]),
                 "torch._utils._rebuild_parameter": lambda tensor, *_: tensor}
        return (known | DTYPES).get(f"{module}.{name}", Inert)


def read_torch(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """A file of torch.save or torch.jit.save -> (its content, {dotted name: float32 tensor})

    UserError if it is damaged, is older than PyTorch 1.6, or claims more than it holds."""
    with reading(path), open(path, "rb") as file:
        require(zipfile.is_zipfile(file),
                f"{path} can't be read: it is not a complete zip archive; if PyTorch < 1.6 "
                "wrote it, load it and save it with a newer PyTorch")
        archive = zipfile.ZipFile(file)
        unpacked = sum(info.file_size for info in archive.infolist())
        require(unpacked < 10 * Path(path).stat().st_size,
                f"{path} can't be read: unpacked it would be more than ten times as large")
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        content = Unpickler(io.BytesIO(archive.read(pickled))).load()

        # Weights stand at the top, or under one of these names.
        state = next((content[key] for key in ("state_dict", "model") if key in content), content)
        stored = {}
        collect(state, "", stored, set())
        storages, tensors = {}, {}
        for name, (dtype, entry, offset, shape, stride) in stored.items():
            if (entry, dtype) not in storages:
                data = bytearray(archive.read(f"{pickled.removesuffix('.pkl')}/{entry}"))
                storages[entry, dtype] = torch.frombuffer(data, dtype=dtype).float()
            # Without this, a view of stride 0 could expand a small file without limit.
            require(math.prod(shape) <= len(storages[entry, dtype]),
                    f"{path}: tensor {name} is larger than its data")
            tensors[name] = storages[entry, dtype].as_strided(shape, stride, offset)
    return content, tensors


def collect(node: Any, name: str, stored: dict[str, StoredTensor], seen: set[int]) -> None:
    """Put the tensors of nested dicts into `stored` under dotted names, each dict once."""
    if isinstance(node, StoredTensor) and node.dtype in DTYPES.values():
        stored[name] = node
    if isinstance(node, dict) and id(node) not in seen:
        seen.add(id(node))
        for key, item in node.items():
            collect(item, f"{name}.{key}" if name else f"{key}", stored, seen)
