"""Compares losses at equal tokens: the loop of a config with each of several sets of losses.

    python benchmarks/losses.py configs/storyteller.yaml --depths 16,14 --out results.json

KL alone, hidden MSE alone, both (KL as a mean over tokens), and both as the paper weighs them (KL summed, over 100, and
a plain MSE). Runs that are finished are read from their journals. Prints a Markdown table, and writes the scores.
"""

from __future__ import annotations

from pathlib import Path

from machine import machine
from measuring import write_record
from methods import by_depth, markdown, read_options, row

from layerpeel.config.distill import LossConfig
from layerpeel.config.reading import load_config
from layerpeel.demo.preparing import prepare_demo
from layerpeel.run.loop import peel

LOSSES = {
    "KL": {"kl": LossConfig()},
    "hidden MSE": {"hidden_mse": LossConfig()},
    "KL + hidden MSE": {"kl": LossConfig(), "hidden_mse": LossConfig()},
    "the paper's: KL sum/100 + plain MSE": {
        "kl": LossConfig(reduction="sum/100"),  # type: ignore[call-arg]
        "hidden_mse": LossConfig(relative=False),  # type: ignore[call-arg]
    },
}


def main() -> None:
    """Runs the loop with each set of losses."""
    options = read_options(__doc__)
    path = prepare_demo(Path("runs/losses-demo")) if options.config == "demo" else options.config
    results = {}
    for number, (name, losses) in enumerate(LOSSES.items()):
        config = load_config(path, options.set)
        if losses != config.distill.losses:  # else it is the config's own run, which may go further down
            config.stop.target_layers, config.stop.min_quality = min(options.depths), None
            config.distill.losses = losses
            config.output = config.output.with_name(f"{config.output.name}-losses-{number}")
        run = peel(config)
        results |= {} if results else {"teacher": row(run, run.reference)}
        results[name] = by_depth(run, options.depths)
    depths = ",".join(map(str, options.depths))
    record = {
        "command": f"python benchmarks/losses.py {options.config} --depths {depths}",
        "machine": machine(),
        "results": results,
    }
    write_record(options.out, record, indent=1)
    print(markdown(results))


if __name__ == "__main__":
    main()
