"""Hugging Face folders: transformers is the oracle both ways; bits survive the round trip."""

import dataclasses
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hpcpar import cli
from hpcpar.checkpoint import exchange, latest_set, load_tensor, save_set, verify_set
from hpcpar.checkpoint.exchange import export_set, import_folder, load_network, saved_job
from hpcpar.checkpoint.families import foreign_tensors, from_config, to_config
from hpcpar.checkpoint.store import open_hdf5
from hpcpar.config.load import to_toml
from hpcpar.config.run_folder import RunFolder, read_lines
from hpcpar.data.store import TokenStore
from hpcpar.errors import CheckpointError, UserError
from tests.checkpoint.sets import GPT, LLAMA, UNTIED, make_layout, on_ranks, shards_of
from tests.train.small import make_job, make_store

MODELS = {"gpt": {**GPT, "ffn": 40}, "untied": UNTIED, "llama": LLAMA, "tied llama": {**LLAMA, "tied": True}}


def make_set(run: Path, model: dict[str, Any], dtype: str = "float32") -> Path:
    """A set of two tp ranks and two stages, as a trainer leaves it."""
    layout = make_layout(model, 2, 2)
    state = {"job": dataclasses.asdict(layout.job), "progress": {"step": 5}, "data": "abc"}
    return on_ranks(4, lambda control: save_set(RunFolder(run).checkpoints, 5, layout, control.rank, control,
                                                shards_of(layout, control.rank, dtype), state))[0]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def logits_of(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=tokens).logits


@pytest.mark.parametrize("name", MODELS)
def test_export_import_export(name: str, tmp_path: Path) -> None:
    path = make_set(tmp_path / "run", MODELS[name])
    said = export_set(path, tmp_path / "one", max_shard_bytes=6000)
    assert "largest difference" in said
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    assert all(file.stat().st_size < 6000 + 2000 for file in (tmp_path / "one").glob("*.safetensors"))
    model = saved_job(path).model
    tokens = torch.randint(model.vocab, (2, model.seq), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        want = load_network(path, saved_job(path))(tokens)
    assert want.std() > 0.01
    torch.testing.assert_close(logits_of(tmp_path / "one", tokens), want, rtol=1e-5, atol=1e-5)
    import_folder(tmp_path / "one", RunFolder(tmp_path / "again"))
    found = latest_set(tmp_path / "again/checkpoints")
    assert found is not None and found.name == "step-00000000"
    for tensor in verify_set(found).tensors:
        assert load_tensor(found, tensor).tobytes() == load_tensor(path, tensor).tobytes()
        assert not load_tensor(found, tensor, "exp_avg_sq").any()
    export_set(found, tmp_path / "two", max_shard_bytes=6000)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def random_model(kind: str) -> GPT2LMHeadModel | LlamaForCausalLM:
    torch.manual_seed(7)
    if kind == "gpt2":
        made = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=3,
                                          bos_token_id=0, eos_token_id=0))
    else:
        made = LlamaForCausalLM(LlamaConfig(
            vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=16, rms_norm_eps=1e-5, head_dim=None,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0}, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for parameter in made.parameters():  # biases too: at zero a swapped pair would not show
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_import_of_a_transformers_model_gives_its_logits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = random_model(kind).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    import_folder(tmp_path / "theirs", RunFolder(tmp_path / "run"))
    path = latest_set(tmp_path / "run/checkpoints")
    tokens = torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = load_network(path, saved_job(path))(tokens)
        want = logits_of(tmp_path / "theirs", tokens)  # read anew: .to(bfloat16) narrowed its rotary table too
    assert want.std() > 0.1
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)


def test_old_gpt2_names_and_buffers_are_understood(tmp_path: Path) -> None:
    random_model("gpt2").save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs/model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, file)
    import_folder(tmp_path / "theirs", RunFolder(tmp_path / "run"))
    path = latest_set(tmp_path / "run/checkpoints")
    assert (load_tensor(path, "layers.1.attention.k.bias")
            == tensors["h.1.attn.c_attn.bias"][24:48].numpy()).all()


