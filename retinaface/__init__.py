"""RetinaFace Slim: prune, quantize and distil a RetinaFace detector."""

import logging

__version__ = "0.1.0"

# torchao 0.18 registers its enums in a way that torch 2.15 calls deprecated, on every import.
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "register_constant" not in record.getMessage())
