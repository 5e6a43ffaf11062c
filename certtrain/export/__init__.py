"""Export for other verifiers: ONNX and VNN-LIB files."""

from .onnx_file import OnnxFile, export_onnx
from .run import Export, current_network, write_files

__all__ = ["Export", "OnnxFile", "current_network", "export_onnx", "write_files"]
