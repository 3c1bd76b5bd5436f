"""Turns the records of `make gpu` into CSV, JSON, a table and a picture, all in one folder."""

from __future__ import annotations

import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import report, tables
from bench.facts import same_identity
from bench.gpu import tune
from bench.measure import Result
from bench.providers import OURS

# Cases in the picture.
DRAWN = 6


def write(folder: Path, records: list[dict[str, Any]]) -> int:
    """Writes what there is and prints a summary.

    Returns:
        1 if nothing was done, or if a unit of ours was wrong or failed.
    """
    latest = list(_latest(records).values())
    if not latest:
        print(f"{folder} has no records yet")
        return 1
    timed = [row for r in latest if r["key"].startswith("time/") for row in r["rows"]]
    facts = latest[-1]["facts"]
    written = []
    if timed:
        results = [Result.from_json(row) for row in timed]
        written += report.write(results, facts, folder, DRAWN)
        if find_spec("matplotlib") is None:
            print("`python -m bench.gpu --report --out FOLDER` draws it where matplotlib is.")
    for kind in ("check", "ceiling", "tune"):
        flat = [
            {**_flat(row), **r["facts"]}
            for r in latest
            if r["key"].startswith(f"{kind}/")
            for row in r["rows"]
        ]
        if kind == "tune":
            flat.sort(key=lambda row: (str(row.get("kernel")), row["ms"]))
            for row in flat[:5]:
                print(f"{row['config']}: {row['ms']:.3f} ms, {row['tflops']:.1f} TFLOP/s")
            written += _keep_tiles(latest, folder / "tiles.json")
        if flat:
            tables.write_csv(flat, folder / f"{kind}.csv")
            written.append(f"{kind}.csv")
    (folder / "results.json").write_text(json.dumps({"facts": facts, "units": latest}, indent=1))
    written.append("results.json")
    counts = Counter(record["status"] for record in latest)
    print(", ".join(f"{n} {status}" for status, n in counts.items()))
    bad = [record for record in latest if record["status"] in ("wrong", "failed")]
    for record in bad:
        print(f"{record['status']}: {record['key']}: {record['reason']}")
    print(f"Written to {folder}: {', '.join(written)}")
    return 1 if any(_is_ours(record["key"]) for record in bad) else 0


def _keep_tiles(latest: list[dict[str, Any]], path: Path) -> list[str]:
    """Writes the fastest candidate of every sweep; the name of the file if there is one."""
    sweeps: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in latest:
        for row in record["rows"] if record["key"].startswith("tune/") else []:
            if tune.is_kept(row):
                sweeps.setdefault((row["kernel"], str(row["case"])), []).append(row)
    for rows in sweeps.values():
        tune.keep_best(path, rows)
    return [path.name] if sweeps else []


def _is_ours(key: str) -> bool:
    """Whether a unit tries this package, and not what it is compared with."""
    return key.startswith("check/") or f"/{OURS}" in key


def _latest(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last outcome of each unit, of those that share the identity of the last record."""
    if not records:
        return {}
    facts = records[-1]["facts"]
    same = [r for r in records if same_identity(r["facts"], facts)]
    return {record["key"]: record for record in same if record["status"] != "started"}


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    case = row.get("case")
    rest = {name: x for name, x in row.items() if name not in ("case", "tiles")}
    return {**(case or {}), **rest}
