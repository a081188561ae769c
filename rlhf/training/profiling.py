"""`--profile`: one step under torch.profiler, and where its time went: by phase, and by kind of operator.

Nothing here draws from a global generator or touches a tensor of the run's, so its results are the same without a profile.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.profiler import profile, record_function

if TYPE_CHECKING:
    from rlhf.training.session import Training

STEP = 3
"""Of those this process takes: the first allocates and fills caches, and the second still grows what depends on lengths."""

PHASE, WHOLE, OUTSIDE = "phase: ", "step", "outside phases"
SHAPES, TRIES, SECONDS = 32, 4, 0.02
"""The ceiling is measured on so many shapes, those with most FLOP; of each the fastest of so many tries, or of so long."""

KINDS = {
    "matrix products": "mm addmm bmm baddbmm _scaled_mm mv dot matmul linear",
    "softmax, log-prob": "_softmax _log_softmax _softmax_backward_data _log_softmax_backward_data logsumexp gather "
    "multinomial exponential sort topk cumsum argmax nll_loss_forward nll_loss_backward",
    "elementwise, sums": "add sub rsub mul div neg exp log pow sqrt rsqrt mean sum abs clamp where min max minimum maximum "
    "silu silu_backward gelu gelu_backward tanh tanh_backward native_layer_norm native_layer_norm_backward eq ne lt le gt ge",
    "copies, indexing": "copy clone cat index index_select index_put embedding embedding_dense_backward masked_fill fill zero "
    "empty empty_strided select_backward slice_backward scatter",
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}
"""Beside these `attention`, of whatever has that word in its name; `optimizer`, and `other`."""
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
"""Those whose FLOP are counted and whose ceiling is measured."""
PARTS = {"autograd::engine": "backward", "Optimizer.": "optimizer", "aten::_foreach": "optimizer"}
"""By how a name begins; `_foreach` are those of clipping. All else is forward."""
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}

Product = tuple[tuple[int, ...], ...]
"""Shapes of the two factors, the last two dimensions multiplied."""


class Operator(NamedTuple):
    """One call of an operator, without those that it calls."""

    kind: str
    phase: str | None
    part: str
    seconds: float
    product: Product | None


class Profiler:
    """Profiles step `STEP` on rank 0, where `report.profile` asks for it."""

    def __init__(self, train: Training) -> None:
        self.train, self.steps, self.running = train, 0, None
        self.wanted = train.config.report.profile and train.is_main

    def begin(self) -> None:
        self.steps += 1
        if self.wanted and self.steps == STEP:
            self.running: Any = profile(record_shapes=True)  # of CPU and GPU
            self.started = time.perf_counter(), time.process_time()
            self.running.start()

    def end(self, step: int) -> None:
        """Writes RUN/profile/ and says what is in it, where the step that ends is the profiled one."""
        if self.running is None:
            return
        device, dtype = self.train.device, DTYPES[self.train.config.precision]
        wall, cpu = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        profiled, self.running = self.running, None
        profiled.stop()
        directory = self.train.run / "profile"
        directory.mkdir(exist_ok=True)
        profiled.export_chrome_trace(str(directory / "trace.json"))
        events = [event for event in profiled.events() if event.device_type.name == "CPU"]  # a GPU's are told by who called
        found, phases = operators(events, device.type == "cuda"), phase_seconds(events, wall)
        fastest = ceiling(Counter(operator.product for operator in found if operator.product), dtype, device)
        head = f"step {step + 1} of {self.train.stage} under torch.profiler: {wall:.3f} s, {cpu:.3f} s of CPU, "
        head += f"{torch.get_num_threads()} CPU threads, {device.type}, {self.train.config.precision}"
        text = "\n".join([head, "", *by_phase(found, phases, fastest), "", *by_kind(found, wall)])
        (directory / "profile.txt").write_text(text + "\n", encoding="utf-8")
        self.train.note(f"{text}\n{directory / 'trace.json'} opens in https://ui.perfetto.dev")

    def close(self) -> None:
        if self.wanted and self.steps < STEP:
            self.train.note(f"warning: no profile: step {STEP} of a start is profiled, and this one took {self.steps}")


def ranged(phase: str) -> record_function:
    """A range of the trace, which a table's row is made of; next to nothing where nobody profiles."""
    return record_function(PHASE + phase)


