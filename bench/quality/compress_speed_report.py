"""The figures of `bench.compress_speed`: one document, and a table for a person."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table

from bench.quality.compress_projection import CARD, WHOLE, Weights, calibration_of, conversion_of, decoding_of
from bench.quality.compress_runs import F16, Q4_K, Plan, Report
from slimoe.offload.resources.memory import memory_limit_bytes

PAPER = {"speed": 6.05, "speed_of_plain_4_bits": 5.08, "memory_saved": 0.771}

Row = dict[str, Any]


def file_row(plan: Plan, report: Report, name: str) -> Row:
    """The figures of one file: its size, how it was made, and how it decodes."""
    taken, runs, n_weights = report.made[name], report.rounds[name], Weights.of(plan.shape).total
    seconds = report.step_seconds(name)
    return {
        "n_bytes": taken.n_bytes,
        "bits_per_weight": 8 * taken.n_bytes / n_weights,
        "bytes_by_type": taken.bytes_by_type,
        "tokens_per_s": 1 / seconds,
        "token_bytes_per_s": report.densities[name].token_bytes(plan.shape) / seconds,
        "step_ms": [1e3 * statistics.median(run.step_seconds) for run in runs],
        "load_seconds": statistics.median(run.load_seconds for run in runs),
        "peak_resident": report.peak(name),
        "making": asdict(taken) | {"seconds": taken.seconds, "weights_per_s": n_weights / taken.seconds},
    }


def whole_models(plan: Plan, report: Report) -> Row:
    """What each whole model would take, by the formulas of `compress_projection`."""
    short, long = report.calibrations
    return {
        model: {
            "calibration": calibration_of(shape, short, long),
            "conversion": {name: conversion_of(shape, plan.shape, taken) for name, taken in report.made.items()},
            "decoding": {
                name: decoding_of(
                    shape, density, density.token_bytes(plan.shape) / report.step_seconds(name), memory_limit_bytes()
                )
                for name, density in report.densities.items()
            },
        }
        for model, shape in WHOLE.items()
    }


def as_json(plan: Plan, report: Report) -> Row:
    """The figures as one document; ratios by file at the top."""
    seconds = {name: report.step_seconds(name) for name in report.made}
    smaller = [name for name in report.made if name != F16]
    ratios = {
        "vs_f16": {name: seconds[F16] / seconds[name] for name in smaller},
        "vs_q4k": {name: seconds[Q4_K] / seconds[name] for name in plan.compressed},
    }
    return {
        **{f"compressed_{name}": values for name, values in ratios.items()},
        **{f"slim_{name}": values for name, values in ratios.items()},  # the fields' old names, for one version
        "memory_saved_vs_f16": {name: 1 - report.peak(name) / report.peak(F16) for name in smaller},
        "bytes_saved_vs_f16": {name: 1 - report.made[name].n_bytes / report.made[F16].n_bytes for name in smaller},
        "paper": PAPER,
        "files": {name: file_row(plan, report, name) for name in report.made},
        "calibration": [
            {"n_tokens": one.n_tokens, "n_sensitivity": one.n_sensitivity, "n_sketch": one.n_sketch}
            | asdict(one.taken)
            | {"seconds": one.taken.seconds, "tokens_per_s": one.n_tokens / one.taken.seconds}
            for one in report.calibrations
        ],
        "whole": whole_models(plan, report),
        "card": CARD,
        "shape": asdict(plan.shape),
        "types": plan.types,
        "bits": plan.bits,
        "feedback": plan.feedback,
        "threads": plan.n_threads,
        "rounds": plan.n_rounds,
        "n_decode": plan.n_decode,
    }


def table(document: Mapping[str, Any]) -> Table:
    """The files for a person."""
    columns = ("file", "GB", "bits", "made in s", "peak MB", "tokens/s", "x F16", "x Q4_K", "peak MB", "saved")
    drawn = Table(*columns, title="Making and decoding")
    for name, row in document["files"].items():
        ratios = (document[key].get(name) for key in ("compressed_vs_f16", "compressed_vs_q4k"))
        saved = document["memory_saved_vs_f16"].get(name)
        drawn.add_row(
            name,
            f"{1e-9 * row['n_bytes']:.2f}",
            f"{row['bits_per_weight']:.2f}",
            f"{row['making']['seconds']:.1f}",
            f"{1e-6 * row['making']['peak_resident']:.0f}",
            f"{row['tokens_per_s']:.2f}",
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            f"{1e-6 * row['peak_resident']:.0f}",
            "" if saved is None else f"{100 * saved:.1f} %",
        )
    return drawn
