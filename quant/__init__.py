"""What the bits of a checkpoint mean, and which kernel multiplies them. Knows no requests and no HTTP."""
