"""Watches an open model from beside: what its steps take, and a snapshot of what it holds, from any thread."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from slimoe.offload.cache.expert_uses import ExpertUses
from slimoe.offload.cache.host_slots import matrix_bytes
from slimoe.offload.cache.residency import Key
from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.graph.batch import Batch
from slimoe.offload.loaded_model import LoadedModel
from slimoe.offload.model.experts import ExpertLayer, SlotClass
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.engine_plan import EnginePlan
from slimoe.offload.plan.prediction import measure_machine, predict_answers, predict_plan
from slimoe.offload.requests.drafting import STEP_SIZES
from slimoe.offload.requests.snapshot import (
    IN_HOST,
    ON_DEVICE,
    ON_DISK,
    REMOVED,
    ExpertFormat,
    ExpertMap,
    LayerMap,
    MemoryPlace,
    MemoryUse,
    Snapshot,
    Speed,
    Spent,
    Work,
)
from slimoe.offload.resources.memory import peak_resident_bytes, resident_bytes

_TRIES, _PAUSE = 5, 0.002
"""A snapshot is taken while the engine works, and again where it finds something just changing."""


class Observer:
    """Counts what the steps of one engine take; `totals` gives its tiers' counters and its seconds in graphs.

    The steps themselves count in `uses` which experts they select.
    """

    def __init__(self, uses: ExpertUses, totals: Callable[[], Mapping[str, float]]) -> None:
        self.uses, self._totals = uses, totals
        self._steps = dict.fromkeys(("seconds", "n_prompt", "n_predicted", "n_decoded", "decode_seconds"), 0.0)
        self._began: dict[str, float] = {}
        self._is_decoding = False
        self._predicted: tuple[EnginePlan, Speed] | None = None
        self._step_ms: Mapping[int, float] = {}
        self._n_answers = 0

    def predict(self, config: EngineConfig, plan: EnginePlan) -> None:
        """Looks up what a plan promises, before its devices are open: one over the network serves one client only."""
        speed, self._step_ms = _predicted(config, plan)
        self._predicted = plan, speed

    def expected_ms(self) -> float | None:
        """Milliseconds of an answer's token as the plan predicts, None where this machine was not measured for it."""
        per_second = None if self._predicted is None else self._predicted[1].predicted
        return None if per_second is None else 1000 / per_second

    def expected_step_ms(self, n_tokens: int) -> float | None:
        """Milliseconds of a step that continues answers by so many tokens as the plan predicts, None if it does not."""
        return self._step_ms.get(n_tokens)

    def begin(self) -> None:
        """An answer begins."""
        self.uses.begin()
        self._began = self._now()

    def note(self, batch: Batch) -> None:
        """Counts the tokens of a batch that is about to be computed; of those that continue answers not the drafted."""
        self._n_answers = sum(run.is_answer for run in batch.runs)
        self._steps["n_predicted"] += self._n_answers
        self._steps["n_prompt"] += sum(run.n_tokens for run in batch.runs if not run.is_answer)
        self._is_decoding = self._n_answers == len(batch.runs)

    def accept(self, n_tokens: int) -> None:
        """Counts the drafted tokens of the step that are part of answers."""
        self._steps["n_predicted"] += n_tokens
        if self._is_decoding:
            self._steps["n_decoded"] += n_tokens / self._n_answers

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Times one step."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            self._steps["seconds"] += seconds
            if self._is_decoding:
                self._steps["n_decoded"] += 1
                self._steps["decode_seconds"] += seconds
                self._is_decoding = False

    def snapshot(self, config: EngineConfig, plan: EnginePlan, model: LoadedModel, n_running: int) -> Snapshot:
        """What the model holds and what its steps took; may be called from any thread."""
        for _ in range(_TRIES):
            with suppress(RuntimeError, KeyError, AttributeError):
                experts, memory = _expert_map(plan, model, self.uses), _memory_use(config, plan, model)
                return Snapshot(experts, memory, self._work(config, plan, n_running))
            time.sleep(_PAUSE)
        raise UsageError("The engine changes too fast to be looked at. Ask again in a moment.")

    def _now(self) -> dict[str, float]:
        return {**self._totals(), **self._steps}

    def _work(self, config: EngineConfig, plan: EnginePlan, n_running: int) -> Work:
        now = self._now()
        answer = {name: value - self._began.get(name, 0) for name, value in now.items()}
        if self._predicted is None or (self._predicted[0] is not plan and not config.devices.rpc):
            self.predict(config, plan)
        speed = Speed() if self._predicted is None else self._predicted[1]
        measured = answer["n_decoded"] / answer["decode_seconds"] if answer["n_decoded"] else None
        speed = Speed(speed.predicted, speed.most, speed.bound, measured)
        return Work(n_running, _spent(answer), _spent(now), speed)


