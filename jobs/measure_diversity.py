"""ray job submit --working-dir . -- python jobs/measure_diversity.py TABLE... --out DIR"""

import sys

from raydpp.cli import run_job
from raydpp.measure.stage import measure

if __name__ == "__main__":
    sys.exit(run_job(measure))
