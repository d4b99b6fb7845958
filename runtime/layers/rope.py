"""Rotary position tables: cosines and sines for every position, with the scalings of the Llama family. Knows no attention.

Rotary embedding: RoFormer (arXiv:2104.09864), half-split ("NeoX") pairing. Scalings: linear position interpolation
(arXiv:2306.15595), dynamic NTK (each position p beyond the original context uses the base for a text of p + 1 tokens, which is what
decoding token by token gives), llama3 (frequency bands, as Llama 3.1 published), YaRN (arXiv:2309.00071).
"""

from __future__ import annotations

import math

import torch

from ..models.config import RopeConfig


def rope_table(config: RopeConfig, max_position: int, device: torch.device) -> torch.Tensor:
    """float32 [max_position, 2, rotary_dim / 2]: cosines, then sines, already multiplied with the scaling's attention factor."""
    positions = torch.arange(max_position, dtype=torch.float64)
    if config.type == "dynamic":
        frequencies = _dynamic_frequencies(config, positions)
    else:
        frequencies = _frequencies(config)[None, :]
    # transformers multiplies float32 positions with float32 frequencies; keep that rounding so that long contexts agree with it.
    angles = positions.float()[:, None] * frequencies.float()
    factor = _attention_factor(config)
    return torch.stack((angles.cos() * factor, angles.sin() * factor), dim=1).contiguous().to(device)


def _base_frequencies(theta: float | torch.Tensor, dim: int) -> torch.Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    return torch.as_tensor(theta, dtype=torch.float64)[..., None] ** -exponents


def _frequencies(config: RopeConfig) -> torch.Tensor:
    """Radians a position, float64 [rotary_dim / 2]."""
    base = _base_frequencies(config.theta, config.rotary_dim)
    if config.type == "linear":
        return base / float(config.scaling["factor"])
    if config.type == "llama3":
        return _llama3(base, config)
    if config.type == "yarn":
        return _yarn(base, config)
    return base


def _dynamic_frequencies(config: RopeConfig, positions: torch.Tensor) -> torch.Tensor:
    """float64 [positions, rotary_dim / 2]."""
    dim, factor, original = config.rotary_dim, float(config.scaling["factor"]), config.original_max_position
    length = torch.clamp(positions + 1, min=original)
    theta = config.theta * (factor * length / original - (factor - 1)) ** (dim / (dim - 2))
    return _base_frequencies(theta, dim)


def _llama3(base: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    scaling = config.scaling
    factor, low, high = float(scaling["factor"]), float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = config.original_max_position * base / (2 * math.pi)  # how often a frequency turns within the original context
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return base * ((1 - blend) / factor + blend)


def _yarn(base: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    scaling, dim = config.scaling, config.rotary_dim
    factor = _yarn_factor(config)

    def dimension_with(turns: float) -> float:
        return dim * math.log(config.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension_with(float(scaling.get("beta_fast") or 32)), dimension_with(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return base / factor * ramp + base * (1 - ramp)


def _yarn_factor(config: RopeConfig) -> float:
    return float(config.scaling["factor"])


def _attention_factor(config: RopeConfig) -> float:
    if config.type != "yarn":
        return 1.0
    scaling, factor = config.scaling, _yarn_factor(config)

    def magnitude(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all:
        return magnitude(factor, float(mscale)) / magnitude(factor, float(mscale_all))
    return magnitude(factor)