def _spent(took: Mapping[str, float]) -> Spent:
    compute, device = took.get("cpu_seconds", 0.0), took.get("device_seconds", 0.0)
    disk, seconds = took.get("stall_seconds", 0.0), took["seconds"]
    found = took.get("hits", 0) + took.get("device_hits", 0)
    selected = found + took.get("pending", 0) + took.get("misses", 0)
    return Spent(
        seconds,
        compute,
        disk,
        device,
        max(0.0, seconds - compute - disk - device),
        int(took["n_prompt"]),
        int(took["n_predicted"]),
        found / selected if selected else None,
    )


class _UnmeasuredError(SlimoeError):
    """Something is not known of this machine, and nobody shall wait for it here."""


def _predicted(config: EngineConfig, plan: EnginePlan) -> tuple[Speed, Mapping[int, float]]:
    """What the plan promises, as far as this machine was measured before, and milliseconds of steps by their tokens."""

    def refuse(name: str) -> None:
        raise _UnmeasuredError(name)

    try:
        measured = measure_machine(config, plan, refuse)
        decode = predict_plan(plan, measured).decode
        sizes = (1, *STEP_SIZES) if config.draft == "auto" else ()
        step_ms = {size: predict_answers(plan, measured, size) for size in sizes}
    except (SlimoeError, OSError):
        return Speed(), {}
    bound = 1000 / decode.bound_ms if decode.bound_ms else None
    return Speed(1000 / decode.ms_per_token, bound, decode.bound_name), step_ms


def _expert_map(plan: EnginePlan, model: LoadedModel, uses: ExpertUses) -> ExpertMap:
    formats: dict[SlotClass, int] = {}
    marks: dict[Key, tuple[str, SlotClass]] = {}
    reading: set[Key] = set()
    pool = None if model.tiers is None else model.tiers.host_pool
    for key, kind, is_ready in [] if pool is None else pool.places():
        layer = plan.layers[key[0]]
        assert layer is not None
        is_best = layer.experts[key[1]][0].slot_class is kind
        if not is_ready:
            reading.add(key)
        elif is_best or key not in marks:
            marks[key] = IN_HOST, kind
    for device in model.device_experts:
        marks |= {key: (ON_DEVICE, device.copies[key].slot_class) for key in list(device)}
    whole = {layer for device in plan.devices if device.is_whole for layer in device.layers}
    layers = []
    for index, layer in enumerate(plan.layers):
        if layer is None:
            continue
        default = ON_DEVICE if index in whole else IN_HOST if plan.is_resident else ON_DISK
        found = [_place(layer, (index, expert), marks, default) for expert in layer.target]
        layers.append(
            LayerMap(
                index,
                "".join(mark for mark, _ in found),
                tuple(-1 if kind is None else formats.setdefault(kind, len(formats)) for _, kind in found),
                tuple(row for row, expert in enumerate(layer.target) if (index, expert) in reading),
                None if index in whole else uses.recent(index),
                None if index in whole else uses.total(index),
            )
        )
    described = (
        ExpertFormat(" ".join(type.name for type, _ in kind), sum(matrix_bytes(type, ne) for type, ne in kind))
        for kind in formats
    )
    return ExpertMap(tuple(described), tuple(layers))


def _place(
    layer: ExpertLayer, key: Key, marks: Mapping[Key, tuple[str, SlotClass]], default: str
) -> tuple[str, SlotClass | None]:
    """The mark of one expert, and the format that it is held in or would be read in."""
    if key[1] < 0:
        return REMOVED, None
    return marks.get(key) or (default, layer.experts[key[1]][0].slot_class)


def _memory_use(config: EngineConfig, plan: EnginePlan, model: LoadedModel) -> MemoryUse:
    held, forms = model.memory(), plan.weight_forms
    if plan.is_resident:
        weights, program = forms.mapped + forms.copied + forms.repacked, forms.program
        experts = sum(copies[0].n_bytes for layer in plan.layers if layer is not None for copies in layer.experts)
        # Weights that lie in two arrangements take more than they have in the file.
        experts = min(weights, experts)
        by_use = {"weights": weights - experts, "experts": experts}
    else:
        program = plan.tiers.program if plan.tiers is not None else forms.program
        by_use = {"weights": held.get("copied", 0), "experts": held.get("host_pool", 0)}
    program = max(0, program - plan.reserve - plan.driver_bytes)
    by_use |= {"kv": held.get("kv", 0), "compute": held["compute"], "program": program}
    if plan.driver_bytes:
        by_use["drivers"] = plan.driver_bytes
    setting = config.memory.ram or "auto"
    by_use |= {"pinned": held["pinned"]} if "pinned" in held else {}
    places = [MemoryPlace("host", setting, plan.available, plan.reserve, by_use)]
    for index, device in enumerate(plan.devices):
        uses = {"weights": device.weights, "experts": device.slots, "kv": device.kv, "compute": device.compute}
        asked = config.devices.vram or ("auto",)
        setting = asked[index] if len(asked) == len(plan.devices) else asked[0]
        places.append(MemoryPlace(device.device.name, setting, device.budget, 0, uses))
    return MemoryUse(tuple(places), resident_bytes(), peak_resident_bytes())