def test_bf16_export_rounds_to_nearest(tmp_path: Path) -> None:
    path = make_set(tmp_path / "run", LLAMA, "float64")
    export_set(path, tmp_path / "out", "bf16")
    found = load_file(tmp_path / "out/model.safetensors")
    want = torch.from_numpy(load_tensor(path, "layers.3.mlp.down.weight")).to(torch.bfloat16)
    assert torch.equal(found["model.layers.3.mlp.down_proj.weight"], want)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_an_export_with_other_logits_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    make_set(tmp_path / "run", GPT)
    monkeypatch.setattr(exchange, "to_config", lambda *words: {**to_config(*words), "activation_function": "relu"})
    assert cli.main(["ckpt", "export", str(tmp_path / "run"), str(tmp_path / "out")]) == 3
    assert "logits differ by" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
    monkeypatch.setattr(exchange, "_free_memory", lambda: 1000)
    assert cli.main(["ckpt", "export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert "logits not compared" in capsys.readouterr().out


def test_a_damaged_set_is_not_exported(tmp_path: Path) -> None:
    path = make_set(tmp_path / "run", GPT)
    file = path / "shard-00001.h5"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"shard-00001\.h5"):
        export_set(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "change", "words"), [
    ("gpt2", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
    ("gpt2", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer"),
    ("gpt2", {"model_type": "bert"}, "model_type is 'bert'"),
    ("gpt2", {"n_embd": 30}, "means"),
    ("gpt2", {"n_layer": 1}, "has a tensor that this network has not: transformer.h.1"),
    ("gpt2", {"n_layer": 3}, "has no tensor transformer.h.2"),
    ("llama", {"attention_bias": True}, "attention_bias"),
    ("llama", {"rms_norm_eps": 1e-6}, "rms_norm_eps"),
    ("llama", {"head_dim": 8}, "head_dim"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type is 'llama3'"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantized"),
])
def test_what_this_network_computes_otherwise_is_refused(kind: str, change: dict, words: str, tmp_path: Path) -> None:
    random_model(kind).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=words):
        import_folder(tmp_path / "theirs", RunFolder(tmp_path / "run"))
    assert latest_set(tmp_path / "run/checkpoints") is None


def test_what_gpt2_cannot_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.kv_heads.*is 2 of 4"):
        export_set(make_set(tmp_path / "run", {**GPT, "kv_heads": 2}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", MODELS)
def test_config_says_the_model(name: str) -> None:
    layout = make_layout(MODELS[name])
    model = layout.job.model
    assert from_config(to_config(model, None, "float32"), "here") == model
    assert sum(np.prod(f.shape) for f in foreign_tensors(model)) == sum(p.numel for p in layout.table)


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    model = {**GPT, "layers": 8, "hidden": 64, "vocab": 64}
    path = make_set(tmp_path / "run", model)
    tensors = foreign_tensors(saved_job(path).model)
    largest, total = (4 * how(int(np.prod(t.shape)) for t in tensors) for how in (max, sum))
    manifest = verify_set(path)
    tracemalloc.start()
    exchange.write_safetensors(tmp_path, path, manifest, tensors, "fp32", 1 << 30)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # parts, joined, turned, and a little beside them
    assert peak < 3 * largest + 200_000 < total, (peak, largest, total)


def test_training_goes_on_from_an_import_and_keeps_its_tokenizer(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    job = make_job(store, train={"precision": "fp32", "steps": 2}, model={"dropout": 0.0})
    (tmp_path / "job.toml").write_text(to_toml(job))
    assert cli.main(["train", str(tmp_path / "job.toml"), "--run", str(tmp_path / "run")]) == 0
    assert cli.main(["ckpt", "export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    shutil.rmtree(tmp_path / "run")
    assert cli.main(["ckpt", "import", str(tmp_path / "hf"), str(tmp_path / "new")]) == 0
    with open_hdf5(tmp_path / "new/checkpoints/step-00000000/model.h5") as index:
        assert index["layers/0/mlp/up/weight"].shape == (128, 32)
    want = read_loss(tmp_path)
    words = ["train", str(tmp_path / "new/job.toml"), "--run", str(tmp_path / "new"), "--data.store", str(store),
             "--train.steps", "2", "--train.precision", "fp32", "--train.global_batch", "8", "--checkpoint.every", "0"]
    assert cli.main(words) == 0
    assert latest_set(tmp_path / "new/checkpoints").name == "step-00000002"
    first = read_lines(tmp_path / "new/metrics.jsonl")[0]
    assert first["step"] == 1 and abs(first["loss"] - want) < 1e-5
    assert [line["set"] for line in read_lines(tmp_path / "new/journal.jsonl") if line["event"] == "start"] == [
        "step-00000000"]
    kept = (tmp_path / "new/tokenizer/tokenizer.json").read_bytes()
    assert kept == (tmp_path / "hf/tokenizer.json").read_bytes() == (store / "tokenizer.json").read_bytes()
    shutil.rmtree(tmp_path / "new/checkpoints")
    (tmp_path / "new/metrics.jsonl").unlink()
    assert cli.main(words) == 2  # had imported weights: not to begin anew with first ones, without a word


def read_loss(place: Path) -> float:
    """What transformers says about the first batch of the imported model."""
    from hpcpar.data.sampler import SampleOrder

    rows = torch.from_numpy(SampleOrder([TokenStore.open(place / "store")], [1.0], 16, 1, 0.01).tokens(np.arange(8)))
    logits = logits_of(place / "hf", rows[:, :-1])
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
