"""Why a model's places differ from the ground truth, for the notes of the coverage table."""

from __future__ import annotations

_POSITIONS = "its convolution for positions, with an activation in it, is residual: one more"
_HEAD = "its pooling head has a residual feed-forward of its own: one more"
_FIRST = "the first layers compute the position bias of all: left out by name"

PLACES = {
    "timm:byobnet bat": "a residual inside of its attention, which timm does not drop",
    "timm:csatv2 csatv2": "small transformer blocks inside of its branches, not dropped by timm",
    "timm:efficientformer_v2 efficientformerv2": (
        "a downsampling by attention beside one by convolution, not dropped by timm"
    ),
    "timm:gcvit gcvit": "convolutional residual blocks between its stages, not dropped by timm",
    "timm:resnest resnest": "timm drops the block's input, which is not used any more",
    "timm:swiftformer swiftformer": "a residual inside of the attention, not dropped by timm",
    "torchvision:video.mvit": "adding the pooled query: no module with parameters in that branch",
    "transformers:siglip": _HEAD,
    "transformers:siglip_vision_model": _HEAD,
    **dict.fromkeys(
        (
            "transformers:wav2vec2",
            "transformers:hubert",
            "transformers:wavlm",
            "transformers:unispeech",
            "transformers:sew",
            "transformers:data2vec-audio",
        ),
        _POSITIONS,
    ),
}
_PART = "adds to a part of its channels: the others are made by the branch alone"
LEFT_OUT = {
    "timm:rexnet rexnet": _PART,
    "timm:rexnet rexnetr": _PART,
    **dict.fromkeys(("transformers:t5", "transformers:mt5", "transformers:longt5"), _FIRST),
    "transformers:switch_transformers": _FIRST,
    "transformers:wavlm": "the first layer computes the position bias of all: left out by name",
}
