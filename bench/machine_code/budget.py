"""What the machine code of each program may cost: `bench/machine_code_budget.json`.

`baselines` holds, per minor version of Triton and program, the figures that `python -m
bench.machine_code --update-budget` writes. `exceptions` holds the rules that a program is known to
break, up to which figures, and why: reasons are written by hand, figures by `--accept-known`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from bench import tables
from bench.machine_code.figures import LoopFigures, Report, Violation
from bench.machine_code.programs import Program, quick

PATH = Path(__file__).parents[1] / "machine_code_budget.json"
# A hot loop, or code whose loops are not read, may grow by this part of its baseline.
GROWTH = 0.03


@dataclass(frozen=True)
class KnownFault:
    """A rule that programs break, up to and including `figures`."""

    programs: dict[str, tuple[int, ...]]
    rule: str
    reason: str

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> KnownFault:
        """Inverse of `dataclasses.asdict`."""
        programs = {name: tuple(figures) for name, figures in entry["programs"].items()}
        return cls(programs, entry["rule"], entry["reason"])

    def covers(self, program: str, violation: Violation) -> bool:
        """Whether a violation is known and has not got worse."""
        most = self.programs.get(program)
        return (
            violation.rule == self.rule
            and most is not None
            and len(most) == len(violation.figures)
            and all(x <= limit for x, limit in zip(violation.figures, most, strict=True))
        )


@dataclass(frozen=True)
class Budget:
    """The part of the budget file that is for one version of Triton.

    Attributes:
        path: of the file.
        triton: minor version, such as "3.6".
        baselines: figures by program.
        faults: what is known to be wrong.
    """

    path: Path
    triton: str
    baselines: dict[str, dict[str, Any]]
    faults: list[KnownFault]

    @classmethod
    def from_file(cls, triton_version: str, path: Path = PATH) -> Budget:
        """Reads the part for a version of Triton; there is none for versions not seen yet."""
        minor = ".".join(triton_version.split(".")[:2])
        content = json.loads(path.read_text())
        faults = [KnownFault.from_json(entry) for entry in content["exceptions"].get(minor, [])]
        return cls(path, minor, content["baselines"].get(minor, {}), faults)

    def missing(self, programs: Iterable[Program]) -> list[str]:
        """Programs whose loops can't be compared with anything."""
        return [x.label for x in programs if x.label not in self.baselines]

    def violations(self, report: Report) -> list[Violation]:
        """What a program breaks, known faults left out."""
        label = report.program.label
        found = [*report.violations(), *self._growth(report)]
        return [x for x in found if not any(fault.covers(label, x) for fault in self.faults)]

    def _growth(self, report: Report) -> list[Violation]:
        baseline = self.baselines.get(report.program.label)
        if report.figures is None or baseline is None:
            return []
        if baseline["shape"] != report.program.shape:
            text = f"is {report.program.shape}, its baseline {baseline['shape']}"
            return [Violation("baseline", f"{text}: run with --update-budget")]
        if set(baseline["loops"]) != set(report.figures.loops):
            text = f"has loops {sorted(report.figures.loops)}, its baseline"
            return [Violation("baseline", f"{text} {sorted(baseline['loops'])}")]
        found = []
        if report.blocks < baseline["blocks"]:
            text = f"a processor holds {report.blocks} blocks, baseline {baseline['blocks']}"
            found.append(Violation("blocks", text))
        for name, most in baseline.get("code", {}).items():
            if (now := report.code[name]) > most * (1 + GROWTH):
                found.append(Violation("code", f"{now} {name}, baseline {most}"))
        for function, before in baseline["loops"].items():
            loop = report.figures.loops[function]
            for name, words in (("instructions", "instructions"), ("apart", "modelled clocks")):
                now = getattr(loop, name)
                if now > before[name] * (1 + GROWTH):
                    text = f"full loop of {function}: {now:g} {words}, baseline {before[name]:g}"
                    found.append(Violation("hot loop", text))
        return found

    def updated(self, reports: list[Report]) -> Budget:
        """The same with the figures of these reports as baselines."""
        fresh = {
            report.program.label: {
                "shape": report.program.shape,
                "blocks": report.blocks,
                "registers": report.figures.registers,
                "spills": [report.figures.spill_stores, report.figures.spill_loads],
                "shared": report.figures.shared,
                "share": [round(x, 3) for x in report.shares() or ()],
                "loops": {
                    function: {
                        "instructions": loop.instructions,
                        "apart": round(loop.apart, 1),
                        **_walks(loop),
                    }
                    for function, loop in report.figures.loops.items()
                },
                **({} if report.figures.loops else {"code": report.code}),
            }
            for report in reports
            if report.figures is not None
        }
        return replace(self, baselines=self.baselines | fresh)

    def accepting(self, reports: list[Report]) -> Budget:
        """The same with the figures of what these programs break, where a reason is known.

        A reason of another version of Triton is one of this version, too.
        """
        exceptions = json.loads(self.path.read_text())["exceptions"]
        others = [KnownFault.from_json(x) for version in exceptions.values() for x in version]
        reasons = {
            (fault.rule, program): fault.reason
            for fault in (*others, *self.faults)  # those of this version count
            for program in fault.programs
        }
        broken: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
        anew = {report.program.label for report in reports if report.figures is not None}
        for fault in self.faults:
            kept = {name: x for name, x in fault.programs.items() if name not in anew}
            broken.setdefault((fault.rule, fault.reason), {}).update(kept)
        for report in reports:
            label = report.program.label
            for x in report.violations():
                if reason := reasons.get((x.rule, label)):
                    programs = broken.setdefault((x.rule, reason), {})
                    # Several loops may break a rule: the most counts.
                    pairs = zip_longest(programs.get(label, ()), x.figures, fillvalue=0)
                    programs[label] = tuple(max(pair) for pair in pairs)
        faults = [KnownFault(x, rule, why) for (rule, why), x in broken.items() if x]
        return replace(self, faults=faults)

    def pruned(self, labels: set[str]) -> Budget:
        """Without the programs that no longer exist."""
        kept = {label: x for label, x in self.baselines.items() if label in labels}
        return replace(self, baselines=kept)

    def write(self) -> None:
        """Writes the part of this version into the file; everything else in it stays."""
        content = json.loads(self.path.read_text())
        content["baselines"][self.triton] = dict(sorted(self.baselines.items()))
        if self.faults or self.triton in content["exceptions"]:
            content["exceptions"][self.triton] = [
                {"rule": fault.rule, "reason": fault.reason, "programs": fault.programs}
                for fault in self.faults
            ]
        for part in ("baselines", "exceptions"):
            content[part] = dict(sorted(content[part].items(), key=lambda item: _number(item[0])))
        self.path.write_text(_format(content))


