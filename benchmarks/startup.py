"""Time from a command line to its answer, against what Python itself needs to parse arguments and read YAML.

    python benchmarks/startup.py --out startup.json

Every line runs in a process of its own; lines take turns, and a figure is the median over the rounds. The bar of
`blipren --help`: twice the time of the bare imports plus 0.2 seconds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMAND = ["-m", "blipren.training.cli"]
LINES = {
    "python -c 'import argparse, yaml'": ["-c", "import argparse, yaml"],
    "python -c 'import blipren'": ["-c", "import blipren"],
    "blipren --help": [*COMMAND, "--help"],
    "blipren train --help": [*COMMAND, "train", "--help"],
    "blipren train nothing nowhere out": [*COMMAND, "train", "nothing", "nowhere", "out"],
    "python -c 'import torch'": ["-c", "import torch"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in LINES}
    for _ in range(options.rounds):
        for name, arguments in LINES.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: round(statistics.median(times), 3) for name, times in seconds.items()}
    bare, answer = medians["python -c 'import argparse, yaml'"], medians["blipren --help"]
    bar = round(2 * bare + 0.2, 3)
    report = {"seconds": medians, "rounds": options.rounds, "bar": bar, "within_bar": answer <= bar}
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
