"""TRM-ML and its peers on VG-200 with missing labels::

    python examples/reproduce_vg200.py --data-root vg200 --amp
    python examples/reproduce_vg200.py  # drawn scenes in that layout and the embedded model

What the folder must hold, and where it is had, is on docs/datasets.md.
"""

from trm_pipeline.data.vg200 import SOURCE
from trm_pipeline.run.experiment import main

if __name__ == "__main__":
    main(source=SOURCE)
