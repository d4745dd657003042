"""ray job submit --working-dir . -- python jobs/select_subset.py TABLE --out DIR --size K"""

import sys

from raydpp.cli import run_job
from raydpp.select.stage import select

if __name__ == "__main__":
    sys.exit(run_job(select))
