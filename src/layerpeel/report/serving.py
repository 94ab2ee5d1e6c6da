"""The commands that serve a run's student, for its report."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from layerpeel.report.runtimes import VerifiedRow
from layerpeel.run.folder import Run


def serve_commands(run: Run, rows: Sequence[VerifiedRow]) -> list[str]:
    """Shell commands that serve the result and verify the server; none while the run has no checkpoint.

    Args:
        rows: what was verified of the run's students.
    """
    if not run.finish or not (run.student_folder / "config.json").is_file():
        return []
    name = run.folder.absolute().name
    vllm = ["vllm", "serve", str(run.student_folder), "--served-model-name", name]
    vllm += ["--trust-remote-code"] if run.config.trust_remote_code else []
    commands = [shlex.join(vllm), _verify(run, 8000, "16-bit")]
    if file := smallest_file(run, rows):
        commands += [shlex.join(["llama-server", "-m", file.path]), _verify(run, 8080, file.precision)]
    else:
        export = ["layerpeel", "export", str(run.folder), "--to", "gguf", "--quantize", "q8_0", "--speed"]
        commands.append(shlex.join([*export, "-o", f"{name}-gguf"]))
    return commands


def smallest_file(run: Run, rows: Sequence[VerifiedRow]) -> VerifiedRow | None:
    """The smallest GGUF file of the run's result that is right."""
    files = [
        row
        for row in rows
        if row.right and row.path.endswith(".gguf") and row.round == run.result_round
        if row.last_pass == (run.last_pass is not None)
    ]
    return min(files, key=lambda row: row.bytes or 0, default=None)


def _verify(run: Run, port: int, precision: str) -> str:
    against = ["--against", f"http://127.0.0.1:{port}", "--precision", precision]
    return shlex.join(["layerpeel", "verify", str(run.folder), *against])
