"""Tables, pictures and the page report.html of an output folder of reproduce_voc.py, made anew."""

from __future__ import annotations

import argparse
from pathlib import Path

from trm_pipeline.progress import escape_output
from trm_pipeline.report.page import make_report


def main() -> None:
    escape_output()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="the folder given to reproduce_voc.py as --output")
    parser.add_argument("--data", help="what the results were made on, for the titles; default: what the page said before")
    parser.add_argument("--command", help="what made the results; default: what the page said before")
    args = parser.parse_args()
    try:
        print(make_report(args.output, command=args.command, data=args.data))
    except (ValueError, OSError, KeyError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
