"""The suite under what stands for other processors: ``python tests/processors.py [what pytest takes]`` prints a row for each.

PyTorch, oneDNN and MKL choose their kernels by the processor, and sums end in other bits with each of them and with the threads.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = (
    "ATEN_CPU_CAPABILITY=default",
    "ATEN_CPU_CAPABILITY=avx2",
    "ONEDNN_MAX_CPU_ISA=AVX2",
    "MKL_ENABLE_INSTRUCTIONS=SSE4_2",
    "OMP_NUM_THREADS=1",
    "OMP_NUM_THREADS=2",
)


def main(arguments: list[str]) -> int:
    workers = ["-n", "auto", "--maxprocesses", "8", "--dist", "loadfile"]
    command = [sys.executable, "-m", "pytest", *workers, "--tb", "short", *arguments]
    failed = 0
    print("| setting | minutes | result |\n|---|---|---|", flush=True)
    for setting in SETTINGS:
        name, _, value = setting.partition("=")
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as compiled:  # of its own: code for another processor may not compile
            env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": compiled, name: value}
            done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        *said, result = done.stdout.splitlines() or [done.stderr]
        print(f"| {setting} | {(time.monotonic() - began) / 60:.1f} | {result} |", flush=True)
        if done.returncode:
            failed += 1
            print("\n".join(said), done.stderr, sep="\n", file=sys.stderr)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
