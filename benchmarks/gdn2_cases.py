"""chunk_gdn2 on the cases of fla-core's own tests, on a GPU: errors against float64 beside their tolerances.

python benchmarks/gdn2_cases.py --out cases.json            a minute or so: compiling is shared by several processes
python benchmarks/gdn2_cases.py --match bfloat16 --fla      only some of them, and fla-core's errors beside ours

Ends with code 1 if an error of ours is above its tolerance. fla-core tunes itself for minutes at every new shape.
"""

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lit_gpt.errors import UserError, exit_on_user_error
from lit_gpt.ops.gdn2 import chunk_gdn2
from tests.ops.gdn2.fla_cases import CASES, errors

console = Console()


def run(number: int, with_fla: bool) -> tuple[dict[str, float], Optional[dict[str, float]], str]:
    """Our errors on a case, fla-core's, and what went wrong."""
    case, theirs, trouble = CASES[number], None, ""
    try:
        ours = errors(chunk_gdn2, chunk_gdn2, case, "cuda")
    except Exception as error:  # reported beside the case; the others go on
        return {}, None, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if with_fla:
        from fla.ops.gdn2 import chunk_gdn2 as fla_chunk_gdn2

        try:
            theirs = errors(fla_chunk_gdn2, chunk_gdn2, case, "cuda")
        except Exception as error:
            trouble = f"fla-core: {type(error).__name__}"
    return ours, theirs, trouble


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="", help="only cases whose name holds this")
    parser.add_argument("--processes", type=int, default=6, help="that share the GPU, and the compiling")
    parser.add_argument("--fla", action="store_true", help="fla-core's errors too")
    parser.add_argument("--out", type=Path, help="write all errors as JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("the cases run on a GPU and this machine shows none.")
    numbers = [n for n, case in enumerate(CASES) if args.match in str(case)]
    if not numbers:
        raise UserError(f"no case holds {args.match!r}; there are: {', '.join(map(str, CASES))}.")

    started = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=spawn) as pool, Progress(console=console) as progress:
        task = progress.add_task("cases", total=len(numbers))
        futures = [pool.submit(run, n, args.fla) for n in numbers]
        for future in futures:
            future.add_done_callback(lambda _: progress.advance(task))
        results = [future.result() for future in futures]

    table = Table(title="error over tolerance")
    for column in ("case", "worst", "of", "o", "fla-core's worst", ""):
        table.add_column(column, justify="right" if column in ("worst", "o", "fla-core's worst") else "left")
    failed, rows = 0, []
    for n, (ours, theirs, trouble) in zip(numbers, results):
        tolerances = CASES[n].tolerances
        ratios = {name: error / tolerances[name] for name, error in ours.items()}
        wrong = [name for name, ratio in ratios.items() if not ratio < 1]  # nan too
        failed += bool(wrong) or not ours
        worst = max(ratios, key=lambda name: (ratios[name] != ratios[name], ratios[name])) if ratios else "-"
        fla_worst = max(e / tolerances[name] for name, e in theirs.items()) if theirs else None
        cells = [f"{ratios[worst]:.2f}" if ratios else "-", worst, f"{ours['o']:.1e}" if ours else "-"]
        verdict = trouble or (f"[red]above: {', '.join(wrong)}" if wrong else "")
        table.add_row(str(CASES[n]), *cells, "" if fla_worst is None else f"{fla_worst:.2f}", verdict)
        rows.append({"case": str(CASES[n]), "errors": ours, "fla-core": theirs, "trouble": trouble})
    console.print(table)
    console.print(f"{len(numbers) - failed} of {len(numbers)} within tolerance, {time.perf_counter() - started:.0f} s")
    if args.out:
        args.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "cases": rows}, indent=1))
        console.print(f"wrote {args.out}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
