"""torch.distributed.checkpoint over sets: any PyTorch program can save to this format and load from it.

    dcp.save(state, storage_writer=HDF5Writer("checkpoints/step-00000100"))
    dcp.load(state, storage_reader=HDF5Reader("checkpoints/step-00000100"))

A tensor of the state is a tensor of the set, under its dotted name; what is no tensor lies in the manifest as JSON.
The reader also takes sets of `hpcpar train`: weights by name, moments as `optimizer.exp_avg.<name>`.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from hpcpar.checkpoint.format import (
    BFLOAT16,
    DTYPES,
    OPTIMIZER,
    WEIGHT,
    FileEntry,
    Manifest,
    StoredBox,
    bits_of,
    dataset_path,
    read_manifest,
    shard_name,
    step_of,
)
from hpcpar.checkpoint.load import share_of
from hpcpar.checkpoint.publish import begin, complete, publish
from hpcpar.checkpoint.read import Read, Wanted, read_verified, read_wanted
from hpcpar.checkpoint.store import Dataset, write_file
from hpcpar.errors import UserError
from hpcpar.layout.boxes import Box

_TUPLE = "(tuple)"  # JSON has none


class Written(NamedTuple):
    """What a rank tells the coordinator of one item: its file and box, or a value that is no tensor."""

    entry: FileEntry | None = None
    boxes: tuple[StoredBox, ...] = ()
    value: Any = None


class HDF5Writer(StorageWriter):
    """Writes a set: a file a rank, published by the coordinator at once or not at all."""

    def __init__(self, path: str | PathLike[str], compression: str = "none"):
        """Save to `path`, the set's own folder; one that is there is replaced when the new one is whole."""
        super().__init__()
        self.path, self.compression = Path(path), compression

    @property
    def _folder(self) -> Path:
        return self.path.with_name(f".{self.path.name}.tmp")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        """Whether this is a path."""
        return "://" not in str(checkpoint_id)

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        """Begin another save, to `checkpoint_id` if that is given."""
        self.path = self.path if checkpoint_id is None else Path(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the folder that will be published, on the coordinator. Raises: UserError, OSError."""
        if not kwargs.get("use_collectives", True):
            raise UserError("use_collectives", "is off, and a set is published by one rank for all", "leave it on")
        if is_coordinator:
            begin(self.path)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse what a set cannot hold, before a byte is written. Raises: UserError."""
        for item in plan.items:
            if item.type != WriteItemType.BYTE_IO:
                if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", item.index.fqn):
                    raise UserError(item.index.fqn, "is no name for a dataset", "use letters, digits, _ and dots")
                _dtype_of(item)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Number the files. Raises: UserError where one tensor's name goes on from another's."""
        names = {item.index.fqn for plan in plans for item in plan.items if item.type != WriteItemType.BYTE_IO}
        for name in names:
            above = next((a for a in itertools.accumulate(name.split("."), "{}.{}".format) if a in names), name)
            if above != name:
                raise UserError(name, f"lies beneath the tensor {above}: HDF5 has datasets and groups",
                                "rename one of them")
        return [dataclasses.replace(plan, storage_data=number) for number, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write and sync this rank's file. Raises: OSError, UserError for a value that JSON cannot hold."""
        tensors = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
        stored = [StoredBox(item.index.fqn, _box_of(item)) for item in tensors]
        held = [(item, box) for item, box in zip(tensors, stored, strict=True) if box.box.numel]
        arrays = {dataset_path(WEIGHT, *box): _bits(_on_cpu(planner.resolve_data(item))) for item, box in held}
        datasets = [Dataset(dataset_path(WEIGHT, *box), box.box.size, _dtype_of(item), box.box.offset)
                    for item, box in held]
        entry = None
        if held:
            entry = write_file(self._folder / shard_name(plan.storage_data), datasets, arrays, self.compression)
            entry = dataclasses.replace(entry, ranks=(plan.storage_data,), boxes=tuple(box for _, box in held))
        results = [WriteResult(item.index, math.prod(_box_of(item).size), Written()) for item in tensors]
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                value = _to_json(_object(planner, item), item.index.fqn)
                results.append(WriteResult(item.index, 0, Written(value=value)))
        if entry is not None:  # told once, with the first of its tensors
            results[0] = dataclasses.replace(results[0], storage_data=Written(entry))
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Publish the set; the coordinator calls it when all have written. Raises: OSError."""
        told = [(result.index.fqn, result.storage_data) for rank in results for result in rank]
        tensors = {name: found for name, found in metadata.state_dict_metadata.items()
                   if isinstance(found, TensorStorageMetadata)}
        shapes = {name: tuple(found.size) for name, found in tensors.items()}
        dtypes = {name: _name_of(found.properties.dtype) for name, found in tensors.items()}
        paths = {name: list(path) for name, path in (metadata.planner_data or {}).items()}
        objects = {name: written.value for name, written in told if name not in tensors}
        files = tuple(written.entry for _, written in told if written.entry is not None)
        manifest = Manifest(step_of(self.path.name) or 0, {WEIGHT: "float32"}, shapes, files,
                            {"dcp": {"objects": objects, "paths": paths}},
                            {name: dtype for name, dtype in dtypes.items() if dtype != "float32"}, self.compression)
        complete(self._folder, manifest)
        publish(self._folder, self.path)


class HDF5Reader(StorageReader):
    """Reads a set into any sharding; every file is verified by one of the ranks, on the way."""

    def __init__(self, path: str | PathLike[str]):
        """Load from `path`, a set's folder."""
        super().__init__()
        self.path = Path(path)
        self._manifest: Manifest | None = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        """Whether this is a path."""
        return "://" not in str(checkpoint_id)

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        """Begin another load, from `checkpoint_id` if that is given."""
        self.path = self.path if checkpoint_id is None else Path(checkpoint_id)
        self._manifest = None

    @property
    def manifest(self) -> Manifest:
        """What is in the set. Raises: CheckpointError."""
        if self._manifest is None:
            self._manifest = read_manifest(self.path)
        return self._manifest

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Tell what is stored in torch's words. Raises: CheckpointError."""
        manifest = self.manifest
        found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        boxes: dict[str, list[Box]] = {tensor: [] for tensor in manifest.tensors}
        for file in manifest.files:
            for tensor, box in file.boxes:
                boxes[tensor].append(box)
        for name, (kind, tensor) in _names(manifest).items():
            chunks = [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.size)) for box in boxes[tensor]]
            dtype = getattr(torch, manifest.dtype(kind, tensor))
            found[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(manifest.tensors[tensor]),
                                                chunks)
        saved = manifest.state.get("dcp", {"objects": {}, "paths": {name: name.split(".") for name in found}})
        found.update((name, BytesStorageMetadata()) for name in saved["objects"])
        return Metadata(found, planner_data={name: tuple(path) for name, path in saved["paths"].items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Need nothing: the manifest is at hand."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leave the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Share out the files to be verified."""
        return [dataclasses.replace(plan, storage_data=sorted(share_of(self.manifest, rank, len(plans))))
                for rank, plan in enumerate(plans)]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors of the plan, and verify this rank's share. Raises: CheckpointError."""
        names = _names(self.manifest)
        reads: dict[str, list[Read]] = {}
        filled: list[tuple[ReadItem, torch.Tensor, np.ndarray[Any, Any] | None]] = []
        files = {(stored.tensor, stored.box.offset): (file.name, stored.box)
                 for file in self.manifest.files for stored in file.boxes}
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, _pickled(self.manifest.state["dcp"]["objects"][item.storage_index.fqn]))
                continue
            kind, tensor = names[item.storage_index.fqn]
            file_name, stored = files[tensor, tuple(item.storage_index.offset or ())]
            offset = tuple(map(sum, zip(stored.offset, item.storage_offsets, strict=True)))
            common = Box(offset, tuple(item.lengths))
            target = planner.resolve_tensor(item).detach()
            dtype = self.manifest.dtype(kind, tensor)
            direct = target.device.type == "cpu" and _name_of(target.dtype) == dtype
            into = _bits(target) if direct else np.empty(
                common.size, "float32" if dtype == BFLOAT16 else bits_of(dtype))
            reads.setdefault(file_name, []).append(Read(stored, common, Wanted(tensor, common, {kind: into})))
            filled.append((item, target, None if direct else into))
        share = plan.storage_data if isinstance(plan.storage_data, list) else list(reads)
        for entry in self.manifest.files:
            if entry.name in share:
                read_verified(self.path, self.manifest, entry, reads.get(entry.name, []))
            elif entry.name in reads:
                read_wanted(self.path, self.manifest, entry, reads[entry.name])
        for item, target, values in filled:
            if values is not None:
                target.copy_(torch.from_numpy(values))
            planner.commit_tensor(item, target)
        return _done(None)


def _names(manifest: Manifest) -> dict[str, tuple[str, str]]:
    """Return kind and tensor by the name that torch sees."""
    return {tensor if kind == WEIGHT else f"{OPTIMIZER}.{kind}.{tensor}": (kind, tensor)
            for kind in manifest.kinds for tensor in manifest.tensors}


def _box_of(item: WriteItem) -> Box:
    assert item.tensor_data is not None
    return Box(tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes))


