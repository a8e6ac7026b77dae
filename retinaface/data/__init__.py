"""From files to augmented samples: annotations, transforms and rendered photos."""
