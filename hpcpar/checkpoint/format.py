"""Names inside a checkpoint set, and its manifest; docs/checkpoint-format.md says the same in words.

    checkpoints/step-00000100/manifest.json     what is in the set, with sizes and checksums
                              model.h5          index: every logical tensor whole, as virtual datasets
                              shard-00003.h5    boxes of tensors, a dataset each
    checkpoints/.step-00000100.tmp              being written
    checkpoints/.step-00000100.old              moved aside while a newer save of the same step takes its name
    checkpoints/.step-00000100.gone             being deleted
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from hpcpar.errors import CheckpointError
from hpcpar.layout.boxes import Box

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "model.h5"
# beside the sets: the id of the run, by which copies in memory are found; without it they are those of another run
RUN_ID = ".memory"
WEIGHT = "weight"
# model.h5 keeps the weights at its root; nothing else there may begin with this name
OPTIMIZER = "optimizer"
# what a tensor may consist of; numpy has no bfloat16, so that its bits travel as uint16
BFLOAT16 = "bfloat16"
DTYPES = ("float32", "float64", BFLOAT16, "float16", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32",
          "uint64", "bool")
COMPRESSIONS = ("none", "blosc2-zstd", "blosc2-lz4")
_HEAD, _DIGITS = b'{"checksum": "', 32
_START = b'",\n"format": "hpcpar-checkpoint",\n"version": %d,\n' % FORMAT_VERSION


def set_name(step: int) -> str:
    """Return a published set's folder name: step-00000100."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step of a published set's folder name, or None if it is not such a name."""
    found = re.fullmatch(r"step-(\d{8,})", name)
    return int(found[1]) if found and set_name(int(found[1])) == name else None


def side_name(step: int, what: str) -> str:
    """Return the name of a set's folder that is not published: `what` is tmp, old or gone."""
    return f".{set_name(step)}.{what}"


def shard_name(number: int) -> str:
    """Return a shard file's name: shard-00003.h5."""
    return f"shard-{number:05d}.h5"


def dataset_path(kind: str, tensor: str, box: Box) -> str:
    """Return a box's dataset in a shard file: exp_avg/layers/17/attention/q/weight/0_1024."""
    return f"{kind}/{tensor.replace('.', '/')}/{'_'.join(map(str, box.offset)) or 'scalar'}"


def index_path(kind: str, tensor: str) -> str:
    """Return a tensor's dataset in model.h5: layers/17/attention/q/weight, moments under optimizer/<kind>/."""
    path = tensor.replace(".", "/")
    return path if kind == WEIGHT else f"{OPTIMIZER}/{kind}/{path}"


def bits_of(dtype: str) -> np.dtype[Any]:
    """Return the numpy dtype that holds the bits of a stored dtype."""
    return np.dtype("uint16" if dtype == BFLOAT16 else dtype)


class StoredBox(NamedTuple):
    """A box of a tensor; its file has a dataset for it in every kind."""

    tensor: str
    box: Box


@dataclass(frozen=True)
class FileEntry:
    """One file of a set: size in bytes, xxh3_128 of all its bytes (32 hex digits), who wrote it, what is in it.

    From byte `start` on lie the values: kind by kind in the manifest's order, box by box in this entry's, nothing
    between. None: they are compressed (or written before `start` was kept), and only HDF5 finds them.
    """

    name: str
    size: int
    checksum: str
    ranks: tuple[int, ...] = ()
    boxes: tuple[StoredBox, ...] = ()
    start: int | None = None


@dataclass(frozen=True)
class Manifest:
    """What is in a set. `kinds` gives each kind's dtype, `tensors` each logical tensor's shape.

    `dtypes` holds the tensors that have a dtype of their own (a torch.distributed.checkpoint save can mix them).
    """

    step: int
    kinds: Mapping[str, str]
    tensors: Mapping[str, tuple[int, ...]]
    files: tuple[FileEntry, ...]
    state: Mapping[str, Any]
    dtypes: Mapping[str, str] = field(default_factory=dict)
    compression: str = "none"

    def dtype(self, kind: str, tensor: str) -> str:
        """Return what a tensor consists of in a kind."""
        return self.dtypes.get(tensor, self.kinds[kind])

    def places(self, file: FileEntry) -> Iterator[tuple[int, int, str, StoredBox]]:
        """Yield (first byte in the file, bytes, kind, box) of all values in a file with a `start`, in file order."""
        assert file.start is not None, file.name
        at = file.start
        for kind in self.kinds:
            for stored in file.boxes:
                num_bytes = stored.box.numel * bits_of(self.dtype(kind, stored.tensor)).itemsize
                yield at, num_bytes, kind, stored
                at += num_bytes

    def to_bytes(self) -> bytes:
        """Return the bytes of manifest.json: JSON whose first value is the checksum of all bytes after that value."""
        numbers = {name: number for number, name in enumerate(self.tensors)}
        files = [{"name": f.name, "size": f.size, "checksum": f.checksum, "start": f.start, "ranks": f.ranks,
                  "boxes": [(numbers[b.tensor], b.box.offset, b.box.size) for b in f.boxes]} for f in self.files]
        tensors = [(n, s, self.dtypes[n]) if n in self.dtypes else (n, s) for n, s in self.tensors.items()]
        # the tables have a line an entry, so that people can read them and diff them
        rest = (f'{_START.decode()}"step": {self.step},\n"compression": "{self.compression}",\n'
                f'"kinds": {_json(dict(self.kinds))},\n"state": {_json(dict(self.state))},\n'
                f'"tensors": {_lines(tensors)},\n"files": {_lines(files)}}}\n').encode()
        return _HEAD + xxhash.xxh3_128_hexdigest(rest).encode() + rest

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> Manifest:
        """Read manifest.json's bytes. Raises: CheckpointError naming `where` if any byte or value is wrong."""
        _check(raw, where)
        try:
            return _parsed(json.loads(raw))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: is not a manifest of this format: {error}") from error


