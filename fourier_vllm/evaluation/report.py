"""The table of an evaluation, made from its JSON and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fourier_vllm.evaluation import results

OURS = "fourier"  # the family

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]


def write(data: Mapping[str, Any], out: Path) -> str:
    """Write `results.md` and, where matplotlib is installed, the plots; returns the text.

    Raises
    ------
    ValueError
        The folder cannot be written.
    """
    text = markdown(data)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.md").write_text(text + "\n", encoding="utf-8")
        from fourier_vllm.evaluation.plots import draw

        draw(data, out)
    except ImportError:
        return f"{text}\n\nNo plots: install matplotlib and run `fourier-vllm report` again."
    except OSError as error:
        raise ValueError(
            f"--out cannot be written ({error.strerror or type(error).__name__}): give a folder"
            " that can."
        ) from None
    return text


def report(file: Path, out: Path | None) -> int:
    """`fourier-vllm report`: the table and the plots again; returns the exit code."""
    data = results.load(file)
    print(write(data, out or file.parent))
    return 0


def markdown(data: Mapping[str, Any]) -> str:
    """Where the numbers come from, and one line a format."""
    rows: Sequence[Row] = data["rows"]
    columns = [("format", lambda row: f"`{row['name']}`"), *_sizes(), *_tasks(rows)]
    head = [name for name, _ in columns]
    text = [caption(data), "", *table(head, [[cell(row) for _, cell in columns] for row in rows])]
    duels = same_bytes(rows)
    if duels:
        head = ["format", "bits", "KL", "best of ours at no more bits", "bits", "KL"]
        text += ["", *table(head, duels)]
    return "\n".join(text)


def table(head: Sequence[str], cells: Iterable[Sequence[str]], num_names: int = 1) -> list[str]:
    """Lines of a Markdown table; the first `num_names` columns are text, the others numbers."""
    lines = [head, ["---"] * num_names + ["---:"] * (len(head) - num_names), *cells]
    return [f"| {' | '.join(line)} |" for line in lines]


def same_bytes(rows: Sequence[Row]) -> list[list[str]]:
    """Every comparator that keeps something, and what ours reaches without taking more bits."""
    if "kl" not in rows[0]["tasks"].get("nll", {}):
        return []
    ours = [row for row in rows if row["family"] == OURS]
    found = []
    for row in rows:
        below = [x for x in ours if x["bits"] <= row["bits"]]
        if row["family"] in (OURS, "exact") or not row["bits"] or not below:
            continue
        best = min(below, key=lambda x: x["tasks"]["nll"]["kl"])
        cells = [[f"`{x['name']}`", f"{x['bits']:.2f}", _kl(x)] for x in (row, best)]
        found.append(cells[0] + cells[1])
    return found


def _kl(row: Row) -> str:
    return f"{row['tasks']['nll']['kl']:.4f}"


def caption(data: Mapping[str, Any]) -> str:
    """Model, contexts, and what was measured with."""
    settings, machine = data["settings"], data.get("machine", {})
    engine = settings.get("engine")
    way = (
        f", through vLLM with {engine['prefill']} prefill in chunks of"
        f" {engine['max_num_batched_tokens']}"
        if engine
        else ""
    )
    versions = [f"{name} {version}" for name, version in data.get("versions", {}).items()]
    return (
        f"{data['model']}, {data['documents_done']} documents ({settings['text']}), contexts of"
        f" {settings['context']} tokens of which {settings['start']} to {settings['end']} are"
        f" compressed, seed {settings['seed']}, {settings['dtype']} on {machine.get('device')}{way};"
        f" {', '.join(versions)}{', commit ' + data['commit'] if data.get('commit') else ''}."
    )


def _sizes() -> list[Column]:
    def ratio(row: Row) -> str:
        return "-" if row["ratio"] is None else f"{row['ratio']:.2f}x"

    return [("bits", lambda row: f"{row['bits']:.2f}"), ("smaller by", ratio)]


def _tasks(rows: Sequence[Row]) -> list[Column]:
    """Columns of the tasks that were run."""
    exact = rows[0]["tasks"]
    columns: list[Column] = []
    if "nll" in exact:
        base = exact["nll"]["nll"]
        if "kl" in exact["nll"]:
            columns.append(("KL", _kl))
        columns.append(("NLL", lambda row: f"{row['tasks']['nll']['nll'] - base:+.4f}"))
    for task in exact:
        if "right" in exact[task]:
            columns += [(task, _right(task)), (f"{task} log p", _mean(task, "logp", ".3f"))]
    if "agreement" in exact:
        columns += [
            ("agreement", _mean("agreement", "same", ".3f")),
            ("common prefix", _mean("agreement", "prefix", ".0f")),
        ]
    return columns


def _right(task: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        answers = row["samples"]["tasks"][task]["right"]
        return f"{sum(answers):.0f}/{len(answers)}"

    return cell


def _mean(task: str, metric: str, form: str) -> Callable[[Row], str]:
    return lambda row: format(row["tasks"][task][metric], form)
