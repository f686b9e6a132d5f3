"""The choice of a llama-server, and its command line.

Nothing is imported here: the embedded engine is a module of this package and should start fast.
"""
