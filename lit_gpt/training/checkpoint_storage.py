"""Where torch.distributed.checkpoint puts tensors: safetensors files, `<part>-<rank>.safetensors`.

PyTorch plans who saves and who reads which piece of which tensor, so that a checkpoint loads under any number of ranks
and any sharding. Its own storage describes the pieces in a pickle; here each file describes its own, and nothing in a
checkpoint can be executed.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from lit_gpt.errors import UserError
from lit_gpt.tensor_file import TensorFile, write_tensors

CHUNKS = "chunks"
"""Key of a file's metadata: JSON, {name: {"shape": of the whole tensor, "offsets": of the piece in it}}."""


def own_part(tensors: dict[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """The tensors of which this rank saves its piece: of those that several ranks hold alike, one of them saves each,
    and all save about as many bytes.
    """
    part: dict[str, Tensor] = {}
    given: dict[int, list[int]] = {}  # of that many copies, how many elements each is to save
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].numel(), item[0])):
        copy, copies = rank, world_size
        if isinstance(tensor, DTensor):
            mesh, copy, copies = tensor.device_mesh, 0, 1
            for coordinate, size, placement in zip(mesh.get_coordinate(), mesh.shape, tensor.placements):
                if placement.is_replicate():
                    copy, copies = copy * size + coordinate, copies * size
        elements = given.setdefault(copies, [0] * copies)
        chosen = elements.index(min(elements))
        elements[chosen] += tensor.numel()
        if chosen == copy:
            part[name] = tensor
    return part


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


class StagedPlanner(DefaultSavePlanner):
    """Plans by the tensors in training, saves their copies in host memory."""

    def __init__(self, staged: dict[str, Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.staged = staged

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.staged[write_item.index.fqn]


@dataclass
class Writer(StorageWriter):
    """Writes each rank's pieces into one file per part, a part being what a name begins with up to its first dot."""

    folder: Path
    rank: int
    begin: Callable[[], None]
    """Called on the first rank before anyone writes: makes the folder."""
    commit: Callable[[dict[str, dict]], None]
    """Called on the first rank when everyone has written, with {file name: {"bytes", "sha256"}}."""

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.begin()
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        chunks: dict[str, dict[str, dict]] = defaultdict(dict)
        for item in plan.items:
            part, _, name = item.index.fqn.partition(".")
            tensor, data = planner.resolve_data(item), item.tensor_data
            if tensor.numel():  # a small tensor has pieces on some of many ranks only
                parts[part][name] = tensor
                if tensor.shape != data.size:
                    chunks[part][name] = {"shape": list(data.size), "offsets": list(data.chunk.offsets)}
        results = []
        for part, tensors in parts.items():
            path = self.folder / f"{part}-{self.rank:05d}.safetensors"
            metadata = {"format": "pt", CHUNKS: json.dumps(chunks[part])}
            digest = write_tensors(path, tensors, metadata)
            results.append(WriteResult(MetadataIndex(path.name), path.stat().st_size, digest))
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files = [file for of_rank in results for file in of_rank]
        self.commit({f.index.fqn: {"bytes": f.size_in_bytes, "sha256": f.storage_data} for f in files})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class Reader(StorageReader):
    """Reads pieces from the files of a checkpoint, or from one file of whole tensors.

    Args:
        files: (prefix, path): what a file's names stand for is prefix + name.

    Raises:
        UserError: a file is not a whole safetensors file.
    """

    def __init__(self, files: list[tuple[str, Path]]):
        tensors: dict[str, TensorStorageMetadata] = {}
        self.pieces: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        for prefix, path in files:
            file = TensorFile(path)
            chunks = _chunks(file)
            for name, entry in file.entries.items():
                key, chunk = prefix + name, chunks.get(name)
                shape = torch.Size(chunk["shape"] if chunk else entry.shape)
                offsets = torch.Size(chunk["offsets"] if chunk else [0] * len(entry.shape))
                whole = tensors.setdefault(key, TensorStorageMetadata(TensorProperties(entry.dtype), shape, []))
                whole.chunks.append(ChunkStorageMetadata(offsets, torch.Size(entry.shape)))
                self.pieces[key, tuple(offsets)] = file[name]
        for key, whole in tensors.items():
            if sum(math.prod(chunk.sizes) for chunk in whole.chunks) != math.prod(whole.size):
                raise UserError(f"{files[0][1].parent} holds only parts of {key}.")
        self.metadata = Metadata(tensors)

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            piece = self.pieces[item.storage_index.fqn, tuple(item.storage_index.offset)]
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths)):
                piece = piece.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(piece)
            planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _chunks(file: TensorFile) -> dict[str, dict]:
    try:
        chunks = json.loads(file.metadata.get(CHUNKS, "{}"))
        if all(len(chunks[name]["shape"]) == len(chunks[name]["offsets"]) for name in chunks):
            return chunks
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{file.path} says nothing sensible of the pieces that it holds.")


def _done(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future
