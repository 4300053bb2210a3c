"""Command-line tools: python -m lpl_jax.tools.<verb>."""
