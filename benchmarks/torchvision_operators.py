"""Imported before timm and open_clip: a CPU build of torch lacks two operators that torchvision names at import.

They are declared, never called.
"""

import torch

# Kept for the life of the process: a library's operators vanish with it.
_LIBRARY = torch.library.Library("torchvision", "DEF") if torch.version.cuda is None else None
if _LIBRARY is not None:
    for _name in ("nms", "qnms"):
        _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
