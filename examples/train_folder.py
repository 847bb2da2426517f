"""TRM-ML on a folder of one's own images and one file of labels, as far as they are known.

    python examples/train_folder.py demo demo
    python examples/train_folder.py train IMAGES LABELS --model ViT-B-32 --pretrained openai
    python examples/train_folder.py predict runs/folder NEW_IMAGES
    python examples/train_folder.py tag IMAGES --classes names.txt --model ViT-B-32 --pretrained openai

``tag`` needs no label. It is the command ``trm-losses``, which ``pip install 'trm-losses[pipeline]'`` installs.

Without --model it is the small model that ships with the project: no download, but it knows drawn scenes only.
"""

from trm_pipeline.command import main

if __name__ == "__main__":
    main()
