"""Sets to and from Hugging Face folders (GPT-2, Llama), a tensor at a time; this file may know torch.

    export   set -> load_tensor -> join, turn, cast -> model-0000n-of-0000m.safetensors -> logits compared -> published
    import   safetensors -> cut, turn -> shard files of a set (moments: holes, which read as zero) -> published
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from hpcpar.checkpoint.families import Foreign, foreign_tensors, from_config, to_config
from hpcpar.checkpoint.format import WEIGHT, FileEntry, Manifest, StoredBox, dataset_path, set_name, shard_name
from hpcpar.checkpoint.load import load_box
from hpcpar.checkpoint.publish import complete, published
from hpcpar.checkpoint.store import Dataset, write_file
from hpcpar.checkpoint.verify import latest_set, read_state, verify_set
from hpcpar.config.job import Job, Model
from hpcpar.config.load import job_from_tables, to_toml
from hpcpar.config.resolve import resolve
from hpcpar.config.run_folder import RunFolder
from hpcpar.data.tokenizer import END_NAMES, load_tokenizer
from hpcpar.errors import CheckpointError, UserError
from hpcpar.layout.boxes import whole
from hpcpar.layout.parameters import parameter_table
from hpcpar.nn.transformer import Transformer
from hpcpar.units import format_bytes

Array = np.ndarray[Any, Any]
TOLERANCE = 1e-4  # between logits in fp32, of the largest logit where that is above 1
# of an imported set's shard file, in fp32 weights
FILE_BYTES = 512 << 20
MOMENTS = ("exp_avg", "exp_avg_sq")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
                   "vocab.json", "merges.txt")
# dtype on disk: its name in a safetensors header, in config.json, and in torch
_DTYPES = {"fp32": ("F32", "float32", torch.float32), "bf16": ("BF16", "bfloat16", torch.bfloat16),
           "fp16": ("F16", "float16", torch.float16)}


def saved_job(path: Path) -> Job:
    """Return the job that a checkpoint set was saved by."""
    tables = read_state(path)["job"]
    return job_from_tables({table: {k: v for k, v in values.items() if v is not None}
                            for table, values in tables.items()})


def load_network(path: Path, job: Job) -> Transformer:
    """Load a set's weights into the plain network, whatever layout wrote them. Memory: the model in fp32 (fp64)."""
    dtype = torch.float64 if job.train.precision == "fp64" else torch.float32
    with torch.device("meta"):
        network = Transformer(job.model, range(job.model.layers), first=True, last=True)
    network = network.to_empty(device="cpu").to(dtype)
    manifest = verify_set(path)
    with torch.no_grad():
        for parameter in parameter_table(job.model):
            values = load_box(path, manifest, parameter.name, whole(parameter.shape), [WEIGHT])[WEIGHT]
            network.get_parameter(parameter.name).copy_(torch.from_numpy(values))
    return network.eval()


def export_set(path: Path, out: Path, dtype: str = "fp32", max_shard_bytes: int = 5 << 30) -> str:
    """Write a set's weights as a Hugging Face folder, and return what was done in a line.

    Where transformers is installed and memory holds two models in fp32, transformers then reads the folder, and its
    logits must be those of our network. Raises: UserError for what the family's layout cannot say; CheckpointError if
    the set is damaged or the logits differ. Nothing is published then.
    Memory: one tensor of theirs twice; for the check two models in fp32.
    """
    if out.exists():
        raise UserError(str(out), "is already there", "give a folder that does not exist")
    manifest = verify_set(path)
    job = saved_job(path)
    files = tokenizer_files(path, job)
    end_token = _end_token(files, job.model)
    config = to_config(job.model, end_token, _DTYPES[dtype][1])
    with published(out) as folder:
        num_files = write_safetensors(folder, path, manifest, foreign_tensors(job.model), dtype, max_shard_bytes)
        _write_json(folder / "config.json", config)
        for file in files:
            shutil.copyfile(file, folder / file.name)
        if files and not (folder / "tokenizer_config.json").exists():
            _write_json(folder / "tokenizer_config.json", _tokenizer_config(files, job.model))
        needed, free = 2 * 4 * sum(math.prod(p.shape) for p in parameter_table(job.model)), _free_memory()
        said = compare_logits(folder, path, job, dtype) if needed < free else (
            f"logits not compared: two models take {format_bytes(needed)}, {format_bytes(free)} are free")
    words = "with its tokenizer" if files else "without a tokenizer (its store is not here)"
    return f"{path.name} -> {out}: {config['architectures'][0]} in {dtype}, {num_files} files, {words}; {said}"


