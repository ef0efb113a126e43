"""Oracle tests run in their own environment (`.venv-oracle`), where torchvision, timm and open_clip are installed.

A CPU build of torch has no operators of torchvision's; two are declared before its first import, never called.
"""

import torch

if torch.version.cuda is None:
    _LIBRARY = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
