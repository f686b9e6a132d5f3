"""A server on another machine, controlled by `kitty-nb serve` there over one ssh connection."""
