"""The choice of a llama-server, and its command line.

Nothing is imported here: the embedded engine is a module of this room and should start fast.
"""
