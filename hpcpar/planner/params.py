"""How many parameters a model has, and how many of them a rank holds: counted from the layout's own table."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache

from hpcpar.config.job import Model
from hpcpar.layout.parameters import parameter_table


@dataclass(frozen=True)
class Counts:
    """Elements that a tp rank holds, vocabulary padding included, of each part of the model."""

    layer: int
    layer_vectors: int  # of `layer`, the norms and row biases that tp does not cut
    token_embedding: int
    position_embedding: int
    final_norm: int
    head: int  # the output matrix; 0 where it is the embedding

    def stage(self, num_layers: int, first: bool, last: bool) -> int:
        """Return what a stage holds; a tied embedding is on the first stage and on the last."""
        held = num_layers * self.layer
        held += (self.token_embedding + self.position_embedding) if first else 0
        if last:
            held += self.final_norm + (self.head or (0 if first else self.token_embedding))
        return held


@lru_cache(maxsize=256)
def rank_counts(model: Model, tp_size: int) -> Counts:
    """Count a tp rank's elements, from the parameter table of a model with one layer."""
    found = {"layer": 0, "vectors": 0, "token": 0, "position": 0, "final_norm": 0, "head": 0}
    for parameter in parameter_table(dataclasses.replace(model, layers=1)):
        numel = math.prod(parameter.local_shape(tp_size, 0))
        if parameter.layer is not None:
            found["layer"] += numel
            found["vectors"] += numel if parameter.partial else 0
        else:
            part = parameter.name.removeprefix("embedding.").split(".")[0]
            found[part] += numel
    return Counts(found["layer"], found["vectors"], found["token"], found["position"], found["final_norm"],
                  found["head"])


def total_parameters(model: Model) -> int:
    """Count the whole model's parameters, without padding and each once."""
    ends = sum(p.numel for p in parameter_table(dataclasses.replace(model, layers=1)) if p.layer is None)
    layer = sum(p.numel for p in parameter_table(dataclasses.replace(model, layers=1)) if p.layer is not None)
    return ends + model.layers * layer
