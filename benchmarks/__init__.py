"""What the project costs and how true it is, each figure measured beside its yardstick."""
