"""A plan as tables of text: one plan for the screen, many side by side as Markdown."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PREDICTED = (
    "Predicted from the TPU compiler's own schedule and memory plan, and from stated rates of kernels and links; "
    "measured on no TPU."
)
NOT_PREDICTED = (
    "the host, input pipeline and checkpoints; transfers to the host's memory; latencies of launches, DMA and links; "
    "stragglers and failures; XLA's choice of another schedule at run time"
)


def table(rows: Sequence[Sequence[Any]], header: Sequence[str] = ()) -> str:
    """Rows as aligned columns, words to the left and numbers to the right."""
    cells = [[str(cell) for cell in row] for row in ((header, *rows) if header else rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    numeric = [all(row[i][:1] in "-0123456789." for row in cells[bool(header) :]) for i in range(len(widths))]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


def markdown(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """The same as a Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def number(value: float | None, digits: int = 3) -> str:
    """A few digits: 0.0123, 1.23, 12.3, 12,345; "-" for what there is none of."""
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def verdict(plan: Mapping[str, Any]) -> str:
    """Whether it fits, and by how much it does not."""
    need, limit = plan["memory_gib_per_chip"], plan["memory_limit_gib"]
    if plan["fits"]:
        return f"fits: {number(need)} of {number(limit)} GiB per chip"
    if need is None:
        return f"does not fit: the compiler gave up ({plan['detail']['refused']})"
    return (
        f"does not fit: {number(need)} GiB per chip are {number(need - limit)} more than the {number(limit)} there are"
    )


def one(plan: Mapping[str, Any]) -> str:
    """One plan for the screen: what plan.json says, in words."""
    detail = plan["detail"]
    rows = [
        ("program", detail["what"]),
        ("TPU", f"{detail['tpu']}: {detail['chips']} chips, {detail['topology']}, {detail['slices']} slice(s)"),
        ("mesh", "data {data} x fsdp {fsdp} x sequence {sequence}".format(**detail["mesh"])),
        ("batch", f"{detail['samples_per_step']} samples a step, {detail['tokens_per_sample']:,} tokens each"),
        ("memory", verdict(plan)),
        ("compile", f"{number(plan['compile_s'])} s, {number(detail['compile_cpu_s'])} s of processor time"),
    ]
    if plan["predicted_step_s"] is not None:
        seconds = detail["seconds"]
        rows[5:5] = [
            (
                "step",
                f"{number(plan['predicted_step_s'])} s (no overlap {number(seconds['no_overlap'])}, full overlap "
                f"{number(seconds['full_overlap'])}): XLA {number(seconds['xla'])}, Pallas {number(seconds['pallas'])}, "
                f"links {number(seconds['links'])}, of which exposed {number(seconds['exposed'])}",
            ),
            (
                "MFU",
                f"{100 * plan['predicted_mfu']:.1f} %; {100 * detail['mfu_at_floor']:.1f} % (a step in "
                f"{number(seconds['floor'])} s) if all but the matmuls ran at HBM's bandwidth",
            ),
            ("speed", f"{number(detail['samples_per_s'])} samples/s, {number(detail['tokens_per_s'])} tokens/s"),
            ("links", f"{number(plan['wire_gb_per_chip'])} GB a chip, {100 * plan['async_share']:.0f} % asynchronous"),
            (
                "stage",
                f"{detail['stage_samples']:,} samples: {number(detail['days'])} days, {number(plan['chip_hours'])} chip-hours"
                + (f", price {number(detail['price'])}" if detail["price"] else ""),
            ),
        ]
    text = table(rows)
    if plan["predicted_step_s"] is not None:
        text += "\n\n" + table(
            [(number(row["seconds"]), row["category"], row["phase"], row["name"]) for row in detail["top"][:10]],
            ("seconds", "kind", "part", "of"),
        )
        text += "\n\n" + table(
            [
                (number(row["gb"]), number(row["seconds"]), row["calls"], row["kind"], row["group"], row["mode"])
                for row in detail["collectives"]
            ],
            ("GB", "seconds", "calls", "collective", "devices", "mode"),
        )
    return f"{text}\n\n{PREDICTED}\nNot predicted: {NOT_PREDICTED}.\n"


HEADER = (
    "plan", "TPU", "mesh", "samples", "tokens", "remat", "GiB/chip (limit)", "step s", "MFU %", "at floor %",
    "XLA / Pallas / links s", "exposed s", "wire GB/chip", "async %", "samples/s", "chip-hours", "compile s",
)  # fmt: skip


def row(name: str, plan: Mapping[str, Any]) -> tuple[str, ...]:
    """One plan as a row under HEADER."""
    detail = plan["detail"]
    mesh = "x".join(str(size) for size in detail["mesh"].values())
    need = number(plan["memory_gib_per_chip"])
    head = (
        name, detail["tpu"], mesh, str(detail["samples_per_step"]), f"{detail['tokens_per_sample']:,}", str(detail["remat"]),
        f"{need} ({number(plan['memory_limit_gib'])})" + ("" if plan["fits"] else ", does not fit"),
    )  # fmt: skip
    compile_s = f"{plan['compile_s']:.0f}"
    if plan["predicted_step_s"] is None:
        return *head, *("-",) * 9, compile_s
    seconds = detail["seconds"]
    parts = " / ".join(number(seconds[part]) for part in ("xla", "pallas", "links"))
    return (
        *head, number(plan["predicted_step_s"]), f"{100 * plan['predicted_mfu']:.1f}", f"{100 * detail['mfu_at_floor']:.1f}",
        parts, number(seconds["exposed"]), number(plan["wire_gb_per_chip"]), f"{100 * plan['async_share']:.0f}",
        number(detail["samples_per_s"]), number(plan["chip_hours"]), compile_s,
    )  # fmt: skip


def fill(document: str, plans: Mapping[str, Mapping[str, Any]]) -> str:
    """The document with all plans, by name, between its lines `<!-- plans -->` and `<!-- /plans -->`.

    Raises ValueError where it has no such lines.
    """
    before, found, rest = document.partition("<!-- plans -->\n")
    _, ended, after = rest.partition("<!-- /plans -->")
    if not found or not ended:
        raise ValueError("the document has no lines <!-- plans --> and <!-- /plans -->")
    text = markdown([row(name, plan) for name, plan in sorted(plans.items())], HEADER)
    return f"{before}{found}\n{text}\n\n{PREDICTED} Not predicted: {NOT_PREDICTED}.\n\n{ended}{after}"


if __name__ == "__main__":
    # python -m cogvideox_jax.plan.page docs/plan.md docs/plans/*.json
    path = Path(sys.argv[1])
    stored = {Path(name).stem: json.loads(Path(name).read_text()) for name in sys.argv[2:]}
    path.write_text(fill(path.read_text(), stored))
