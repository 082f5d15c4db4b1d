"""A job as the user wishes it: frozen dataclasses, one per table of the TOML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hpcpar.errors import UserError


def option(default: Any, doc: str, low: float | None = None) -> Any:
    """Declare one option: its default, its one-line description, and the least legal value."""
    return field(default=default, metadata={"doc": doc, "low": low})


@dataclass(frozen=True)
class Model:
    """The network's shape."""

    kind: Literal["gpt", "llama"] = option("gpt", "gpt: learned positions, LayerNorm, GELU, biases; "
                                                  "llama: rotary positions, RMSNorm, SwiGLU, no biases")
    layers: int = option(12, "transformer layers", 1)
    hidden: int = option(768, "width of the residual stream", 1)
    heads: int = option(12, "attention heads", 1)
    kv_heads: int | None = option(None, "key/value heads (grouped-query attention); default: heads", 1)
    ffn: int | None = option(None, "width inside the MLP; default: 4 x hidden (gpt), 8/3 x hidden up to 64 (llama)", 1)
    seq: int = option(1024, "sequence length in tokens", 1)
    vocab: int = option(50304, "rows of the embedding", 2)
    tied: bool = option(True, "input and output embedding share weights")
    dropout: float = option(0.0, "dropout on embeddings and residuals", 0)
    init_std: float = option(0.02, "standard deviation of the initial weights", 0)
    rope_theta: float = option(10000.0, "base of the rotary frequencies", 1)
    qk_norm: bool = option(False, "queries and keys are scaled to unit mean square a head (no weights)")
    z_loss: float = option(0.0, "weight of the mean squared log-normaliser in the gradient, e.g. 1e-4", 0)
    embedding_grad: float = option(1.0, "factor on the gradient of the embedding look-up, e.g. 0.1", 0)


@dataclass(frozen=True)
class LayoutWish:
    """How the job is cut over ranks; `Layout` in hpcpar.layout is what follows from it."""

    tp: int = option(1, "tensor-parallel ranks", 1)
    pp: int = option(1, "pipeline stages", 1)
    dp: int | None = option(None, "data-parallel replicas; default: what is left of the world size", 1)
    cp: int = option(1, "context-parallel ranks", 1)
    ep: int = option(1, "expert-parallel ranks", 1)
    chunks: int = option(1, "model chunks a rank (interleaved, breadth-first, zbv, ...)", 1)
    schedule: Literal["gpipe", "1f1b", "interleaved", "breadth-first", "zero-bubble", "zbv", "dualpipev", "table",
                      "pipedream", "2bw"] = option("1f1b", "order of a stage's forwards and backwards; table: your "
                                                           "own; pipedream and 2bw on paper only (show --schedule)")
    table: str | tuple[str, ...] = option((), "schedule = table: a file with a line a pipeline rank such as "
                                              "0F0,0F1,0B0,0B1 (chunk, F B I or W, microbatch), or these lines")
    zero: Literal[0, 1, 2, 3] | tuple[Literal[1, 2, 3], int] = option(
        1, "over dp are sharded: 1 the optimizer state, 2 gradients too, 3 weights too; [3, 8]: over each 8 neighbours "
           "in dp, such as those of a node, not over all (hybrid sharding)")
    sequence_parallel: bool = option(True, "norms, dropout and residuals work on seq/tp tokens")
    tp_overlap: int = option(1, "pieces of a layer's exchange over tp, each under way while other pieces' products are "
                                "computed (GPUs); 1: it stands between them", 1)
    recompute: Literal["none", "selective", "full", "offload", "auto"] = option(
        "none", "recompute in backward: nothing, the attention block (with tp_overlap the attention alone), the layer; "
                "offload: nothing, activations wait in the host's memory; auto: of the first three the quickest that "
                "fits by the plan")
    bucket_mib: float = option(32.0, "gradient bucket size in MiB", 0.001)

    @property
    def tp_pieces(self) -> int:
        """In how many pieces a layer's exchanges over tp are: only those of parts of the tokens can be cut."""
        return self.tp_overlap if self.cuts_sequence else 1

    @property
    def cuts_sequence(self) -> bool:
        """Whether sequence parallelism has anything to cut."""
        return self.sequence_parallel and self.tp > 1

    @property
    def sequence_text(self) -> str:
        """Sequence parallelism, for people."""
        pieces = f", exchanges in {self.tp_pieces} pieces" if self.tp_pieces > 1 else ""
        return f"on{pieces}" if self.cuts_sequence else "off"

    @property
    def zero_stage(self) -> int:
        """What is sharded: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too."""
        return self.zero if isinstance(self.zero, int) else self.zero[0]

    @property
    def num_shards(self) -> int:
        """Into how many pieces that is cut, of a resolved wish: all of dp, or fewer (hybrid sharding)."""
        over = required(self.dp) if isinstance(self.zero, int) else self.zero[1]
        return over if self.zero_stage else 1

    @property
    def zero_text(self) -> str:
        """The stage, and over whom, for people."""
        return str(self.zero) if isinstance(self.zero, int) else f"{self.zero[0]} over {self.zero[1]} of {self.dp}"


