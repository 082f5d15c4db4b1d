"""Layers -> chunks of the network, and which chunk holds which parameter."""

from __future__ import annotations

from hpcpar.layout.parameters import Parameter


def split_layers(num_layers: int, chunk_ranks: tuple[int, ...]) -> tuple[range, ...]:
    """Return each chunk's global layer numbers, as even as can be; `chunk_ranks` names the pipeline rank of each.

    Spare layers go to ranks with fewest layers, and there to the middle chunks first: the first chunk also embeds, the
    last also computes logits.
    """
    num_chunks = len(chunk_ranks)
    base, spare = divmod(num_layers, num_chunks)
    sizes, load = [base] * num_chunks, [0] * (1 + max(chunk_ranks))
    for _ in range(spare):
        chunk = min((c for c in range(num_chunks) if sizes[c] == base),
                    key=lambda c: (load[chunk_ranks[c]], c in (0, num_chunks - 1), c))
        sizes[chunk] += 1
        load[chunk_ranks[chunk]] += 1
    starts = [sum(sizes[:chunk]) for chunk in range(num_chunks)]
    return tuple(range(start, start + size) for start, size in zip(starts, sizes, strict=True))


def chunk_parameters(
    table: tuple[Parameter, ...], chunks: tuple[range, ...], chunk: int, tied: bool
) -> tuple[Parameter, ...]:
    """List the parameters of a chunk; a tied embedding is in the first chunk and, for the logits, in the last."""
    last = chunk == len(chunks) - 1
    held = []
    for parameter in table:
        if parameter.layer is not None:
            here = parameter.layer in chunks[chunk]
        elif parameter.name.startswith("embedding."):
            here = chunk == 0 or (last and tied and parameter.name == "embedding.token.weight")
        else:
            here = last
        if here:
            held.append(parameter)
    return tuple(held)
