"""TRM-ML and its peers on PASCAL VOC with missing labels.

Without any argument: drawn VOC scenes and a small model that ships with the project. The real thing::

    python examples/reproduce_voc.py --data-root VOCdevkit --model RN101 --pretrained openai
"""

from trm_pipeline.run.experiment import main

if __name__ == "__main__":
    main()
