"""Text from a checkpoint, in one process."""

from __future__ import annotations

from pathlib import Path

import torch

from hpcpar.checkpoint.load import load_tensor
from hpcpar.checkpoint.verify import read_state, verify_set
from hpcpar.config.job import Job
from hpcpar.config.load import job_from_tables
from hpcpar.data.tokenizer import Tokenizer
from hpcpar.layout.parameters import parameter_table
from hpcpar.nn.transformer import Transformer


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
    verify_set(path)
    with torch.no_grad():
        for parameter in parameter_table(job.model):
            values = load_tensor(path, parameter.name, verify=False)
            network.get_parameter(parameter.name).copy_(torch.from_numpy(values))
    return network.eval()


@torch.no_grad()
def generate(network: Transformer, tokenizer: Tokenizer, prompt: str, num_tokens: int, temperature: float,
             seed: int) -> str:
    """Continue a prompt by sampling; temperature 0 takes the likeliest token. Cost: one forward a token."""
    draw = torch.Generator().manual_seed(seed)
    ids = [tokenizer.end_token, *tokenizer.encode_batch([prompt])[0].tolist()]
    if ids[-1] == tokenizer.end_token and len(ids) > 1:
        ids.pop()
    known = tokenizer.vocab_size
    for _ in range(num_tokens):
        window = torch.tensor([ids[-network.model.seq:]])
        logits = network(window)[0, -1, :known]
        if temperature == 0:
            ids.append(int(logits.argmax()))
        else:
            ids.append(int(torch.multinomial((logits / temperature).softmax(0), 1, generator=draw)))
        if ids[-1] == tokenizer.end_token:
            break
    return tokenizer.decode([i for i in ids if i != tokenizer.end_token])