def _dtype_of(item: WriteItem) -> str:
    assert item.tensor_data is not None
    name = _name_of(item.tensor_data.properties.dtype)
    if name not in DTYPES:
        raise UserError(item.index.fqn, f"consists of {name}", f"a set can hold {', '.join(DTYPES)}")
    return name


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """View a CPU tensor's values as numpy has them; bfloat16 as uint16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view("uint16")
    return tensor.numpy()


def _on_cpu(tensor: Any) -> torch.Tensor:
    """Return a contiguous tensor in host memory; a copy only where it is not one."""
    found: torch.Tensor = tensor.detach().cpu().contiguous()
    return found


def _object(planner: SavePlanner, item: WriteItem) -> Any:
    """Return a value that is no tensor as it is: `resolve_data` would give it pickled."""
    look_up = getattr(planner, "lookup_object", None)
    if look_up is None:
        raise UserError(item.index.fqn, "is no tensor, and the save planner has no lookup_object",
                        "derive it from DefaultSavePlanner")
    return look_up(item.index)


def _to_json(value: Any, where: str) -> Any:
    """Return what JSON can hold of a value and give back unchanged. Raises: UserError."""
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if type(value) is list:
        return [_to_json(v, where) for v in value]
    if type(value) is tuple:
        return {_TUPLE: [_to_json(v, where) for v in value]}
    if type(value) is dict and all(type(key) is str for key in value) and _TUPLE not in value:
        return {key: _to_json(v, where) for key, v in value.items()}
    what = repr(value) if isinstance(value, float) else f"a {type(value).__qualname__}"
    raise UserError(where, f"is or holds {what}, which JSON cannot hold (nothing here is pickled)",
                    "keep tensors, text, whole and finite numbers, lists, tuples and dicts with text keys")


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(v) for v in value]
    if isinstance(value, Mapping):
        if _TUPLE in value:
            return tuple(_from_json(v) for v in value[_TUPLE])
        return {key: _from_json(v) for key, v in value.items()}
    return value


def _pickled(value: Any) -> io.BytesIO:
    """Return a value as load planners want it; these bytes never left this process."""
    buffer = io.BytesIO()
    torch.save(_from_json(value), buffer)
    buffer.seek(0)
    return buffer


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
