"""RetinaFace Slim: prune, quantize and distil a RetinaFace detector."""
