"""Memory: sets of HDF5 shard files that any layout can load and no crash can spoil; numpy only, no torch."""

from hpcpar.checkpoint.format import Manifest, read_manifest
from hpcpar.checkpoint.load import load_shards, load_tensor, load_together
from hpcpar.checkpoint.retention import retire
from hpcpar.checkpoint.save import save_set
from hpcpar.checkpoint.verify import latest_set, published_sets, read_state, verify_set, verify_together

__all__ = ["Manifest", "latest_set", "load_shards", "load_tensor", "load_together", "published_sets", "read_manifest",
           "read_state", "retire", "save_set", "verify_set", "verify_together"]
