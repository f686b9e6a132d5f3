"""Replicas: one model served on many machines, by a server on each worker of a Dask cluster."""
