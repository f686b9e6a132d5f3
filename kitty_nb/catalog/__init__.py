"""The models on disk: listing, headers, memory requirements, and a demo model."""
