"""Foretelling: parameters, FLOPs, memory, time, money and the best layout of a job, with no process started."""
