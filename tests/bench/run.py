#!/usr/bin/env python3
"""What `make bench` does: each part measures Lathe beside what a user would pick instead, in interleaved rounds, and one
table judges all of them (report.py). See docs/benchmarks.md.

    run.py PART ...     the parts named, in this order; without one, all
"""

import importlib
import os
import sys
import time
import traceback

from report import ROOT, show

sys.path[:0] = [str(ROOT / ".ci"), str(ROOT / "tests")]

PARTS = ["queue", "serve", "api", "upload", "ingest", "tokenizer", "train", "share", "decode", "bandwidth"]


def main() -> int:
    names = sys.argv[1:] or PARTS
    if unknown := [name for name in names if name not in PARTS]:
        sys.exit(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    figures, broken = [], []
    for name in names:
        begun, load = time.monotonic(), os.getloadavg()[0]
        print(f"{name}: begins at a load of {load:.1f} on {os.cpu_count()} cores", flush=True)
        try:
            figures += importlib.import_module(f"parts.{name}").run()
        except (Exception, SystemExit) as reason:
            # What the others take hours to measure is not lost with it.
            broken.append(name)
            traceback.print_exc()
            print(f"{name}: broke off: {reason}", flush=True)
        print(f"{name}: took {time.monotonic() - begun:.0f} s", flush=True)
    status = show(figures) if figures else 0
    if broken:
        print(f"broke off: {', '.join(broken)}")
    return 1 if broken else status


if __name__ == "__main__":
    sys.exit(main())
