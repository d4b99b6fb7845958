"""Makes quantized checkpoints, and measures what that cost. Runs models through octavo.Engine, as any user would."""
