"""hpcpar trains very large transformer language models on MPI/Slurm clusters."""

__version__ = "0.1.0"
