"""TRM-ML and its peers on MS-COCO 2014 with missing labels::

    python examples/reproduce_coco.py --data-root coco --amp

What the folder must hold, and where it is had, is on docs/datasets.md.
"""

from trm_pipeline.data.coco import SOURCE
from trm_pipeline.run.experiment import main

if __name__ == "__main__":
    main(source=SOURCE)
