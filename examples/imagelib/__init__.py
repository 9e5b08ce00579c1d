"""The rooms behind `examples/images.py`, from the command line down to the pixels.

- `options`, `command_line`: the options, and what is refused before anything is read
- `image_files`, `image_data`: parquet files, folders of images or digits become tensors in memory
- `batches`: which images make up a step, how they are augmented, how long the training waited
- `models`, `cifar_resnet`: networks by name
- `ranks`: several processes under `torchrun`: what they exchange, and which of them speaks
- `recipe`: optimizer, learning rate over training, times such as "0.1dur"
- `side_by_side`, `contender`: networks that take turns, step by step
- `shortened`, `flops`: the network with its closed blocks taken out; what each block costs
- `records`, `timing`, `results`, `report`: measured, concluded, gathered, shown
- `machine`: what figures were measured on
- `progress`, `checkpoints`: time left and Ctrl-C; going on after an interruption, exactly
"""


class InputError(Exception):
    """Something that the user gave cannot be used; the message is one line that says what."""
