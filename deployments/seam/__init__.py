"""The only package that touches vLLM's internals. A vLLM upgrade is felt here and nowhere else."""
