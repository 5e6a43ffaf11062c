"""A checker of proofs about neural networks (docs/proofs.md): numpy, onnx and safetensors, nothing
else of certtrain.

Read in this order: ``arithmetic`` (what is added for rounding), ``operations`` (the network's
operations and their rules), ``network`` (ONNX), ``bounds`` (intervals and linear bounds), ``claim``
(what is to be proved; ``vnnlib``), ``proof`` (the file), ``check`` (the proof's goals).
"""

VERSION = "1"
"""Version of the checker, which is named in what is written about checked proofs."""
