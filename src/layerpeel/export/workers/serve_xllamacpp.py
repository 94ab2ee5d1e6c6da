"""Serves a GGUF file by the package xllamacpp on 127.0.0.1: writes its address, then waits until its input ends.

python serve_xllamacpp.py FILE CONTEXT THREADS
"""

from __future__ import annotations

import sys

import xllamacpp

if __name__ == "__main__":
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx = sys.argv[1], int(sys.argv[2])
    parameters.n_parallel, parameters.hostnames, parameters.warmup = 1, ["127.0.0.1"], False
    if sys.argv[3]:
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(sys.argv[3])
    server = xllamacpp.Server(parameters)
    print(f"address {server.listening_address} xllamacpp {xllamacpp.__version__}", flush=True)
    sys.stdin.read()
