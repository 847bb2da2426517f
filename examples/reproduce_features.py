"""TRM-ML and its peers on features of any encoder, written by ``trm_losses.write_features``::

    python examples/reproduce_features.py FEATURES --known 0.1 single

What the folder holds is on docs/datasets.md. Scored are the images of its split ``test``, or of ``val`` where it has none.
"""

from trm_pipeline.data.given import SOURCE
from trm_pipeline.run.experiment import main

if __name__ == "__main__":
    main(source=SOURCE)