def _free_memory() -> int:
    """Return the bytes that can be had without pushing others out."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def write_safetensors(folder: Path, path: Path, manifest: Manifest, tensors: list[Foreign], dtype: str,
                      max_shard_bytes: int) -> int:
    """Write their tensors in files of at most `max_shard_bytes` (or one tensor), and the index; return the number.

    Our own writer: the library's wants all tensors of a file in memory. Source: the format's description in the
    README of huggingface/safetensors.
    """
    size = 4 if dtype == "fp32" else 2
    shards: list[list[Foreign]] = [[]]
    for tensor in tensors:
        held = sum(int(np.prod(t.shape)) for t in shards[-1])
        if shards[-1] and (held + int(np.prod(tensor.shape))) * size > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for name, held_here in zip(names, shards, strict=True):
        with (folder / name).open("xb") as file:
            file.write(_header(held_here, dtype, size))
            for tensor in held_here:
                joined = tensor.join([load_box(path, manifest, ours, whole(shape), [WEIGHT])[WEIGHT]
                                      for ours, shape in tensor.shapes.items()])
                file.write(_cast(joined, dtype).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
    if len(names) > 1:
        total = size * sum(int(np.prod(t.shape)) for t in tensors)
        places = {t.name: name for name, held_here in zip(names, shards, strict=True) for t in held_here}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    return len(names)


def compare_logits(folder: Path, path: Path, job: Job, dtype: str) -> str:
    """Say how far transformers' logits for a folder are from our network's. Raises: CheckpointError if too far."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        return "logits not compared (transformers is not installed)"
    disable_progress_bar()
    ours = load_network(path, job).float()
    for parameter in ours.parameters():
        parameter.data = parameter.data.to(_DTYPES[dtype][2]).float()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    tokens = torch.randint(job.model.vocab, (2, min(job.model.seq, 128)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, found = ours(tokens), theirs(input_ids=tokens).logits
    distance = float((found - want).abs().max() / want.abs().max().clamp(min=1))
    if not distance <= TOLERANCE:  # NaN too
        raise CheckpointError(f"{path}: not exported: transformers' logits differ by {distance:.1e} from ours (at most "
                              f"{TOLERANCE:g})")
    return f"logits as transformers computes them (largest difference {distance:.1e})"


def import_folder(source: Path, run: RunFolder) -> str:
    """Make a published set of step 0 and a job file from a Hugging Face folder; return what was done in a line.

    Raises: UserError if the folder is of another family, not complete, or the run has sets already.
    Memory: one shard file's weights (512 MiB, or one tensor).
    """
    config = _read_json(source / "config.json")
    model = from_config(config, str(source / "config.json"))
    if latest_set(run.checkpoints) is not None:
        raise UserError(str(run.path), "has checkpoint sets already", "give another --run folder")
    job = resolve(Job(model=model))
    run.create()
    final = run.checkpoints / set_name(0)
    with ExitStack() as stack:
        where = _open_tensors(source, foreign_tensors(model), stack)
        with published(final) as folder:
            files = [_write_shard(folder / shard_name(n), group, where, model)
                     for n, group in enumerate(_groups(foreign_tensors(model)))]
            progress = {"step": 0, "samples": 0, "updates": 0, "skips": 0, "loss_scale": 1.0, "finite_steps": 0}
            # no data yet: the run that goes on from here may bring any
            state = {"progress": progress, "job": dataclasses.asdict(job), "data": None, "imported": source.name}
            kinds = dict.fromkeys((WEIGHT, *MOMENTS), "float32")
            shapes = {p.name: p.shape for p in parameter_table(model)}
            complete(folder, Manifest(0, kinds, shapes, tuple(files), state))
    (run.path / "tokenizer").mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, run.path / "tokenizer" / name)
    (run.path / "job.toml").write_text(_job_text(source, run, model), encoding="utf-8")
    count = sum(p.numel for p in parameter_table(model))
    return (f"{source} -> {final}: {model.kind} of {count:,} parameters; "
            f"next: see {shlex.quote(str(run.path / 'job.toml'))}")


def tokenizer_files(path: Path, job: Job) -> list[Path]:
    """List the tokenizer's files of a run: what an import left in it, else its store's; none if that is not here."""
    imported = path.parent.parent / "tokenizer"
    store = job.data.store if isinstance(job.data.store, str) else job.data.store[0][0]
    kept = [imported / name for name in TOKENIZER_FILES] if imported.is_dir() else [Path(store) / "tokenizer.json"]
    return [file for file in kept if file.is_file()]


def _end_token(files: list[Path], model: Model) -> int | None:
    found = next((load_tokenizer(file).end_token for file in files if file.name == "tokenizer.json"), None)
    return found if found is not None and found < model.vocab else None


def _tokenizer_config(files: list[Path], model: Model) -> dict[str, Any]:
    tokenizer = load_tokenizer(next(file for file in files if file.name == "tokenizer.json")).backend
    end = next(name for name in END_NAMES if tokenizer.token_to_id(name) is not None)
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.seq, "bos_token": end,
            "eos_token": end, "clean_up_tokenization_spaces": False}


