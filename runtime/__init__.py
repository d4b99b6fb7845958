"""One engine on one rank: scheduling, cache, model, sampling. Knows no HTTP."""
