"""The detector: network, anchors, losses, post-processing and checkpoints."""
