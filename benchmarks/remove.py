"""Time and peak memory of `layerpeel remove`, which copies tensors from file to file.

    python benchmarks/remove.py MODEL --layers 10-15 --out results.json

The command runs as a process of its own, some times over; the fastest counts. Beside it the time of a plain copy of the
weights on the same disk.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine
from measuring import finish


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--layers", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    weights = options.model / "model.safetensors"
    seconds, copying = [], []
    with tempfile.TemporaryDirectory(dir=options.out.parent) as folder:
        for _ in range(options.repeats):
            target = Path(folder, "short")
            shutil.rmtree(target, ignore_errors=True)
            command = ["remove", str(options.model), "--layers", options.layers, "-o", str(target)]
            started = time.monotonic()
            subprocess.run([sys.executable, "-m", "layerpeel", *command], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.monotonic() - started)
            written = (target / "model.safetensors").stat().st_size
            started = time.monotonic()
            shutil.copyfile(weights, Path(folder, "copy"))
            copying.append(time.monotonic() - started)
    record = {
        "command": f"python benchmarks/remove.py {options.model.name} --layers {options.layers}",
        "machine": machine(),
        "model": options.model.name,
        "bytes": weights.stat().st_size,
        "written_bytes": written,
        "seconds": min(seconds),
        "copy_seconds": min(copying),
        "peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }
    finish(options.out, record)


if __name__ == "__main__":
    main()
