"""Importance: how much the model's answer hangs on what each linear gives, token by token and output by output. Knows no quantization.

An error of a linear's output counts by what it does to the answer. After Kim et al., 2025, GuidedQuant, arXiv 2505.07004: second moments of
inputs weighed by the gradient of the loss by the output; and after Tseng et al., 2025, YAQA, arXiv 2505.22988: those of that gradient.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .calls import Call
from .devices import CPU, give_back_memory
from .float_model import FloatModel
from .sites import Site, watching
from .tuning import LOGIT_ROWS

_TINY = 1e-30
_MOST_OUTPUTS = 2048  # whose moments are kept together: of more there are parts


@dataclass(frozen=True, eq=False)
class Importance:
    """Of a block's sites, with g the gradient of the log likelihood by what a site gives for a token.

    `tokens`: |g|, float32 [S, T]. `outputs`: the mean of g g^T / |g|, float16 [N_i, N_i], of one part of the N outputs after the other.
    Both 1 on average, over tokens and on the diagonals.
    """

    tokens: Mapping[Site, Tensor] = field(default_factory=dict)
    outputs: Mapping[Site, Sequence[Tensor]] = field(default_factory=dict)

    def on(self, device: torch.device) -> Importance:
        """The same on a device, all in float32."""
        outputs = {site: [part.to(device).float() for part in parts] for site, parts in self.outputs.items()}
        return Importance({site: sizes.to(device) for site, sizes in self.tokens.items()}, outputs)


def entries_of(num_outputs: int) -> int:
    """How many numbers the moments of a site's outputs are."""
    return num_outputs * min(num_outputs, _MOST_OUTPUTS)


def find_importance(model: FloatModel, tokens: Tensor, *, seed: int, on_sample: Callable[[], object] = lambda: None) -> list[Importance]:
    """Of each block, for `tokens` int64 [S, T] and next tokens that are drawn from the model itself. The whole model is in memory
    meanwhile, and goes again.

    The square of |g| would be Fisher's information, with which few tokens are nearly all that counts. Sites that do not give each token
    one row, such as those of experts, are left out. Raises ValueError for logits that are not finite.
    """
    model.load_all()
    draw = torch.Generator().manual_seed(seed)
    sizes: list[dict[Site, list[Tensor]]] = [{} for _ in model.blocks]
    products: list[dict[Site, list[Tensor]]] = [{} for _ in model.blocks]
    for row in range(len(tokens)):
        for index, site, gradient in _gradients(model, tokens[[row]], draw):
            size = gradient.norm(dim=1)
            sizes[index].setdefault(site, []).append(size.to(CPU))
            _add_products(products[index].setdefault(site, []), gradient / size.clamp(min=_TINY).sqrt()[:, None])
        give_back_memory()  # with graphs that come and go, 40 MB a sample of a 135M model stayed
        on_sample()
    for index in range(len(model.blocks)):
        model.free_block(index)
    return [_averaged(of_sites, products.pop(0), len(tokens)) for of_sites in sizes]


def _add_products(sums: list[Tensor], rows: Tensor) -> None:
    """Add the products of `rows` [T, N] with themselves, part by part of N."""
    parts = rows.tensor_split(math.ceil(rows.shape[1] / _MOST_OUTPUTS), dim=1)
    if not sums:
        sums += [torch.zeros(part.shape[1], part.shape[1], device=CPU) for part in parts]
    for total, part in zip(sums, parts, strict=True):
        total.add_((part.t() @ part).to(CPU))


def _averaged(sizes: Mapping[Site, list[Tensor]], products: dict[Site, list[Tensor]], samples: int) -> Importance:
    """`products` go on the way."""
    found: dict[Site, Tensor] = {}
    outputs: dict[Site, list[Tensor]] = {}
    for site, rows in sizes.items():
        size = torch.stack(rows)
        parts = products.pop(site)
        if len(rows) == samples and 0 < float(size.mean()) < math.inf:
            found[site] = size / size.mean()
            mean = float(torch.cat([part.diagonal() for part in parts]).mean())
            outputs[site] = [part.div_(mean).half() for part in parts]
    return Importance(found, outputs)


def _gradients(model: FloatModel, tokens: Tensor, draw: torch.Generator) -> Iterator[tuple[int, Site, Tensor]]:
    """By what sites gave for `tokens` [1, T], which the answer hangs on: block, site, [T, N]."""
    hidden, outputs = _run(model, tokens)
    about, wanted = [(index, site) for index, site, _ in outputs], [y for _, _, y in outputs]
    by_hidden = _of_drawn(model, hidden.detach(), draw)
    found = list(torch.autograd.grad(hidden, wanted, by_hidden, allow_unused=True)) if wanted else []
    del hidden, outputs, wanted  # and what was kept for the way back
    for index, site in about:
        gradient = found.pop(0)
        if gradient is not None:
            yield index, site, gradient.reshape(tokens.shape[1], -1).float()


def _run(model: FloatModel, tokens: Tensor) -> tuple[Tensor, list[tuple[int, Site, Tensor]]]:
    """The state behind the last block for `tokens` [1, T], and what sites gave on the way: block, site, rows of N numbers."""
    outputs: list[tuple[int, Site, Tensor]] = []
    hidden, calls = model.calls(tokens)
    hidden = hidden.detach().requires_grad_(True)
    with torch.enable_grad(), model.quickly():
        for index, (block, call) in enumerate(zip(model.blocks, calls, strict=True)):
            hidden, seen = _watched(block, call, hidden)
            times = Counter(site for site, _ in seen)
            whole = [(site, y) for site, y in seen if site.expert is None and y.shape[:-1].numel() == tokens.numel() and times[site] == 1]
            outputs += [(index, site, y) for site, y in whole if y.requires_grad]  # some choose what attention sees, and have no gradient
    return hidden.float(), outputs


def _watched(block: nn.Module, call: Call, hidden: Tensor) -> tuple[Tensor, list[tuple[Site, Tensor]]]:
    seen: list[tuple[Site, Tensor]] = []
    with watching(block, lambda site, y: seen.append((site, y)), outputs=True):
        return call.run(block, hidden), seen


def _of_drawn(model: FloatModel, hidden: Tensor, draw: torch.Generator) -> Tensor:
    """The gradient by `hidden` [1, T, ...] of the negative log likelihood of a token drawn at each place."""
    gradient = torch.empty_like(hidden)
    for at in range(0, hidden.shape[1], LOGIT_ROWS):
        part = slice(at, at + LOGIT_ROWS)
        leaf = hidden[:, part].clone().requires_grad_(True)
        with torch.enable_grad():
            logits = model.logits(torch.zeros(1, leaf.shape[1], dtype=torch.int64), leaf)[0]
        if not bool(logits.isfinite().all()):
            raise ValueError("the logits hold NaN or infinite values: the float model itself overflows on the calibration text")
        share = logits.detach().softmax(-1)
        drawn = torch.multinomial(share.to(CPU), 1, generator=draw).to(share.device)
        by_logits = share.scatter_add_(1, drawn, torch.full(drawn.shape, -1.0, device=share.device))
        (gradient[:, part],) = torch.autograd.grad(logits, leaf, by_logits)
    return gradient
