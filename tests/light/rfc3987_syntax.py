"""In the way of the package of this name, which builds 38 grammars at import: seconds each time.

JupyterLab, papermill and nbval import it by jsonschema, which checks one format less without.
"""

raise ImportError
