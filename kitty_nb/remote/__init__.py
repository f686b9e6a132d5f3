"""A server on another machine: `kitty-nb serve` there, spoken to over one ssh connection."""
