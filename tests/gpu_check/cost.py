"""What taps cost: three loads of one model, and the time that the host takes for a tap.

Steps come in periods: untapped ones, then tapped ones, so that both are timed in one process under the same clocks. The
first period warms up; there the slab is made and pinned.
"""

from __future__ import annotations

import dataclasses
import json
import statistics

import flexmodel

from .setting import Setting

PERIOD = 20
"""Steps of a period."""
BEGIN = 10
"""The first of them that is tapped."""
SETTLED = 3
"""The first that counts as untapped: what was captured before has left the device."""
BFLOAT16 = 2
"""Bytes of an element."""


@dataclasses.dataclass(frozen=True)
class Load:
    """How much is captured of which model."""

    name: str
    layers: str
    """Which layers are tapped, for a clause."""
    width: int
    depth: int
    tokens: int
    tapped: int
    """Steps of a period that are tapped."""
    rounds: int
    slab: int
    """MiB."""
    options: tuple[str, ...] = ()

    @property
    def taps(self) -> int:
        """Tensors in a tapped step."""
        return self.depth if self.layers == "*" else 1

    @property
    def step_bytes(self) -> int:
        """Bytes in a tapped step."""
        return self.taps * self.tokens * self.width * BFLOAT16

    @property
    def hooks(self) -> str:
        """A clause a period."""
        begins = (PERIOD * number + BEGIN for number in range(self.rounds + 1))
        return ";".join(f"layers.{self.layers}.mlp:forward@steps={at}..{at + self.tapped - 1}" for at in begins)

    def small(self) -> Load:
        """The same for a machine without a GPU, in a moment."""
        return dataclasses.replace(self, width=16, depth=min(self.depth, 4), tokens=32, rounds=1, slab=8)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a load costs, over all measured periods."""

    untapped: float
    """Seconds of a step."""
    ratio: float
    """A tapped step's time to that of an untapped one."""
    spread: tuple[float, float]
    """The lowest and the highest of all periods."""
    host: float
    """Seconds of the host for a tap."""
    peak: int
    """Bytes of the device that taps have at most."""
    rate: float
    """Bytes a second that were captured, while tapped."""


def cost(load: Load, times: dict[str, list[float]]) -> Cost:
    """Of what timed.py printed.

    Where every tapped step is followed by another, the first of them is left out. A single one is measured with the two
    steps behind it, in which its bytes leave the device.
    """
    first, last = (BEGIN + 1, BEGIN + load.tapped) if load.tapped > 1 else (BEGIN, BEGIN + 3)
    number = load.tapped - 1 if load.tapped > 1 else 1
    ratios, hosts, peaks, calms, rates = [], [], [], [], []
    for at in range(PERIOD, PERIOD * (load.rounds + 1), PERIOD):
        calm, busy = slice(at + SETTLED, at + BEGIN), slice(at + first, at + last)
        step = statistics.median(times["step"][calm])
        took = times["step"][busy]
        ratios.append(1 + (sum(took) - step * len(took)) / (step * number))
        host = statistics.median(times["host"][calm])
        hosts.append((statistics.median(times["host"][at + first : at + first + number]) - host) / load.taps)
        peaks.append(max(times["peak"][busy]) - max(times["peak"][calm]))
        calms.append(step)
        rates.append(load.step_bytes * number / sum(took))
    return Cost(
        statistics.median(calms),
        statistics.median(ratios),
        (min(ratios), max(ratios)),
        statistics.median(hosts),
        int(max(peaks)),
        statistics.median(rates),
    )


def measure(setting: Setting, load: Load) -> tuple[Cost, float]:
    """Runs it. The cost, and which part of what was to be captured was stored; the rest was dropped."""
    load = load if setting.on_gpu else load.small()
    steps = PERIOD * (load.rounds + 1)
    argv = setting.program("timed.py", load.width, load.depth, load.tokens, steps)
    job = setting.tapped(load.name, load.hooks, argv, *load.options, FLEXMODEL_SLAB=f"{load.slab}M")
    found = cost(load, json.loads(job.out))
    run = flexmodel.open(job.run)
    asked = load.tapped * load.taps * (load.rounds + 1)
    stored, dropped = len(run.records), run.info.totals.dropped
    setting.expect(stored + dropped == asked, f"{stored} stored and {dropped} dropped of {asked}")
    setting.expect(not run.notices, f"notices: {run.notices}")
    setting.fact("MB a tapped step", round(load.step_bytes / 1e6, 1))
    setting.fact("untapped ms a step", round(found.untapped * 1e3, 3))
    setting.fact("tapped to untapped", round(found.ratio, 4))
    setting.fact("all periods", [round(each, 4) for each in found.spread])
    setting.fact("host us a tap", round(found.host * 1e6, 1))
    setting.fact("GB more of the device", round(found.peak / 1e9, 3))
    setting.fact("GB/s captured", round(found.rate / 1e9, 3))
    setting.fact("stored", round(stored / asked, 4))
    return found, stored / asked


def _stage(
    setting: Setting, load: Load, ratio: float | None = None, host: float | None = None, least: float = 1.0
) -> None:
    """`ratio` and `host` (seconds a tap) are at most these, and `least` of all tensors are stored."""
    found, stored = measure(setting, load)
    setting.expect(stored >= least, f"{stored:.3f} of what was asked for is stored, not {least}")
    if ratio is not None:
        setting.expect_on_gpu(found.ratio <= ratio, f"a tapped step takes at most {ratio} of an untapped one's time")
    if host is not None:
        setting.expect_on_gpu(found.host <= host, f"a tap takes at most {host * 1e6:.0f} us of the host")
    # A snapshot of each tensor under way: no more than is captured in a row, or than a slab holds.
    bound = min(load.step_bytes * load.tapped, load.slab << 20) + (64 << 20)
    setting.expect_on_gpu(found.peak <= bound, f"taps have at most {bound / 1e9:.2f} GB of the device")


LARGE = {"width": 4096, "depth": 16, "tokens": 8192}
"""Outputs of 67 MB, and steps of some 90 ms on an H100."""


def small_taps(setting: Setting) -> None:
    """Tensors of 33 kB, a hundred a step: what a tap takes of the host."""
    load = Load("small-taps", "*", 64, 100, 256, tapped=10, rounds=4, slab=256)
    _stage(setting, load, host=15e-6)


def one_layer(setting: Setting) -> None:
    """67 MB a step, which is below what an agent stores."""
    _stage(setting, Load("one-layer", "0", **LARGE, tapped=10, rounds=5, slab=256), ratio=1.01)


def all_drop(setting: Setting) -> None:
    """Every layer, 1.07 GB, in one step of twenty: taps alone, since nothing ever waits for the agent."""
    load = Load("all-drop", "*", **LARGE, tapped=1, rounds=7, slab=2048, options=("--on-full", "drop"))
    _stage(setting, load, ratio=1.02, least=0.9)


def all_wait(setting: Setting) -> None:
    """Every layer in ten steps on end, so that the job waits for the agent: how many GB/s go through."""
    _stage(setting, Load("all-wait", "*", **LARGE, tapped=10, rounds=1, slab=256))
