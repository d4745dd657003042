"""ray job submit --working-dir . -- python jobs/extract_gradients.py CORPUS --out DIR --model NAME"""

import sys

from raydpp.cli import run_job
from raydpp.extract.stage import extract

if __name__ == "__main__":
    sys.exit(run_job(extract))
