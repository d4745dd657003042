"""ray job submit --working-dir . -- python jobs/warm_up_adapter.py CORPUS --out DIR --model NAME"""

import sys

from raydpp.cli import run_job
from raydpp.warmup.stage import warmup

if __name__ == "__main__":
    sys.exit(run_job(warmup))