@dataclass(frozen=True)
class Train:
    """What one step does, and how many there are."""

    global_batch: int = option(256, "sequences a step", 1)
    microbatch: int = option(1, "sequences a forward", 1)
    steps: int = option(1000, "optimizer steps in all", 0)
    precision: Literal["fp64", "fp32", "bf16", "fp16"] = option("bf16", "parameters and activations; bf16 and fp16 "
                                                                        "keep fp32 master weights")
    seed: int = option(1, "of weights, sample order and dropout", 0)
    compile: bool | None = option(None, "torch.compile the layers; default: on GPUs in 16 bits, where it wins")


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedules."""

    lr: float = option(3e-4, "peak learning rate", 0)
    min_lr: float = option(0.0, "learning rate at the end of the decay", 0)
    betas: tuple[float, float] = option((0.9, 0.95), "Adam's two averaging factors")
    eps: float = option(1e-8, "added to Adam's denominator", 0)
    weight_decay: float = option(0.1, "decoupled weight decay of matrices", 0)
    clip: float = option(1.0, "largest global gradient norm; 0 = no clipping", 0)
    warmup_steps: int = option(0, "steps of linear warm-up", 0)
    decay_steps: int | None = option(None, "step at which the cosine reaches min_lr; default: train.steps", 0)
    ramp: tuple[int, int, int] | None = option(None, "batch ramp: start and increment (sequences), over samples")


@dataclass(frozen=True)
class Stability:
    """What protects the weights from a bad step, beyond skipping those that are not finite."""

    spike: float = option(0.0, "robust z-score of loss or gradient norm above which a step is bad; 0 = none", 0)
    on_spike: Literal["skip", "rollback"] = option("skip", "leave the update out, or return to the last checkpoint "
                                                           "and leave the bad samples out")
    check_replicas_every: int = option(100, "steps between comparisons of replicated weights; 0 = never", 0)


@dataclass(frozen=True)
class Data:
    """Where the tokens come from."""

    store: str | tuple[tuple[str, float], ...] = option("stores/text", "a token store, or [[path, weight], ...]")
    validation: float = option(0.01, "share of every store held out at its end", 0)
    validate_every: int = option(0, "steps between validations; 0 = at the end only", 0)
    validate_samples: int = option(64, "sequences a validation", 0)


@dataclass(frozen=True)
class Checkpoint:
    """What is saved, and when."""

    every: int | Literal["auto"] = option(100, "steps between checkpoints; 0 = only when the run stops or ends; auto = "
                                               "by their measured cost and machine.mtbf_h", 0)
    keep: int = option(3, "newest sets kept; 0 = all", 0)
    keep_every: int = option(0, "sets of steps that this divides are kept for good; 0 = none", 0)
    asynchronous: bool | Literal["neighbour"] = option(True, "steps wait only for a copy in memory; a child process "
                                                             "beside each rank writes; neighbour: and each node keeps "
                                                             "a copy of itself and of the node before it in memory")
    ranks_per_file: int = option(1, "consecutive ranks that share a shard file", 1)
    compression: Literal["none", "blosc2-zstd", "blosc2-lz4"] = option("none", "lossless, of the shard files; needs "
                                                                               "hdf5plugin, to read too")


@dataclass(frozen=True)
class Health:
    """When a rank that gives no sign of life is taken for stuck, by what it is doing."""

    step_limit_s: float = option(300.0, "seconds without progress inside a step; six times as long while starting, in "
                                        "the first step, saving, validating, finishing", 1)


@dataclass(frozen=True)
class Machine:
    """The machine that the job is meant for."""

    gpu: str = option("cpu", "GPU kind, or cpu")
    nodes: int = option(1, "nodes", 1)
    gpus_per_node: int = option(8, "GPUs, and so ranks, a node", 1)
    mtbf_h: float = option(4000.0, "mean hours between failures of one node", 0.001)


@dataclass(frozen=True)
class Submit:
    """What Slurm is asked for."""

    walltime_min: int = option(60, "time limit in minutes", 1)
    partition: str = option("", "Slurm partition")
    account: str = option("", "Slurm account")
    mpi: str = option("pmi2", "srun --mpi; pip's mpich wants pmi2")
    cpus_per_task: int = option(1, "cores a rank", 1)
    exclude: tuple[str, ...] = option((), "nodes not to use")
    price_per_gpu_hour: float = option(0.0, "what `hpcpar plan` reckons with, in any currency", 0)
    setup: tuple[str, ...] = option((), "shell lines before the run (modules, environment)")
    constraint: str = option("", "features that a node must have (sbatch --constraint)")
    gres: str = option("", "how the cluster calls its GPUs, such as gpu:a100; default: --gpus-per-node")
    container: str = option("", "words before python3 on every rank, such as apptainer exec --nv IMAGE")
    stage_env: str = option("", "a folder on every node's own disk (shell variables allowed) to unpack the Python "
                                "environment in before the run; default: Python starts from where it is")
    elastic: bool = option(False, "take fewer nodes where some are missing, at a smaller dp")
    retries: int = option(3, "starts in a row that save nothing new before a failing run is given up", 0)


@dataclass(frozen=True)
class Job:
    """Everything that a run needs to know; `resolve()` returns it complete and checked."""

    model: Model = field(default_factory=Model)
    layout: LayoutWish = field(default_factory=LayoutWish)
    train: Train = field(default_factory=Train)
    optim: Optim = field(default_factory=Optim)
    stability: Stability = field(default_factory=Stability)
    data: Data = field(default_factory=Data)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    health: Health = field(default_factory=Health)
    machine: Machine = field(default_factory=Machine)
    submit: Submit = field(default_factory=Submit)

    @property
    def world_size(self) -> int:
        """Ranks of a resolved job."""
        layout = self.layout
        return layout.tp * layout.pp * layout.cp * required(layout.dp)

    @property
    def head_dim(self) -> int:
        """Channels a head."""
        return self.model.hidden // self.model.heads


def required(value: int | None) -> int:
    """Return a value that `resolve()` has filled in."""
    if value is None:
        raise UserError("job", "is not resolved", "call resolve() first")
    return value