def read_manifest(path: Path) -> Manifest:
    """Read a set's manifest. Raises: CheckpointError if it is missing, damaged or of another format."""
    return Manifest.from_bytes(_raw(path), str(path / MANIFEST))


def check_manifest(path: Path) -> None:
    """Raise CheckpointError unless a set's manifest is intact; quicker than reading it by its parsing."""
    _check(_raw(path), str(path / MANIFEST))


def _raw(path: Path) -> bytes:
    try:
        return (path / MANIFEST).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path / MANIFEST}: cannot be read: {error.strerror}") from error


def _check(raw: bytes, where: str) -> None:
    """Compare the checksum, and the version that follows it."""
    start = len(_HEAD) + _DIGITS
    if raw[: len(_HEAD)] != _HEAD or xxhash.xxh3_128_hexdigest(raw[start:]).encode() != raw[len(_HEAD) : start]:
        raise CheckpointError(f"{where}: damaged: its bytes are not those that were written (checksum)")
    if not raw.startswith(_START, start):
        raise CheckpointError(f"{where}: is not a manifest of version {FORMAT_VERSION}, which this program reads: "
                              f"{raw[start + 3 : start + 60]!r}")


def _json(value: Any) -> str:
    # NaN is not JSON: other readers would refuse the file
    return json.dumps(value, allow_nan=False)


def _lines(values: Sequence[Any]) -> str:
    return "[\n" + ",\n".join(json.dumps(v, separators=(",", ":")) for v in values) + "\n]"


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise ValueError(why)


def _parsed(content: dict[str, Any]) -> Manifest:
    tensors = {_name(name): _numbers(shape) for name, shape, *_ in content["tensors"]}
    dtypes = {name: own[0] for name, _, *own in content["tensors"] if own}
    _require(len(tensors) == len(content["tensors"]), "a tensor is listed twice")
    kinds = {_name(kind): dtype for kind, dtype in content["kinds"].items()}
    for name, dtype in (*kinds.items(), *dtypes.items()):
        _require(dtype in DTYPES, f"{name} consists of {dtype!r}, must be one of {DTYPES}")
    files = tuple(_file(entry, list(tensors.items())) for entry in content["files"])
    _require(len({f.name for f in files}) == len(files), "a file is listed twice")
    _require(isinstance(content["state"], dict), "state is not a table")
    found = Manifest(_numbers([content["step"]])[0], kinds, tensors, files, content["state"], dtypes,
                     content.get("compression", "none"))
    _require(found.compression in COMPRESSIONS, f"compression {found.compression!r}")
    for file in files:
        end = max((at + num_bytes for at, num_bytes, _, _ in found.places(file)), default=0) if file.start else 0
        _require(end <= file.size, f"{file.name}: its values end at byte {end}, the file at {file.size}")
    return found


def _file(entry: dict[str, Any], tensors: list[tuple[str, tuple[int, ...]]]) -> FileEntry:
    name, checksum = entry["name"], entry["checksum"]
    # a name with a slash would make the reader open files outside the set
    _require(name == INDEX or re.fullmatch(r"shard-\d{5,}\.h5", name) is not None, f"file name {name!r}")
    _require(re.fullmatch(r"[0-9a-f]{32}", checksum) is not None, f"{name}: checksum {checksum!r}")
    boxes = []
    for number, offset, size in entry["boxes"]:
        tensor, shape = tensors[number] if 0 <= number < len(tensors) else ("", ())
        box = Box(_numbers(offset), _numbers(size))
        inside = len(offset) == len(size) == len(shape) and all(e <= s for e, s in zip(box.end, shape, strict=True))
        _require(inside and box.numel > 0, f"{name}: box {offset} {size} does not lie in {tensor or number} {shape}")
        boxes.append(StoredBox(tensor, box))
    size, start = _numbers([entry["size"]])[0], entry.get("start")
    start = None if start is None else _numbers([start])[0]
    return FileEntry(name, size, checksum, _numbers(entry["ranks"]), tuple(boxes), start)


def _name(text: str) -> str:
    _require(re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", text) is not None, f"name {text!r}")
    return text


def _numbers(values: Sequence[Any]) -> tuple[int, ...]:
    _require(all(type(v) is int and v >= 0 for v in values), f"{values} must be whole numbers, not negative")
    return tuple(values)
