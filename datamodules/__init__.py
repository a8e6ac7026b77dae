"""Data for training and validation, to be named in a configuration as ``datamodules.<class>``."""

from datamodules.synthetic_faces import SyntheticFacesDataModule
from datamodules.wider_face import WiderFaceDataModule

__all__ = ["SyntheticFacesDataModule", "WiderFaceDataModule"]
