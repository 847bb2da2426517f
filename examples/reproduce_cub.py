"""TRM-ML and its peers on the attributes of CUB-200-2011 with missing labels::

    python examples/reproduce_cub.py --data-root CUB_200_2011 --amp
    python examples/reproduce_cub.py  # drawn scenes in that layout and the embedded model

What the folder must hold, and where it is had, is on docs/datasets.md.
"""

from trm_pipeline.data.cub import SOURCE
from trm_pipeline.run.experiment import main

if __name__ == "__main__":
    main(source=SOURCE)
