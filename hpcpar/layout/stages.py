"""Layers -> pipeline stages, and which stage holds which parameter."""

from __future__ import annotations

from hpcpar.layout.parameters import Parameter


def split_layers(num_layers: int, num_stages: int) -> tuple[range, ...]:
    """Return each stage's global layer numbers, as even as can be.

    Spare layers go to the middle stages first: the first stage also embeds, the last also computes logits.
    """
    base, spare = divmod(num_layers, num_stages)
    favoured = [*range(1, num_stages - 1), 0, num_stages - 1][:spare] if num_stages > 1 else []
    ends, start = [], 0
    for stage in range(num_stages):
        stop = start + base + (stage in favoured)
        ends.append(range(start, stop))
        start = stop
    return tuple(ends)


def stage_parameters(
    table: tuple[Parameter, ...], stages: tuple[range, ...], stage: int, tied: bool
) -> tuple[Parameter, ...]:
    """List the parameters on a stage; a tied embedding is on the first stage and, for the logits, on the last."""
    last = stage == len(stages) - 1
    held = []
    for parameter in table:
        if parameter.layer is not None:
            here = parameter.layer in stages[stage]
        elif parameter.name.startswith("embedding."):
            here = stage == 0 or (last and tied and parameter.name == "embedding.token.weight")
        else:
            here = last
        if here:
            held.append(parameter)
    return tuple(held)
