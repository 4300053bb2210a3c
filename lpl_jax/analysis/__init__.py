"""What the paper shows about latents, decoder features and sweeps, as functions and plots."""