def markdown(path: Path = PATH) -> str:
    """The table of the documentation: the newest Triton's figures, the oldest's in brackets.

    It has the programs that the tests compile.
    """
    baselines = json.loads(path.read_text())["baselines"]
    versions = sorted(baselines, key=_number)
    old, new = baselines[versions[0]], baselines[versions[-1]]
    header = (
        "program", "tiles, stages, warps", "registers", "spilled bytes, stored / loaded",
        "shared KB", "blocks", "share of peak (model)",
    )  # fmt: skip

    def natural(label: str) -> list[tuple[int, str]]:
        return [(int(part or 0), word) for word, part in re.findall(r"(\D+)(\d*)", label)]

    def cells(x: dict[str, Any]) -> tuple[str, ...]:
        return (
            x["shape"],
            str(x["registers"]),
            "{} / {}".format(*x["spills"]) if any(x["spills"]) else "none",
            f"{x['shared'] / 1024:.0f}",
            str(x["blocks"]),
            "-".join(f"{share:.0%}" for share in x["share"]) or "no model",
        )

    rows = []
    for label in sorted({program.label for program in quick()} & new.keys(), key=natural):
        both = zip(cells(new[label]), cells(old.get(label, new[label])), strict=True)
        rows.append((label, *(now if now == then else f"{now} ({then})" for now, then in both)))
    table = tables.markdown(header, rows, "l" * len(header))
    return f"{table}\n\nTriton {versions[-1]}, in brackets {versions[0]} where it differs."


def _walks(loop: LoopFigures) -> dict[str, list[int]]:
    """Those of full and of masked tiles, where there are both."""
    if loop.walk is None or loop.masked_walk is None:
        return {}
    return {"walk": [round(loop.walk), round(loop.masked_walk)]}


def _number(version: str) -> list[int]:
    """A version as it is sorted: 3.10 behind 3.9."""
    return [int(part) for part in version.split(".")]


def _format(content: dict[str, Any]) -> str:
    """JSON with one line per program, so that a changed figure is one changed line."""

    def block(value: Any, depth: int) -> str:
        if depth == 0 or not isinstance(value, (dict, list)) or not value:
            return json.dumps(value)
        pad = " " * (4 - depth)
        if isinstance(value, list):
            inner = [f"{pad}{block(x, depth - 1)}" for x in value]
            return "[\n" + ",\n".join(inner) + f"\n{pad[1:]}]"
        inner = [f"{pad}{json.dumps(key)}: {block(x, depth - 1)}" for key, x in value.items()]
        return "{\n" + ",\n".join(inner) + f"\n{pad[1:]}}}"

    return block(content, 3) + "\n"
