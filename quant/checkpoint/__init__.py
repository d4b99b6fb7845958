"""Reading checkpoints: safetensors, GGUF, configs. Knows no models and no kernels."""
