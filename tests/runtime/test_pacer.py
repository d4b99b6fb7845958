"""How much of a long prompt goes into a step beside decoding requests."""

from __future__ import annotations

from octavo.runtime.pacer import LEAST, STRETCH, ChunkPacer
from octavo.runtime.scheduler import SchedulerLimits


def steps(pacer: ChunkPacer, *, usual_s: float, token_s: float, count: int) -> list[float]:
    """Seconds of `count` steps beside a prompt, on a machine of these speeds."""
    took = []
    for _ in range(count):
        took.append(usual_s + token_s * pacer.size)
        pacer.note(decoding=8, prompt_tokens=pacer.size, seconds=took[-1])
    return took


def test_steps_come_to_the_stretch_whatever_a_token_takes() -> None:
    for token_s in (0.0001, 0.001, 0.006):
        pacer = ChunkPacer(32, 2048)
        pacer.note(decoding=8, prompt_tokens=0, seconds=0.05)
        took = steps(pacer, usual_s=0.05, token_s=token_s, count=40)
        assert 0.8 * STRETCH * 0.05 < took[-1] <= 1.02 * STRETCH * 0.05


def test_a_prompt_always_gets_on_and_never_takes_more_than_a_chunk() -> None:
    slow, fast = ChunkPacer(32, 512), ChunkPacer(32, 512)
    for pacer, token_s in ((slow, 10.0), (fast, 1e-9)):
        pacer.note(decoding=8, prompt_tokens=0, seconds=0.05)
        steps(pacer, usual_s=0.05, token_s=token_s, count=40)
    assert slow.size == LEAST
    assert 32 < fast.size <= 512


def test_nothing_is_changed_before_something_is_known() -> None:
    pacer = ChunkPacer(32, 512)
    pacer.note(decoding=0, prompt_tokens=512, seconds=3.0)
    pacer.note(decoding=4, prompt_tokens=32, seconds=3.0)
    assert pacer.size == 32


def test_only_a_prompt_alone_is_paced() -> None:
    limits = SchedulerLimits(64, None, chunk_tokens=512, mixed_chunk_tokens=32)
    assert limits.prompt_tokens(decoding=8, prompts=1, paced=10) == 10
    assert limits.prompt_tokens(decoding=8, prompts=3, paced=10) == 96
    assert limits.prompt_tokens(decoding=0, prompts=1, paced=10) == 512
    assert limits.prompt_tokens(decoding=8, prompts=1) == 32
