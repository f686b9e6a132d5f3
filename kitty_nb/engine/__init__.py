"""Which llama-server to run, and how to speak to it.

Nothing is imported here: the embedded engine is a module of this room and should start fast.
"""
