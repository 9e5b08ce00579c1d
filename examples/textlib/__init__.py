"""The rooms behind `examples/text.py`; what it shares with `images.py` comes from `imagelib`.

- `options`: the command line
- `text_data`, `windows`: a file becomes tokens; which of them make up a step, which are held out
- `trigram`: the baseline that every model must beat
- `models`, `gpt`: language models by name
- `recipe`: optimizer and learning rate
- `contender`, `race`: variants that take turns, step by step
- `flops`: what torch's counter leaves out; what a step without gates costs
- `records`, `timing`, `results`, `report`: measured, concluded, gathered, shown
"""