def _header(tensors: list[Foreign], dtype: str, size: int) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        end = at + size * int(np.prod(tensor.shape))
        entries[tensor.name] = {"dtype": _DTYPES[dtype][0], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _cast(values: Array, dtype: str) -> Array:
    found = torch.from_numpy(values).to(_DTYPES[dtype][2])
    return found.view(torch.int16).numpy() if dtype == "bf16" else found.numpy()


def _open_tensors(source: Path, wanted: list[Foreign], stack: ExitStack) -> dict[str, tuple[Any, str]]:
    """Find each of their tensors: an open file and the name in it, checked for presence and shape."""
    index = source / "model.safetensors.index.json"
    names = {"model.safetensors"} if not index.exists() else set(_read_json(index).get("weight_map", {}).values())
    places: dict[str, tuple[Any, str]] = {}
    for name in sorted(names):
        if Path(name).name != name or not (source / name).is_file():
            raise UserError(str(source), f"has no {name}", "give a folder with safetensors files (not .bin)")
        try:
            file = stack.enter_context(safe_open(source / name, framework="pt"))
        except SafetensorError as error:
            raise UserError(str(source / name), f"is not a safetensors file ({error})", "fetch it again") from error
        places.update((key, (file, key)) for key in file.keys())  # noqa: SIM118  # not a dict
    found = {}
    for tensor in wanted:
        short = tensor.name.partition(".")[2]  # the first GPT-2 files name the tensors of the bare network
        if tensor.name not in places and short not in places:
            raise UserError(str(source), f"has no tensor {tensor.name}", "give a folder that fits its config.json")
        file, key = found[tensor.name] = places.get(tensor.name) or places[short]
        shape = tuple(file.get_slice(key).get_shape())
        if shape != tensor.shape:
            raise UserError(str(source), f"{key} is {list(shape)}, config.json means {list(tensor.shape)}",
                            "give a folder that fits its config.json")
    used = {key for _, key in found.values()}
    # buffers of old files, and the copy of a tied head, hold nothing of their own
    extra = [key for key in places if key not in used and key != "lm_head.weight"
             and not key.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"))]
    if extra:
        raise UserError(str(source), f"has a tensor that this network has not: {extra[0]}", "import a plain model")
    return found


def _groups(tensors: list[Foreign]) -> Iterator[list[Foreign]]:
    """Cut the list where a shard file is full."""
    group: list[Foreign] = []
    num_bytes = 0
    for tensor in tensors:
        size = 4 * int(np.prod(tensor.shape))
        if group and num_bytes + size > FILE_BYTES:
            yield group
            group, num_bytes = [], 0
        group.append(tensor)
        num_bytes += size
    yield group


def _write_shard(path: Path, group: list[Foreign], where: Mapping[str, tuple[Any, str]], model: Model) -> FileEntry:
    arrays: dict[str, Array] = {}
    boxes = []
    for tensor in group:
        file, key = where[tensor.name]
        for name, values in tensor.part(file.get_tensor(key).float().numpy()).items():
            boxes.append(StoredBox(name, whole(values.shape)))
            arrays[dataset_path(WEIGHT, name, boxes[-1].box)] = values
    datasets = [Dataset(dataset_path(kind, name, box), box.size, "float32", box.offset)
                for kind in (WEIGHT, *MOMENTS) for name, box in boxes]
    entry = write_file(path, datasets, arrays)  # the moments have no arrays: holes in the file, zeros to a reader
    return dataclasses.replace(entry, ranks=(0,), boxes=tuple(boxes))


def _job_text(source: Path, run: RunFolder, model: Model) -> str:
    table = to_toml(Job(model=model)).split("\n\n")[0]
    tokenizer = run.path / "tokenizer" / "tokenizer.json"
    return (f"# {source.name}, imported as step 0 of this run. Its tokenizer cuts the text:\n"
            f"#   hpcpar data build TEXT... --out STORE --tokenizer {tokenizer}\n"
            f"# then, with the store's path below:\n"
            f"#   hpcpar train {run.path / 'job.toml'} --run {run.path}\n{table}\n\n"
            f"[data]\nstore = {json.dumps('stores/text')}\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"cannot be read ({error})", "give a Hugging Face model folder") from error
    if not isinstance(found, dict):
        raise UserError(str(path), "is not a JSON object", "give a Hugging Face model folder")
    return found


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
