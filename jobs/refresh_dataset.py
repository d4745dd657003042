"""ray job submit --working-dir . -- python jobs/refresh_dataset.py --config refresh.yaml"""

import sys

from raydpp.cli import run_job
from raydpp.refresh.stage import refresh

if __name__ == "__main__":
    sys.exit(run_job(refresh))
