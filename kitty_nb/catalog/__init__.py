"""The models on disk: which there are, their headers, the memory they need, and a demo model."""