def operators(events: Sequence[Any], on_gpu: bool) -> list[Operator]:
    """Those called on the CPU, each with its own seconds on the GPU or there; `events` are torch's FunctionEvents."""
    ranges = [(e.time_range, e.name.removeprefix(PHASE)) for e in events if e.name.startswith(PHASE)]
    found = []
    for event in events:
        if event.name.startswith(PHASE):
            continue  # what is left of a phase without its operators is time between them
        names, above = [event.name], event
        while above := above.cpu_parent:
            names.append(above.name)
        ends = (part for start, part in PARTS.items() if any(name.startswith(start) for name in names))
        part = next(ends, "forward")
        plain = [name.removeprefix("aten::").rstrip("_") for name in names]
        kinds = [KIND_OF.get(name, "attention") for name in plain if name in KIND_OF or "attention" in name]
        kind = part if part == "optimizer" else kinds[0] if kinds else "other"
        # by time, not by ancestors: a GPU's backward runs on a thread of its own
        phase = next((name for span, name in ranges if span.start <= event.time_range.start < span.end), None)
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        # the last two: of addmm and baddbmm the first input, which may be a matrix as well, is added
        product = tuple(tuple(shape) for shape in event.input_shapes if len(shape) >= 2)[-2:] if plain[0] in PRODUCTS else None
        found.append(Operator(kind, phase, part, seconds, product))
    return found


def flop(product: Product) -> int:
    """Multiplications and additions."""
    return 2 * math.prod(product[0]) * product[1][-1]


def phase_seconds(events: Sequence[Any], wall: float) -> dict[str, float]:
    """Wall seconds of each phase, of what is outside them, and of the step."""
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        if event.name.startswith(PHASE):
            seconds[event.name.removeprefix(PHASE)] += event.time_range.elapsed_us() / 1e6
    return dict(seconds) | ({OUTSIDE: wall - sum(seconds.values())} if seconds else {}) | {WHOLE: wall}


@torch.no_grad()
def ceiling(products: Counter[Product], dtype: torch.dtype, device: torch.device) -> dict[Product, float]:
    """Seconds that a product of each shape takes alone, its factors contiguous and at hand."""
    costly = sorted(products, key=lambda product: -flop(product) * products[product])[:SHAPES]
    generator = torch.Generator(device).manual_seed(0)
    calls = 1 if device.type == "cpu" else 10  # so that waiting for a GPU is little of what is timed
    fastest = {}
    for product in costly:
        a, b = (torch.rand(shape, dtype=dtype, device=device, generator=generator) for shape in product)
        tries: list[float] = []
        while len(tries) < TRIES or sum(tries) < SECONDS:  # the first of a shape may choose a kernel
            start = time.perf_counter()
            for _ in range(calls):
                torch.matmul(a, b)
            if device.type != "cpu":
                torch.accelerator.synchronize()
            tries.append((time.perf_counter() - start) / calls)
        fastest[product] = min(tries)
    return fastest


def by_phase(found: list[Operator], phases: dict[str, float], fastest: dict[Product, float]) -> list[str]:
    """A row a phase: FLOP/s of its matrix products over its whole time, and in percent of the ceiling of their shapes."""
    lines = [f"{'phase':<20}{'seconds':>9}{'%':>6}{'GFLOP':>10}{'GFLOP/s':>10}{'ceiling':>10}{'% of it':>9}"]
    for name, seconds in phases.items():
        inside = [one for one in found if name == WHOLE or one.phase == (None if name == OUTSIDE else name)]
        lines.append(f"{name:<20}{seconds:>9.3f}{100 * seconds / phases[WHOLE]:>6.1f}{_roofline(inside, seconds, fastest)}")
        trains = any(one.part == "backward" for one in inside) and (name != WHOLE or len(phases) == 1)
        for part in ("forward", "backward", "optimizer") if trains else ():
            ones = [one for one in inside if one.part == part]
            own = sum(one.seconds for one in ones)
            lines.append(f"  {part:<18}{own:>9.3f}{100 * own / phases[WHOLE]:>6.1f}{_roofline(ones, own, fastest)}")
    return [
        *lines,
        "GFLOP: matrix products, not a fused attention's; ceiling: GFLOP/s of the same shapes, one product at a time.",
    ]


def _roofline(ones: list[Operator], seconds: float, fastest: dict[Product, float]) -> str:
    products = [one.product for one in ones if one.product]
    if not products or not seconds:
        return ""
    total, measured = sum(map(flop, products)), [product for product in products if product in fastest]
    highest = sum(map(flop, measured)) / sum(map(fastest.__getitem__, measured)) if measured else math.nan
    speed = total / seconds
    return f"{total / 1e9:>10.2f}{speed / 1e9:>10.2f}{highest / 1e9:>10.2f}{100 * speed / highest:>9.1f}"


def by_kind(found: list[Operator], wall: float) -> list[str]:
    """A row a kind of operator; what is left of the step is Python's, or waiting."""
    seconds: dict[str, float] = defaultdict(float)
    for one in found:
        seconds[one.kind] += one.seconds
    seconds["between operators"] = max(0.0, wall - sum(seconds.values()))
    lines = [
        f"{kind:<20}{own:>9.3f}{100 * own / wall:>6.1f}"
        for kind, own in sorted(seconds.items(), key=itemgetter(1), reverse=True)
    ]
    return [f"{'kind of operator':<20}{'seconds':>9}{'%':>6}", *lines]
