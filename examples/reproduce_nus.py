"""TRM-ML and its peers on NUS-WIDE with missing labels::

    python examples/reproduce_nus.py --data-root nuswide --amp

What the folder must hold, and where it is had, is on docs/datasets.md.
"""

from trm_pipeline.data.nus import SOURCE
from trm_pipeline.run.experiment import main

if __name__ == "__main__":
    main(source=SOURCE)
