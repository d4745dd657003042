"""ray job submit --working-dir . -- python jobs/ingest_corpus.py INPUT... --out DIR"""

import sys

from raydpp.cli import run_job
from raydpp.ingest.stage import ingest

if __name__ == "__main__":
    sys.exit(run_job(ingest))
