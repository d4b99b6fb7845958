"""One file a family of architectures, by config flags."""
