"""What transformers 4.57, and so what is built on it, makes of our checkpoints.

    python benchmarks/old_transformers.py MODELS --environment FOLDER --out results.json

MODELS is a folder with `smollm2-135m`, `gemma3-270m` and `qwen2.5-coder-0.5b`. Layers are removed from each with
`layerpeel remove`; both versions of transformers load the result in float32 and run the same ids, and their next-token
distributions are compared by KL. The environment of the older version is made in FOLDER, if it is not there yet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch
from machine import machine
from measuring import finish

from layerpeel.model.removal import remove_from_files

OLD = ("torch==2.13.0", "transformers==4.57.*")
REMOVED = {
    "smollm2-135m": range(12, 18),
    "gemma3-270m": range(6, 12),  # a whole period of its cycle of sliding and full attention
    "qwen2.5-coder-0.5b": range(10, 16),
}
TOKENS = 96
# Runs in either environment: log-probabilities of the next token [T, V], and what the model was loaded as.
PROGRAM = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM
folder, ids, out = sys.argv[1:]
dtype = str(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(torch.tensor([json.loads(ids)])).logits[0]
torch.save({"log_probs": logits.log_softmax(-1), "dtype": dtype, "version": transformers.__version__}, out)
"""


def main() -> None:
    """Compares the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--environment", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    old = make_environment(options.environment)
    record: dict[str, Any] = {"command": "python benchmarks/old_transformers.py MODELS", "machine": machine()}
    record["models"] = {name: compare(options.models / name, layers, old) for name, layers in REMOVED.items()}
    finish(options.out, record)


def make_environment(folder: Path) -> Path:
    """The interpreter of an environment with the older transformers."""
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *OLD], check=True)
    return python


def compare(model: Path, layers: range, old: Path) -> dict[str, Any]:
    """Sizes, dtypes and KL of one model without some layers."""
    with tempfile.TemporaryDirectory() as folder:
        removal = remove_from_files(model, layers, Path(folder, "short"))
        sizes = [(each / "model.safetensors").stat().st_size for each in (model, Path(folder, "short"))]
        # The same for both, whatever their tokenizers: words far apart in the vocabulary.
        ids = [17 + 97 * place % 20011 for place in range(TOKENS)]
        new, older = (run(python, Path(folder), ids) for python in (Path(sys.executable), old))
    one, other = new["log_probs"], older["log_probs"]
    kl = (one.exp() * (one - other)).sum(-1)
    return {
        "layers": f"{removal.layers.total} -> {len(removal.layers)}",
        "bytes": sizes[1],
        "share_of_the_teachers_bytes": sizes[1] / sizes[0],
        "dtypes": [new["dtype"], older["dtype"]],
        "versions": [new["version"], older["version"]],
        "kl": float(kl.mean()),
        "largest_kl": float(kl.max()),
        "same_top_token": float((one.argmax(-1) == other.argmax(-1)).float().mean()),
    }


def run(python: Path, folder: Path, ids: list[int]) -> dict[str, Any]:
    """What one version of transformers makes of the checkpoint in `folder / "short"`."""
    out = folder / "out.pt"
    subprocess.run([python, "-c", PROGRAM, str(folder / "short"), json.dumps(ids), str(out)], check=True)
    found: dict[str, Any] = torch.load(out, weights_only=True)
    return found


if __name__ == "__main__":
    main()
