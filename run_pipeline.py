"""Run the pipeline:
`run_pipeline.py [STAGE ...] [--config FILE] [--root DIR] [--midi FOLDER] [--list]`.

The pipeline runner is the notebook `nbs/11_pipeline.ipynb`.
"""

import sys
from pathlib import Path

from musicgen.pipeline import main

if __name__ == "__main__":
    sys.exit(main(home=Path(__file__).resolve().parent))
