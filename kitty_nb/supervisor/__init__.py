"""One llama-server's life: lifecycle, process, health, load progress, log and diagnosis."""
